"""What the doctor finds: one line of its report each, and what goes wrong while looking is a finding, too.

Decides: which findings make the command fail (`wrong`) and which do not. Does not know what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "off", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        section: Heading that it stands under.
        name: What was looked at.
        status: `ok`; `off`: not there, and not needed; `warning`: what is optional does not work; `wrong`: pte does not
            work as it should.
        says: What was found.
        remedy: What to do about it; every `warning` and every `wrong` has one.
    """

    section: str
    name: str
    status: Status
    says: str
    remedy: str | None = None


def looked(section: str, look: Callable[[], list[Finding]], *, remedy: str) -> list[Finding]:
    """What a look finds; if it fails, that is the finding, so that one broken package hides nothing else.

    Args:
        section: Heading of the finding when the look fails.
        look: Returns findings.
        remedy: What to do when the look fails.
    """
    try:
        return look()
    except Exception as error:  # a broken package fails in any way that it likes
        return [Finding(section, "the check itself", "wrong", says=one_line(error), remedy=remedy)]


def one_line(error: BaseException) -> str:
    """An error's type and message."""
    return " ".join(f"{type(error).__name__}: {error}".split())
