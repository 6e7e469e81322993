"""The public names and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pte


def test_importing_pte_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, pte; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_importing_pte_loads_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import pte;"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - {'pte', *sys.stdlib_module_names})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.system
def test_importing_pte_takes_less_than_0_3_s_of_the_processor_beyond_torch_s_own() -> None:
    # Measured: 0.0016 s on a 2-core EPYC.
    code = "import time, torch; start = time.process_time(); import pte; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


@pytest.mark.parametrize("name", pte.__all__)
def test_every_public_name_is_the_object_of_its_room(name: str) -> None:
    value = getattr(pte, name)
    assert value.__name__ == name and value.__module__.startswith("pte.") and name in dir(pte)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Rollouts'"):
        pte.Rollouts  # noqa: B018
