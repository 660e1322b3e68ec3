"""What the options of `minimize` may be, checked in one place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ..arrays import short
from ..errors import InvalidInput
from .branching import RULES
from .domain import Domain
from .heuristics import HEURISTICS
from .node import VARIANTS

SELECTIONS: tuple[str, ...] = ("best_first", "depth_first")

_CHOICES: dict[str, tuple[str, ...]] = {
    "branching": RULES,
    "node_selection": SELECTIONS,
    "variant": VARIANTS,
}

_NUMBERS: dict[str, float] = {
    "rel_gap": 0.0,
    "abs_gap": 0.0,
    "lazy_tolerance": 1.0,
    "strong_convexity": 0.0,
    "node_gap": 0.0,
    "node_gap_decay": 0.0,
    "node_gap_floor": 0.0,
}
"""The least that each may be; finite."""

_COUNTS: dict[str, int] = {"node_iterations": 1, "store": 0, "node_limit": 1}
"""The least that each may be; whole, and None for no limit where that is a default."""

_FLAGS: tuple[str, ...] = ("lazy", "tightening", "hull", "verbose")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` for the first option that is not what it has to be."""
    for name, value in options.items():
        if name in _CHOICES:
            _check_choice(name, value, _CHOICES[name])
        elif name in _NUMBERS:
            _check_number(name, value, _NUMBERS[name])
        elif name in _COUNTS:
            _check_count(name, value, _COUNTS[name])
        elif name in _FLAGS:
            if not isinstance(value, (bool, np.bool_)):
                raise InvalidInput(f"{name}={value!r} must be True or False.")
        elif name == "heuristics":
            if isinstance(value, str) or not isinstance(value, Collection):
                raise InvalidInput(f"heuristics={value!r} must be a collection of names.")
            for one in value:
                _check_choice(name, one, HEURISTICS)
        elif value is not None and not callable(value):  # the callback
            raise InvalidInput(f"{name}={value!r} must be a function.")


def check_domain(domain: Domain) -> None:
    """Raise `InvalidInput` if an attribute of a domain is missing or of a wrong shape."""
    for name in ("n", "lower", "upper", "integer", "lmo"):
        if not hasattr(domain, name):
            raise InvalidInput(f"{type(domain).__name__} is no domain: it has no '{name}'.")
    _check_count("the domain's n", domain.n, 1)
    for name in ("lower", "upper", "integer"):
        shape = np.shape(getattr(domain, name))
        if shape != (domain.n,):
            raise InvalidInput(f"The domain's {name} has shape {shape}; it must be ({domain.n},).")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InvalidInput(f"{name} '{value}' is not one of {', '.join(choices)}.")


def _check_number(name: str, value: object, least: float) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    try:
        fits = real and least <= float(value) < math.inf  # type: ignore[arg-type]
    except OverflowError:
        fits = False
    if not fits:
        raise InvalidInput(f"{name}={short(value)} must be a finite number from {least:g} upwards.")


def _check_count(name: str, value: object, least: int) -> None:
    if value is None and name == "node_limit":
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if not whole or int(value) < least:  # type: ignore[call-overload]
        raise InvalidInput(f"{name}={short(value)} must be a whole number from {least} upwards.")
