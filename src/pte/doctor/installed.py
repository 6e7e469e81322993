"""Packages: their versions against the ranges that pte declares, and whether each can be imported.

Decides: what a missing, an unfit and a broken package mean: of the core something wrong, of an extra a line that says
what it would be for. Ranges are read from the metadata of the installed pte, so there is one list of them.
Packages are imported in a process of their own: one that ends the process ends only that one.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from pte.doctor.findings import Finding, Status

if TYPE_CHECKING:
    from packaging.requirements import Requirement

SECTION = "versions"
PURPOSES = {
    "eval": "lm-evaluation-harness",
    "peft": "adapters as PEFT's own",
    "serve": "pte serve",
    "trl": "TRL's trainers",
}
"""What each extra is for; `dev` is for who works on pte, and only what comes with torch is looked at of it."""
WITH_TORCH = {"triton": "the kernels of a GPU's decode step"}
"""What a build of torch for CUDA brings, so that no extra names it."""
IMPORT_SECONDS = 120.0
"""For all packages together; lm_eval and trl take some seconds each where nothing is cached."""
MARK, NEVER_BACK = "pte-doctor-import ", "never came back"
IMPORTER = f"""
import importlib, json, sys
for name in sys.argv[1:]:
    print({MARK!r} + json.dumps([name, {NEVER_BACK!r}]), flush=True)
    try:
        importlib.import_module(name)
        error = None
    except BaseException as caught:
        error = " ".join((type(caught).__name__ + ": " + str(caught)).split())
    print({MARK!r} + json.dumps([name, error]), flush=True)
"""


@dataclass(frozen=True)
class Wanted:
    """A package that pte declares.

    Args:
        requirement: Name and range.
        purpose: What it is for; empty for the core.
        install: What installs it.
    """

    requirement: Requirement
    purpose: str
    install: str

    @property
    def module(self) -> str:
        """The name it is imported by."""
        return self.requirement.name.lower().replace("-", "_")

    @property
    def declared(self) -> str:
        """The range, lower bound first."""
        return ",".join(sorted(map(str, self.requirement.specifier), reverse=True))


def wanted_packages(written: Iterable[str]) -> list[Wanted]:
    """The packages that requirements name, those of the core first.

    Args:
        written: Requirements as metadata has them, with `extra == "..."` markers.
    """
    from packaging.requirements import Requirement

    extras: dict[str, list[str]] = {}
    parsed: dict[str, Requirement] = {}
    for text in written:
        requirement = Requirement(text)
        name, found = requirement.name, re.search(r"extra == ['\"](\w+)['\"]", str(requirement.marker or ""))
        extra = "" if found is None else found[1]
        if extra != "dev" or name in WITH_TORCH:
            parsed.setdefault(name, requirement)
            extras.setdefault(name, []).append(extra)
    wanted = []
    for name, requirement in parsed.items():
        if "" in extras[name]:
            purpose, install = "", f'pip install "{name}{requirement.specifier}"'
        elif name in WITH_TORCH:
            purpose, install = WITH_TORCH[name], f'pip install "{name}{requirement.specifier}"'
        else:
            purpose = " and ".join(PURPOSES[extra] for extra in extras[name])
            install = f'pip install -e ".[{extras[name][0]}]" in the checkout of pte'
        wanted.append(Wanted(requirement, purpose, install))
    return sorted(wanted, key=lambda one: bool(one.purpose))


def installed_packages() -> list[Finding]:
    """Python, pte and every package that pte declares: version, range, and whether it can be imported."""
    findings = [Finding(SECTION, "python", "ok", platform.python_version())]
    try:
        findings.append(Finding(SECTION, "pte", "ok", version("pte")))
        written = requires("pte") or []
    except PackageNotFoundError:
        remedy = "pip install -e . in the checkout of pte"
        return [*findings, Finding(SECTION, "pte", "wrong", "no metadata: pte is on the path, not installed", remedy)]
    wanted = wanted_packages(written)
    versions = {one.requirement.name: installed_version(one.requirement.name) for one in wanted}
    broken = failed_imports([one.module for one in wanted if versions[one.requirement.name] is not None])
    return findings + [judged(one, versions[one.requirement.name], error=broken.get(one.module)) for one in wanted]


def found_checkout() -> list[Finding]:
    """Which pte is running."""
    from pte.run_record import commit

    return [Finding("checkout", "pte", "ok", f"{Path(__file__).parents[1]}, {commit() or 'no checkout of git'}")]


def installed_version(name: str) -> str | None:
    """Version of a distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judged(wanted: Wanted, found: str | None, *, error: str | None) -> Finding:
    """What a version and an import mean.

    Args:
        wanted: The package, as pte declares it.
        found: The version that is installed; None for none.
        error: What its import said; None where it went well or was not tried.
    """
    name, declared = wanted.requirement.name, wanted.declared
    unfit: Status = "warning" if wanted.purpose else "wrong"
    purpose = f" ({wanted.purpose})" if wanted.purpose else ""
    if found is None:
        absent: Status = "off" if wanted.purpose else "wrong"
        return Finding(SECTION, name, absent, f"not installed{purpose}, {declared} fits", wanted.install)
    if not wanted.requirement.specifier.contains(found, prereleases=True):
        return Finding(SECTION, name, unfit, f"{found}{purpose} is outside {declared}", wanted.install)
    if error is not None:
        remedy = f"{wanted.install}, with --force-reinstall"
        return Finding(SECTION, name, unfit, f"{found}{purpose} cannot be imported: {error}", remedy)
    return Finding(SECTION, name, "ok", f"{found}, in {declared}")


def failed_imports(modules: Iterable[str], *, seconds: float = IMPORT_SECONDS) -> dict[str, str]:
    """What went wrong, by the name of the module; those that can be imported are left out.

    Args:
        modules: Imported in this order in another process, `pte` first, as a user would.
        seconds: For all of them; those not reached are not judged.
    """
    left, failed = ["pte", *modules], dict[str, str]()
    deadline = time.monotonic() + seconds
    while left:
        said = imported(left, seconds=max(1.0, deadline - time.monotonic()))
        failed |= {name: error for name, error in said.items() if error is not None}
        # One that ended the process is the last that was tried: go on behind it.
        left = left[max(1, len(said)) :] if said and time.monotonic() < deadline else []
    return failed


def imported(modules: list[str], *, seconds: float) -> dict[str, str | None]:
    """What one process says of the modules that it came to, in their order; None for no error."""
    command, ending = [sys.executable, "-W", "ignore", "-c", IMPORTER, *modules], "its import ended the process"
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False).stdout
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        ending = f"its import did not end in {seconds:.0f} s"
    lines = [line[len(MARK) :] for line in out.splitlines() if line.startswith(MARK)]
    said: dict[str, str | None] = dict(json.loads(line) for line in lines)
    return {name: ending if error == NEVER_BACK else error for name, error in said.items()}
