"""The project's own files: pins that install, ranges that hold, one version everywhere."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WRITTEN = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
# Some are for certain platforms only.
REQUIRED = [requirement for requirement in WRITTEN if requirement.marker is None or requirement.marker.evaluate()]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {pin.name.lower().replace("_", "-"): pin for pin in map(Requirement, LINES)}


def test_every_constraint_is_one_exact_version_from_any_index() -> None:
    for pin in PINS.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and pin.url is None and "+" not in specifier.version, str(pin)
    assert str(PINS["torch"].specifier) == "==2.13.0"
    assert "pte" not in PINS


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_every_requirement_is_pinned_within_its_range_to_what_these_tests_run_on(requirement: Requirement) -> None:
    (pinned,) = PINS[requirement.name.lower().replace("_", "-")].specifier
    assert requirement.specifier.contains(pinned.version)
    assert requirement.specifier.contains(version(requirement.name).partition("+")[0])


def test_the_version_is_the_same_in_every_file() -> None:
    assert version("pte") == PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == PROJECT["version"]
    assert "arXiv:2602.16839" in citation and PROJECT["license"] == "Apache-2.0"


def test_the_licence_is_the_whole_apache_licence_in_our_name() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "The PTE authors" in licence


def test_the_embedded_task_is_shipped_in_the_package_and_small() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pte"]
    assert "tasks/embedded/*" in shipped
    files = [path for path in (ROOT / "src/pte/tasks/embedded").iterdir() if path.is_file()]
    assert 0 < sum(path.stat().st_size for path in files) <= 4 * 2**20
