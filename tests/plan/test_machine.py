"""Memory as people write it, devices as they are sold."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from pte.arguments import PlanArguments
from pte.plan.machine import DEVICES, memory_bytes, planned_machine
from pte.plan.roofline import DeviceRates

NOTHING = {"gpu": None, "gpu_memory": None, "host_memory": None, "bandwidth": None, "flops": None}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("0.5 tb", 5 * 10**11),
        ("512MiB", 512 * 2**20),
        (" 24 GB ", 24 * 10**9),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert memory_bytes("gpu_memory", text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 G", "80GBit", "eighty GB", "5KB", ""])
def test_a_size_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"gpu_memory must be a number with one of the units .*got .*use for example 80GB"
    ):
        memory_bytes("gpu_memory", text)


def test_the_command_offers_every_device() -> None:
    (named, nothing) = get_args(get_type_hints(PlanArguments)["gpu"])
    assert get_args(named) == tuple(DEVICES) and nothing is type(None)


def test_a_gpu_by_name_brings_its_memory_and_its_rates() -> None:
    machine = planned_machine(**{**NOTHING, "gpu": "a100-40gb"})
    assert (machine.cuda, machine.device_bytes, machine.host_bytes) == (True, 40 * 10**9, None)
    assert machine.rates == DeviceRates(1.555e12, 312e12) and machine.rates_of == "the data sheet of a100-40gb"


def test_memory_alone_takes_the_rates_of_the_device_that_is_nearest_and_says_so() -> None:
    machine = planned_machine(**{**NOTHING, "gpu_memory": "80GB", "host_memory": "1TB"})
    assert machine.rates == DEVICES["h100"].rates and machine.host_bytes == 10**12
    assert machine.rates_of == "the data sheet of h100, whose memory is nearest (--gpu NAME)"
    assert planned_machine(**{**NOTHING, "gpu_memory": "24GiB"}).rates == DEVICES["rtx4090"].rates


def test_measured_rates_win_over_the_data_sheet_s() -> None:
    machine = planned_machine(**{**NOTHING, "gpu": "h200", "bandwidth": 4.0e12, "flops": 7e14})
    assert machine.rates == DeviceRates(4.0e12, 7e14) and machine.rates_of == "as given"
    assert planned_machine(**{**NOTHING, "gpu": "h200", "flops": 7e14}).rates == DeviceRates(4.8e12, 7e14)


def test_host_memory_alone_is_a_machine_without_a_gpu() -> None:
    machine = planned_machine(**{**NOTHING, "host_memory": "8GB"})
    assert (machine.cuda, machine.device_bytes, machine.rates) == (False, 8 * 10**9, None)


def test_no_memory_and_impossible_rates_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gpu_memory must say what there is.*--gpu-memory 80GB, --gpu h100, or --host"
    ):
        planned_machine(**NOTHING)
    for rate in (-1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=f"flops must be a finite number above 0, got {rate}; use for example 3e12"
        ):
            planned_machine(**{**NOTHING, "gpu": "h100", "flops": rate})


@pytest.mark.parametrize("rate", ["bandwidth", "flops"])
def test_rates_without_a_gpu_are_not_ignored(rate: str) -> None:
    with pytest.raises(ValueError, match="bandwidth and flops must be left out without a GPU.*say --gpu-memory"):
        planned_machine(**{**NOTHING, "host_memory": "8GB", rate: 1e11})
