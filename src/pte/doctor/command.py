"""`pte doctor`: all looks one after the other, a report for people, JSON for issues, and one verdict.

Decides: the order, the form, and the exit status: 0 where pte works, 1 where something is wrong. Needs neither rich nor
any other package before it looks, so that it can say what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

from pte.doctor.findings import Finding, looked
from pte.doctor.installed import found_checkout, installed_packages
from pte.doctor.machine import devices, fast_paths, found_devices
from pte.doctor.self_check import REPORT, SECTION, SelfCheck, check_device, self_check_findings

if TYPE_CHECKING:
    from pte.checkpoint_files import Json

REINSTALL = "pip install -e . -c constraints.txt in the checkout of pte, in an environment of its own"


def doctor(*, output: str | None, say: Callable[[str], None] = print) -> int:
    """Looks at everything, reports, and returns the exit status.

    Args:
        output: File for the findings as JSON, or None.
        say: Takes a line of the report.

    Raises:
        OSError: The file cannot be written; nothing was looked at.
    """
    with ExitStack() as files:
        file = None if output is None else files.enter_context(open(output, "w", encoding="utf-8"))
        findings, checks = examined(say)
        wrong = [finding for finding in findings if finding.status == "wrong"]
        say(verdict(wrong, [finding for finding in findings if finding.status == "warning"]))
        if file is not None:
            content: dict[str, Json] = {
                "works": not wrong,
                "findings": [asdict(finding) for finding in findings],
                "self_checks": [asdict(check) for check in checks],
            }
            json.dump(content, file, indent=2)
    return 1 if wrong else 0


def examined(say: Callable[[str], None]) -> tuple[list[Finding], list[SelfCheck]]:
    """All findings in the order of the report, and the numbers of the self checks; each section is said as it is done.

    Args:
        say: Takes the sections.
    """
    findings: list[Finding] = []
    checks: list[SelfCheck] = []

    def report(section: str, look: Callable[[], list[Finding]], *, remedy: str = REINSTALL) -> None:
        found = looked(section, look, remedy=remedy)
        say(f"{section}\n" + "\n".join(map(line, found)) + "\n")
        findings.extend(found)

    def checked() -> list[Finding]:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        found = []
        for device in devices():
            checks.append(check_device(device))
            found += self_check_findings(checks[-1])
        return found

    report("versions", installed_packages)
    report("checkout", found_checkout)
    report("devices", found_devices)
    report("fast paths", fast_paths)
    report(SECTION, checked, remedy=f"{REINSTALL}; if it fails again, {REPORT}")
    return findings, checks


def line(finding: Finding) -> str:
    """A finding as a line, and its remedy as another one."""
    remedy = "" if finding.remedy is None else f"\n{'':10}{finding.remedy}"
    return f"  {finding.status:7} {finding.name:22} {finding.says}{remedy}"


def verdict(wrong: list[Finding], warnings: list[Finding]) -> str:
    """The last line: whether pte works here."""
    optional = f"; {len(warnings)} optional: {', '.join(one.name for one in warnings)}" if warnings else ""
    if not wrong:
        return f"pte works here{optional}"
    return f"{len(wrong)} wrong: {', '.join(one.name for one in wrong)}{optional}"
