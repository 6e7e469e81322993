"""Rows survive: on disk as they come, added up over runs, never mixed with those of something else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pte.bench.gpu_run import PartClock, measured_row
from pte.bench.rows import Case, NotMeasured, Row, RowBook, Values

STEP = Case("step", "pte", 4, 8, 24)
FULL = Case("long", "generate", 0, None, 80)
IDENTITY = ("model", "device")


def header(**changes: str) -> Values:
    return {"model": "7b", "device": "a GPU", "commit": "c1", **changes}


def book(path: Path | None, **changes: str) -> RowBook:
    return RowBook(path, header=header(**changes), identity=IDENTITY)


def test_a_row_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    rows = [Row(STEP, "c1", {"seconds": {"median": 2.5, "repeats": 3}, "how": "so"}), Row(FULL, None, {}, "no room")]
    kept = book(tmp_path / "rows.json")
    for row in rows:
        kept.add(row)
    assert list(book(tmp_path / "rows.json").rows.values()) == rows
    assert rows[0].number("seconds", "median") == 2.5
    assert rows[0].number("seconds", "least") is None and rows[0].number("how") is None


def test_every_row_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    kept = book(path)
    kept.add(Row(STEP, "c1", {"seconds": 1.0}))
    assert [row["arm"] for row in json.loads(path.read_text())["rows"]] == ["pte"]
    kept.add(Row(FULL, "c1", {"seconds": 2.0}))
    assert [row["arm"] for row in json.loads(path.read_text())["rows"]] == ["pte", "generate"]
    assert list(tmp_path.iterdir()) == [path], "nothing half written is left behind"


def test_only_what_this_commit_measured_counts_as_measured(tmp_path: Path) -> None:
    kept = book(tmp_path / "rows.json")
    kept.add(Row(STEP, "c1", {"seconds": 1.0}))
    kept.add(Row(FULL, "c1", {}, "left out for time"))
    assert kept.has(STEP) and not kept.has(FULL)
    later = book(tmp_path / "rows.json", commit="c2")
    assert not later.has(STEP)
    later.add(Row(STEP, "c2", {"seconds": 9.0}))
    assert later.rows[STEP].values == {"seconds": 9.0} and len(later.rows) == 2


@pytest.mark.parametrize("change", [{"model": "8b"}, {"device": "another GPU"}])
def test_a_file_of_another_model_or_device_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    path = tmp_path / "rows.json"
    book(path).add(Row(STEP, "c1", {}))
    before = path.read_text()
    with pytest.raises(ValueError, match="output must hold rows of .*; use another file, or delete this one"):
        book(path, **change)
    assert path.read_text() == before


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("{half")
    with pytest.raises(ValueError, match="output must hold one JSON object"):
        book(tmp_path / "rows.json")


def raising(error: BaseException) -> Values:
    raise error


@pytest.mark.parametrize(
    ("error", "reason", "failed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.\nmore"), "out of memory: .*9 GiB.$", False),
        (NotMeasured("vllm is not installed"), "^vllm is not installed$", False),
        (RuntimeError("a fault of ours"), "^RuntimeError: a fault of ours$", True),
    ],
)
def test_a_row_without_a_measurement_says_why(error: BaseException, reason: str, failed: bool) -> None:
    row = measured_row(STEP, PartClock(60), lambda: raising(error), commit="c1")
    assert row.not_measured is not None and row.failed == failed
    assert re.search(reason, row.not_measured)


def test_a_part_without_time_leaves_rows_out_and_says_so() -> None:
    clock = PartClock(seconds=1000.0)
    longer, other = Case("update", "chain", 4, 8, 2000), Case("update", "exact", 4, 8, 2000)
    clock.note(Case("update", "chain", 4, 8, 100), 60.0)
    # 60 s for 100 tokens: 1200 s for 2000, and no arm under the window is known to be faster.
    for case in (longer, other):
        row = measured_row(case, clock, lambda: pytest.fail("there was no time"), commit=None)
        assert row.not_measured == "left out for time: 1200 s expected, 1000 s left of the part's 1000"
    # The full cache has not been tried yet.
    assert measured_row(
        Case("update", "plain_lora", 4, None, 2000), clock, lambda: {"seconds": 1.0}, commit=None
    ).values


def test_a_whole_completion_takes_the_time_of_its_window_and_not_of_its_length() -> None:
    clock = PartClock(seconds=100.0)
    clock.note(Case("long", "pte", 256, 1024, 3072), 60.0)
    assert clock.expected(Case("long", "pte", 256, 1024, 65_536)) == pytest.approx(60.0)
    assert clock.expected(Case("rollout", "pte", 256, 4096)) == pytest.approx(240.0)


def test_a_row_under_the_full_cache_is_expected_to_take_the_time_of_its_length() -> None:
    clock = PartClock(seconds=100.0)
    clock.note(Case("long", "full", 0, None, 3072), 12.0)
    assert clock.expected(Case("long", "full", 0, None, 8192)) == pytest.approx(32.0)
    assert clock.expected(Case("long", "generate", 0, None, 6144)) == pytest.approx(24.0)


def test_a_quick_row_does_not_make_the_next_one_of_its_arm_look_quick() -> None:
    clock = PartClock(seconds=100.0)
    clock.note(Case("long", "full", 0, None, 3072), 12.0)
    clock.note(Case("long", "full", 0, None, 6144), 6.0)
    assert clock.expected(Case("long", "full", 0, None, 8192)) == pytest.approx(32.0)
