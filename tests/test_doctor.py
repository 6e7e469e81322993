"""The doctor tells the truth about packages, about laws that do not hold, and survives what is broken."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pte.doctor.command import line, verdict
from pte.doctor.findings import Finding, looked
from pte.doctor.installed import PURPOSES, failed_imports, judged, wanted_packages
from pte.doctor.machine import fast_paths, without_gpu
from pte.doctor.self_check import SelfCheck, check_device, self_check_findings
from pte.kernels.available import why_no_kernels
from pte.method.float8 import float8_refusal

ROOT = Path(__file__).parents[1]
REQUIREMENTS = [
    "torch>=2.8",
    'peft<0.22,>=0.21; extra == "peft"',
    'trl<1.17,>=1.16; extra == "trl"',
    'peft<0.22,>=0.21; extra == "trl"',
    'ruff>=0.9; extra == "dev"',
    'triton>=3.4; platform_system == "Linux" and extra == "dev"',
    "Jinja2>=3.1",
]


def test_every_extra_says_what_it_is_for() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert PURPOSES.keys() == extras.keys() - {"dev"}


def test_the_core_comes_first_and_tools_for_development_are_not_looked_at() -> None:
    wanted = wanted_packages(REQUIREMENTS)
    assert [one.requirement.name for one in wanted] == ["torch", "Jinja2", "peft", "trl", "triton"]
    assert [bool(one.purpose) for one in wanted] == [False, False, True, True, True]
    assert wanted[1].module == "jinja2" and wanted[2].declared == ">=0.21,<0.22"
    assert wanted[2].purpose == f"{PURPOSES['peft']} and {PURPOSES['trl']}"


# (package, installed version, import error) and what is to be said: status, words, remedy.
JUDGED = [
    ("torch", "2.8.0+cpu", None, "ok", "2.8.0+cpu, in >=2.8", None),
    ("torch", None, None, "wrong", "not installed", 'pip install "torch>=2.8"'),
    ("torch", "2.7.1", None, "wrong", "2.7.1 is outside >=2.8", 'pip install "torch>=2.8"'),
    ("torch", "2.9", "ImportError: libc", "wrong", "2.9 cannot be imported: ImportError: libc", "--force-reinstall"),
    ("trl", None, None, "off", "not installed (TRL's trainers)", 'pip install -e ".[trl]"'),
    ("trl", "1.17.0", None, "warning", "is outside >=1.16,<1.17", 'pip install -e ".[trl]"'),
    ("trl", "1.16.0", "OSError: x", "warning", "cannot be imported: OSError: x", "--force-reinstall"),
]


@pytest.mark.parametrize(("name", "found", "error", "status", "words", "remedy"), JUDGED)
def test_only_what_the_core_needs_can_be_wrong(
    name: str, found: str | None, error: str | None, status: str, words: str, remedy: str | None
) -> None:
    (wanted,) = (one for one in wanted_packages(REQUIREMENTS) if one.requirement.name == name)
    finding = judged(wanted, found, error=error)
    assert finding.status == status and words in finding.says
    assert finding.remedy is None if remedy is None else remedy in (finding.remedy or "")


@pytest.mark.system
def test_packages_that_fail_or_end_the_process_are_named_and_the_others_are_still_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doctor_fine.py").write_text("print('noise')\n")
    (tmp_path / "doctor_old.py").write_text("raise AttributeError('module x has no attribute y')\n")
    (tmp_path / "doctor_exits.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "doctor_dies.py").write_text("import os\nos._exit(3)\n")
    (tmp_path / "doctor_last.py").write_text("import not_there_at_all\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    modules = ["doctor_fine", "doctor_old", "doctor_exits", "doctor_dies", "doctor_fine", "doctor_last"]
    assert failed_imports(modules) == {
        "doctor_old": "AttributeError: module x has no attribute y",
        "doctor_exits": "SystemExit: 0",
        "doctor_dies": "its import ended the process",
        "doctor_last": "ModuleNotFoundError: No module named 'not_there_at_all'",
    }


@pytest.mark.system
def test_an_import_that_hangs_is_named_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doctor_hangs.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert failed_imports(["doctor_hangs", "json"], seconds=2) == {"doctor_hangs": "its import did not end in 2 s"}


def test_kernels_are_off_for_the_reason_that_the_rollout_gives() -> None:
    findings = {finding.name: finding for finding in fast_paths()}
    reason = why_no_kernels(torch.device("cpu"))
    assert findings["kernels on cpu"].status == ("ok" if reason is None else "off")
    assert findings["kernels on cpu"].says == (reason or "on")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_float8_is_on_where_a_rollout_computes_in_it(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    for name, value in (
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_device_name", "some GPU"),
        ("is_bf16_supported", True),
    ):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    findings = {finding.name: finding for finding in fast_paths()}
    reason = float8_refusal(torch.device("cuda", 0))
    found = findings["float8 on cuda:0"]
    assert (found.status, found.says) == (("ok", "on") if capability == (9, 0) else ("off", reason))


def test_a_driver_without_a_build_of_torch_for_it_is_a_warning_with_the_remedy() -> None:
    assert without_gpu(None, cuda=None).status == "off"
    found = without_gpu("570.1", cuda=None)
    assert found.status == "warning" and "build of torch for CUDA" in (found.remedy or "")
    assert "CUDA_VISIBLE_DEVICES" in (without_gpu("570.1", cuda="12.8").remedy or "")


GOOD = SelfCheck("cpu", "eager", 2e-5, 1e-3, evictions=100, same_tokens=True, plain_gap=1e-6, seconds=1.0)


@pytest.mark.system
def test_the_laws_hold_here() -> None:
    check = check_device(torch.device("cpu"))
    assert [finding.status for finding in self_check_findings(check)] == ["ok"] * 3
    # Rounding of a sharply trained base; another policy than the one that sampled would show tenths.
    assert check.logprob_gap <= 1e-4 and check.plain_gap <= 1e-5 and check.evictions > 50


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"logprob_gap": 0.12}, "same policy on cpu"),
        ({"logprob_gap": float("nan")}, "same policy on cpu"),
        ({"evictions": 0}, "same policy on cpu"),
        ({"same_tokens": False}, "full cache on cpu"),
        ({"plain_gap": 0.1}, "full cache on cpu"),
    ],
)
def test_a_law_that_does_not_hold_is_wrong_and_has_a_remedy(bad: dict[str, float], name: str) -> None:
    found = self_check_findings(replace(GOOD, **bad))  # type: ignore[arg-type]
    assert [finding.name for finding in found if finding.status == "wrong"] == [name]
    assert all(finding.remedy for finding in found if finding.status == "wrong")
    assert all(finding.status == "ok" for finding in self_check_findings(GOOD))


def test_a_look_that_fails_is_a_finding() -> None:
    def look() -> list[Finding]:
        raise AttributeError("torch has\nno x")

    (finding,) = looked("devices", look, remedy="reinstall")
    assert (finding.status, finding.says, finding.remedy) == ("wrong", "AttributeError: torch has no x", "reinstall")
    assert "reinstall" in line(finding)


def test_the_last_line_names_what_is_wrong_and_what_is_optional() -> None:
    wrong, warning = Finding("s", "torch", "wrong", "x", "y"), Finding("s", "trl", "warning", "x", "y")
    assert verdict([], []) == "pte works here"
    assert verdict([], [warning]) == "pte works here; 1 optional: trl"
    assert verdict([wrong], [warning]) == "1 wrong: torch; 1 optional: trl"


BROKEN = "raise RuntimeError('built for another version')\n"


@pytest.mark.system
@pytest.mark.parametrize(("broken", "status"), [("peft", 0), ("torch", 1)])
def test_a_broken_package_is_reported_by_name_without_a_traceback(
    broken: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    out = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "pte", "doctor", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.splitlines()[-1].startswith("pte works here; 1 optional: peft" if status == 0 else "")
    said = json.loads(out.read_text())
    assert said["works"] is (status == 0)
    (finding,) = (one for one in said["findings"] if one["name"] == broken)
    assert "cannot be imported" in finding["says"] and "built for another version" in finding["says"]
    assert bool(said["self_checks"]) is (status == 0)


@pytest.mark.system
@pytest.mark.parametrize(("command", "status"), [("doctor", 1), ("generate", 2)])
def test_without_the_package_that_reads_the_command_line_the_doctor_still_looks(
    command: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tyro.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([sys.executable, "-m", "pte", command], capture_output=True, text=True, timeout=100)
    assert done.returncode == status and "Traceback" not in done.stderr
    said = done.stdout if command == "doctor" else done.stderr
    assert "RuntimeError: built for another version" in said
    assert ("tyro" in said.splitlines()[-1]) if command == "doctor" else ("pte doctor" in said)


@pytest.mark.system
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pte", "doctor", "--output", str(tmp_path / "missing" / "doctor.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("pte doctor: ")
