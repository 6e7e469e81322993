"""A real run, a real comparison and made-up evidence, each written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pte.cli import main
from short_runs import short_flags
from synthetic_evidence import write_evidence


@pytest.fixture(scope="session")
def train_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the embedded reasoner, seconds long."""
    directory = tmp_path_factory.mktemp("runs")
    assert main(["train", *short_flags(run__output_dir=directory, run__name="short")]) == 0
    return directory / "short"


@pytest.fixture(scope="session")
def evidence_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every question, three seeds."""
    return write_evidence(tmp_path_factory.mktemp("evidence") / "evidence")
