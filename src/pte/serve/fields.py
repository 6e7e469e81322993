"""The fields of a JSON object, taken one by one with type and range, so that none is overlooked.

Decides: how a wrong value is refused: field, rule, value, remedy. Does not know: which fields there are.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping

from pte.serve.errors import ApiError

SHOWN_CHARACTERS = 60


class Fields:
    """The fields of an object, null ones left out.

    Args:
        body: The object.
        within: Name of the field that holds it; empty for the body itself.
    """

    def __init__(self, body: Mapping[str, object], *, within: str = "") -> None:
        self.values = {name: value for name, value in body.items() if value is not None}
        self.within = within
        self.known: set[str] = set()

    def has(self, name: str) -> bool:
        """True when the field is there."""
        self.known.add(name)
        return name in self.values

    def take(self, name: str) -> object:
        """The value of a field that must be there."""
        if not self.has(name):
            raise ApiError(f"you must provide {self.called(name)}, got none; add it", param=self.called(name))
        return self.values[name]

    def called(self, name: str) -> str:
        """The field as a message names it."""
        return f"{self.within}.{name}" if self.within else name

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong(name, "be a string", "write it in quotes")
        return value

    def texts(self, name: str, *, most: int) -> tuple[str, ...]:
        """A string or a list of strings, none of them empty; nothing where the field is left out."""
        if not self.has(name):
            return ()
        value = self.values[name]
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise self.wrong(name, "be a string or a list of strings, none of them empty", "send for example ['###']")
        if len(found) > most:
            raise self.wrong(name, f"hold at most {most} strings", "leave some out")
        return tuple(found)

    def flag(self, name: str) -> bool:
        """True or false; false where the field is left out."""
        value = self.values[name] if self.has(name) else False
        if not isinstance(value, bool):
            raise self.wrong(name, "be true or false", "write it without quotes")
        return value

    def integer(self, name: str, *, least: int, most: int, default: int | None = None) -> int:
        """A whole number within a range."""
        if default is not None and not self.has(name):
            return default
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "be an integer", f"write for example {least if default is None else default}")
        if not least <= value <= most:
            raise self.wrong(
                name,
                f"be from {least} to {most}",
                f"use at {'most' if value > most else 'least'} {most if value > most else least}",
            )
        return value

    def number(self, name: str, *, least: float, most: float, default: float) -> float:
        """A finite number within a range."""
        if not self.has(name):
            return default
        value = self.values[name]
        # A whole number may be too large for isfinite, which makes a float of it.
        real = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if isinstance(value, bool) or not real:
            raise self.wrong(name, "be a number", f"write for example {default}")
        assert isinstance(value, int | float)
        if not least <= value <= most:
            raise self.wrong(name, f"be from {least} to {most}", f"write for example {default}")
        return float(value)

    def refuse(self, name: str, *, neutral: Iterable[object], reason: str) -> None:
        """Refuses a field whose value asks for something that nobody would do.

        Args:
            name: Of the field.
            neutral: Values that ask for nothing.
            reason: Why, and what to do instead.
        """
        if not self.has(name):
            return
        value = self.values[name]
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            return
        raise ApiError(
            f"{self.called(name)} is not supported, got {self.shown(name)}: {reason}",
            param=self.called(name),
            code="unsupported_parameter",
        )

    def refuse_others(self, allowed: Iterable[str]) -> None:
        """Refuses a field that nobody has asked for and that is not allowed.

        Args:
            allowed: Names of fields that ask for nothing, whatever they hold.
        """
        for name in self.values:
            if name not in self.known and name not in allowed:
                close = difflib.get_close_matches(name, self.known, n=1)
                remedy = f"did you mean {close[0]}?" if close else "leave it out"
                raise ApiError(
                    f"unrecognized request argument: {self.called(name[:SHOWN_CHARACTERS])}; {remedy}",
                    param=self.called(name[:SHOWN_CHARACTERS]),
                    code="unknown_parameter",
                )

    def wrong(self, name: str, rule: str, remedy: str) -> ApiError:
        """The refusal of a value."""
        return ApiError(f"{self.called(name)} must {rule}, got {self.shown(name)}; {remedy}", param=self.called(name))

    def shown(self, name: str) -> str:
        """The value as a message shows it."""
        text = json.dumps(self.values[name])
        return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
