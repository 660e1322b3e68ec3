"""Which fractional variable to split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .domain import Floats

Rule = Literal["most_infeasible", "strong", "pseudocost"]

RULES: tuple[Rule, ...] = ("most_infeasible", "strong", "pseudocost")

Trial: TypeAlias = Callable[[int], tuple[float, float]]
"""Bounds of the two children after a short run, for a variable."""

_CANDIDATES = 10
"""Variables that strong branching tries at a node, the most fractional ones."""

_RELIABLE = 2
"""Observations in each direction after which a pseudocost is believed."""


class Chooser(ABC):
    """A branching rule. ``fraction`` ``[n]`` is 0 where a variable is no candidate."""

    @abstractmethod
    def choose(self, x: Floats, fraction: Floats, bound: float, trial: Trial) -> int:
        """The variable to split at a node with this relaxed point and bound.

        Parameters
        ----------
        x
            Relaxed point, float64 ``[n]``.
        fraction
            Distance to the nearest whole number, float64 ``[n]``, some of it positive.
        bound
            The node's bound.
        trial
            Solves the children of a variable briefly.
        """

    def learn(self, variable: int, up: bool, distance: float, gain: float) -> None:  # noqa: B027
        """Hear that moving a variable by ``distance`` raised the bound by ``gain``."""


class MostInfeasible(Chooser):
    """The variable farthest from a whole number."""

    def choose(self, x: Floats, fraction: Floats, bound: float, trial: Trial) -> int:
        return int(fraction.argmax())


class Strong(Chooser):
    """The variable whose children, solved briefly, have the highest bounds (as a product)."""

    def choose(self, x: Floats, fraction: Floats, bound: float, trial: Trial) -> int:
        order = np.argsort(-fraction, kind="stable")[:_CANDIDATES]
        candidates = [int(j) for j in order if fraction[j] > 0]
        if len(candidates) == 1:
            return candidates[0]
        return max(candidates, key=lambda j: _score(*trial(j), bound))


class Pseudocost(Chooser):
    """The variable whose past splits raised bounds most, per unit moved.

    Until a variable was split often enough, the most fractional unknown one is taken.
    """

    def __init__(self, n: int) -> None:
        self._gain = np.zeros((2, n))
        self._count: npt.NDArray[np.int64] = np.zeros((2, n), dtype=np.int64)

    def choose(self, x: Floats, fraction: Floats, bound: float, trial: Trial) -> int:
        unknown = np.where(self._count.min(axis=0) < _RELIABLE, fraction, 0.0)
        if unknown.any():
            return int(unknown.argmax())
        down = x - np.floor(x)
        gain = self._gain / np.maximum(self._count, 1) * np.stack([down, 1 - down])
        score = np.maximum(gain, 1e-12).prod(axis=0)
        return int(np.where(fraction > 0, score, -1.0).argmax())

    def learn(self, variable: int, up: bool, distance: float, gain: float) -> None:
        self._gain[int(up), variable] += gain / distance
        self._count[int(up), variable] += 1


def chooser(rule: Rule, n: int) -> Chooser:
    """The rule of that name for ``n`` variables."""
    if rule == "pseudocost":
        return Pseudocost(n)
    return Strong() if rule == "strong" else MostInfeasible()


def _score(down: float, up: float, bound: float) -> float:
    return max(down - bound, 1e-12) * max(up - bound, 1e-12)
