"""Options of solvers: declared with their ranges, checked in one place.

Options are the fields of a frozen dataclass. A field's annotation says what it takes (a whole
number, a number, text, true or false, some names, or None besides); `option` adds the range.
`checked_options` converts what means the same, such as NumPy's numbers, and refuses the rest.
"""

from __future__ import annotations

import math
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from .arrays import short
from .errors import InvalidInput

T = TypeVar("T")

_LARGEST = 2**63 - 1
"""The largest whole number that compiled code takes."""

_RANGE = "range"


@dataclass(frozen=True)
class Range:
    """Which numbers an option takes; None where there is no end.

    Attributes
    ----------
    least, most
        Ends that are taken.
    above, below
        Ends that are not.
    infinite
        Whether infinity is taken.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            (self.infinite or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = (
            ("of at least", self.least),
            ("above", self.above),
            ("at most", self.most),
            ("below", self.below),
        )
        return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)


def option(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> T:
    """A dataclass field with a default and a `Range`."""
    limits = Range(least, most, above, below, infinite)
    # For a type checker the field has its default, which is what dataclasses make of it.
    return field(default=default, metadata={_RANGE: limits})


def checked_options(options: Any, whose: str) -> None:
    """Convert the fields of a frozen dataclass to their annotated types, in place.

    Parameters
    ----------
    options
        The dataclass.
    whose
        Whose options they are, as a sentence begins: "Solver 'swap'".

    Raises
    ------
    InvalidInput
        If a value is of another type or outside its range.
    """
    kind: Any = type(options)
    for name, check in _checks(kind).items():
        value = getattr(options, name)
        try:
            converted = check(value)
        except _Refused as refusal:
            raise InvalidInput(
                f"{whose}: option {name}={short(value)} must be {refusal}."
            ) from None
        object.__setattr__(options, name, converted)


def checked_seed(seed: Any) -> int:
    """A seed as an int, or `InvalidInput`: a whole number below 2^63, not negative.

    Every generator takes those: torch's, NumPy's, and modulo 2^31 SCIP's.
    """
    try:
        return _whole(seed, Range(least=0))
    except _Refused:
        raise InvalidInput(
            f"seed={short(seed)} must be a whole number of at least 0 and below 2**63."
        ) from None


def whole_number(value: Any, name: str, *, least: int | None = None) -> int:
    """A count as an int, or `InvalidInput`; for what is not an option of a solver."""
    return _named(_whole, value, name, Range(least=least))


def finite_number(
    value: Any, name: str, *, least: float | None = None, above: float | None = None
) -> float:
    """A number as a float, or `InvalidInput`; for what is not an option of a solver."""
    return _named(_number, value, name, Range(least=least, above=above))


def _named(convert: Callable[[Any, Range], T], value: Any, name: str, limits: Range) -> T:
    try:
        return convert(value, limits)
    except _Refused as refusal:
        raise InvalidInput(f"{name}={short(value)} must be {refusal}.") from None


class _Refused(Exception):
    """A value that an option does not take; the message says what it would take."""


@cache
def _checks(cls: type) -> dict[str, Callable[[Any], Any]]:
    """How each field is checked. Those of types that say nothing checkable are left out."""
    try:
        hints = get_type_hints(cls)
    except NameError:  # names that only a type checker knows
        return {}
    found = {}
    for each in fields(cls):
        check = _check_of(hints[each.name], each.metadata.get(_RANGE, Range()))
        if check is not None:
            found[each.name] = check
    return found


def _check_of(hint: Any, limits: Range) -> Callable[[Any], Any] | None:
    """What converts a value to an annotated type; None for types that are not checked."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        inner = _check_of(kinds[0], limits) if len(kinds) == 1 else None
        return None if inner is None else lambda value: _or_none(inner, value)
    if get_origin(hint) is Literal:
        return lambda value: _one_of(value, get_args(hint))
    if hint is int:
        return lambda value: _whole(value, limits)
    if hint is float:
        return lambda value: _number(value, limits)
    return {bool: _truth, str: _text}.get(hint)


def _or_none(check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return None if value is None else check(value)
    except _Refused as refusal:
        raise _Refused(f"{refusal}, or None") from None


def _one_of(value: Any, names: tuple[Any, ...]) -> str:
    if isinstance(value, str) and value in names:
        return str(value)
    raise _Refused(f"one of {', '.join(map(str, names))}")


def _whole(value: Any, limits: Range) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        number = operator.index(value)
        if abs(number) > _LARGEST:
            raise _Refused("a whole number below 2**63")
        if number in limits:
            return number
    raise _Refused(f"a whole number {limits}".rstrip())


def _number(value: Any, limits: Range) -> float:
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf if value > 0 else -math.inf
        if number in limits:
            return number
    kind = "a number" if limits.infinite else "a finite number"
    raise _Refused(f"{kind} {limits}".rstrip())


def _truth(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise _Refused("true or false")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    raise _Refused("text")
