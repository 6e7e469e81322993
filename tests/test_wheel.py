"""What a wheel holds, and that pte works from it alone: in an environment without the checkout, in another directory.

The environment is empty but for the wheel; the packages that pte needs are found where these tests find them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
MADE_BY_TOOLS = ("__pycache__", "*.egg-info", "*.pyc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist of a copy of the checkout, and the wheel that is built from that sdist."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns(*MADE_BY_TOOLS))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return copy / "dist"


def sources() -> set[str]:
    """Every file of the package, relative to `src`."""
    shipped = [path for path in (ROOT / "src" / "pte").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(ROOT / "src").as_posix() for path in shipped}


def test_a_wheel_holds_every_file_of_the_package_and_the_licence(built: Path) -> None:
    (wheel,) = built.glob("pte-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        weights = archive.read("pte/tasks/embedded/model.safetensors")
    assert {name for name in names if name.startswith("pte/")} == sources()
    assert weights == (ROOT / "src/pte/tasks/embedded/model.safetensors").read_bytes()
    assert {"pte/py.typed", "pte/tasks/embedded/tokenizer.json"} <= set(names)
    assert any(name.startswith("pte/report/assets/") for name in names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_an_sdist_holds_every_file_of_the_package(built: Path) -> None:
    (sdist,) = built.glob("pte-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in sources()} <= names


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that has the wheel, and sees the packages of this one behind it."""
    (wheel,) = built.glob("*.whl")
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    # A path file inside this directory, such as that of an editable install, is not read from there.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return home / "bin"


def run_there(installed: Path, directory: Path, *words: str) -> str:
    """Output of a program of the environment, run in another directory without a word of the checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(installed / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_s_pte_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    program = (
        "import pte; from importlib.metadata import distribution as of; print(pte.__file__, of('pte').locate_file(''))"
    )
    file, home = run_there(installed, tmp_path, "python", "-c", program).split()
    assert Path(file).is_relative_to(installed.parent) and Path(home).is_relative_to(installed.parent)


def test_the_doctor_finds_nothing_wrong_with_a_wheel(installed: Path, tmp_path: Path) -> None:
    said = run_there(installed, tmp_path, "pte", "doctor", "--output", "doctor.json")
    assert said.splitlines()[-1].startswith("pte works here")
    findings = json.loads((tmp_path / "doctor.json").read_text())["findings"]
    (running,) = (one["says"] for one in findings if one["section"] == "checkout")
    assert running.endswith(", no checkout of git") and str(installed.parent) in running


def test_the_embedded_reasoner_completes_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    # A 3 + B 5 = C 8, C 8 + A 3 = D 1 modulo 10.
    words = ("generate", "--adapter.kind", "none", "--prompt", "A3 B5 #1 A B C #2 C A D ? D")
    said = run_there(installed, tmp_path, "pte", *words)
    assert "=> D 1" in said
