"""What a field of a configuration may hold, and how a value that it may not hold is refused.

Decides: which values fit an annotation (`fitting_value`), for dataclasses and experiment files alike, and
the form of every refusal: name, rule, value, remedy. Does not know: any particular field, files, flags.
A bool is no integer here, a float is no integer, an integer is a number.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Scalar = bool | int | float | str
FieldValue = Scalar | tuple[Scalar, ...] | None


def require(holds: bool, name: str, *, rule: str, value: object, remedy: str) -> None:
    """Refuses a value that breaks a rule.

    Args:
        holds: Whether the rule holds.
        name: Of the field.
        rule: What the field must do, for example "be at least 1".
        value: What it got.
        remedy: What to do, for example "use 8".

    Raises:
        ValueError: The rule does not hold.
    """
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value!r}; {remedy}")


def require_at_least(least: int | float, name: str, *, value: int | float | None, remedy: str) -> None:
    """Refuses a number below `least`; None passes.

    Raises:
        ValueError: The number is smaller.
    """
    require(value is None or value >= least, name, rule=f"be at least {least}", value=value, remedy=remedy)


def require_above_zero(name: str, *, value: float | None, remedy: str) -> None:
    """Refuses zero and negative numbers; None passes.

    Raises:
        ValueError: The number is not above 0.
    """
    require(value is None or value > 0, name, rule="be above 0", value=value, remedy=remedy)


def check_types(instance: DataclassInstance) -> None:
    """Refuses an instance with a field whose value does not fit its annotation.

    Args:
        instance: A dataclass whose fields are scalars, choices, tuples of them, or None.

    Raises:
        TypeError: A field holds a value of another type.
        ValueError: A field holds none of its choices, or a number that is not finite.
    """
    annotations = get_type_hints(type(instance))
    for field in fields(instance):
        fitting_value(field.name, getattr(instance, field.name), annotation=annotations[field.name])


def fitting_value(name: str, value: object, *, annotation: object) -> FieldValue:
    """The value as a field with this annotation holds it: lists become tuples, integers in a float field floats.

    Args:
        name: Of the field, for the message.
        value: From a file, a caller or a flag.
        annotation: bool, int, float, str, a Literal of strings, a tuple[X, ...] of one of them, or X | None.

    Raises:
        TypeError: The value is of another type.
        ValueError: The value is none of the choices, or a number that is not finite.
    """
    alternatives = _alternatives(annotation)
    if value is None and type(None) in alternatives:
        return None
    (expected,) = (alternative for alternative in alternatives if alternative is not type(None))
    if get_origin(expected) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(_mismatch(name, value, expected))
        item = get_args(expected)[0]
        return tuple(_scalar(f"{name}[{index}]", entry, item) for index, entry in enumerate(value))
    return _scalar(name, value, expected)


def describe(annotation: object) -> str:
    """What a field with this annotation holds, in words."""
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    parts = []
    for alternative in _alternatives(annotation):
        if get_origin(alternative) is tuple:
            parts.append(f"a list, each item {describe(get_args(alternative)[0])}")
        elif get_origin(alternative) is Literal:
            parts.append(f"one of {_quoted(get_args(alternative))}")
        elif alternative is not type(None):
            parts.append(next(words for kind, words in names.items() if kind is alternative))
    return " or ".join(parts)


def _scalar(name: str, value: object, expected: object) -> Scalar:
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        if not isinstance(value, str):
            raise TypeError(_mismatch(name, value, expected))
        require(
            value in choices,
            name,
            rule=f"be one of {_quoted(choices)}",
            value=value,
            remedy="use one of these",
        )
        return value
    if expected is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(_mismatch(name, value, expected))
        require(math.isfinite(value), name, rule="be a finite number", value=value, remedy="write for example 1.0")
        return float(value)
    assert isinstance(expected, type)
    if not isinstance(value, bool | int | str) or type(value) is not expected:
        raise TypeError(_mismatch(name, value, expected))
    return value


def _alternatives(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _quoted(choices: Sequence[object]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _mismatch(name: str, value: object, expected: object) -> str:
    words = describe(expected)
    if expected is int and isinstance(value, float):
        remedy = "write it without a decimal point"
    elif expected is not str and get_origin(expected) is not Literal and isinstance(value, str):
        remedy = "write it without quotes"
    else:
        remedy = f"write {words}"
    return f"{name} must be {words}, got {value!r} ({type(value).__name__}); {remedy}"
