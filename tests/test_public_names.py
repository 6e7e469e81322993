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


@pytest.mark.parametrize("name", pte.__all__)
def test_every_public_name_is_the_object_of_its_room(name: str) -> None:
    value = getattr(pte, name)
    assert value.__name__ == name and value.__module__.startswith("pte.") and name in dir(pte)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Rollouts'"):
        pte.Rollouts  # noqa: B018
