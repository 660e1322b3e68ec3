"""What a solver answers: a mask, what it costs, and how good it is known to be."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .certificate import Certificate

ABSOLUTE_GAP = 1e-9
"""Share of a mask's scale (`MaskProblem.scale`) below which objective and bound count as equal.

That is of what removing each of its weights alone would cost: losses that anyone prunes for are a
thousandth of it and more, and the rounding guards of bounds are smaller at some hundred inputs.
"""


class Status(enum.Enum):
    """Why a solver stopped, with the sentence that says it."""

    FEASIBLE = "An allowed mask; nothing is claimed about its quality."
    LOCAL_OPTIMUM = "No 1-swap improves the mask, checked in float64."
    OPTIMAL = "The mask is optimal within the tolerance asked for."
    TIME_LIMIT = "The time limit was reached; the mask is the best found."
    ITERATION_LIMIT = "The iteration limit was reached; the mask is the best found."

    @property
    def message(self) -> str:
        """One sentence for people."""
        return str(self.value)


class Evidence(enum.Enum):
    """What a bound rests on, the strongest first."""

    CERTIFIED = "A witness that code apart from the solvers verifies."
    GUARDED = "Derived in floating point, less a rounding error that is derived too."
    CLAIMED = "Another program's word, with its tolerances."

    @property
    def message(self) -> str:
        """One sentence for people."""
        return str(self.value)

    @property
    def label(self) -> str:
        """One word: certified, guarded or claimed."""
        return self.name.lower()

    @classmethod
    def weakest(cls, *several: Evidence) -> Evidence:
        """What a sum of bounds rests on."""
        order = list(cls)
        return max(several, key=order.index)


@dataclass(frozen=True)
class TracePoint:
    """The state of a search at one moment: seconds since its start, and summed values."""

    time: float
    objective: float
    bound: float | None = None


@dataclass(frozen=True)
class MaskSolution:
    """A mask with its exact cost.

    Attributes
    ----------
    mask
        Bool ``[rows, d]``, True = keep.
    objective
        Float64 ``[rows]``, recomputed by the problem, never taken from the solver.
    bound
        Float64 ``[rows]``: no allowed mask of that row costs less. Where the rows share a budget
        there is one number for all of them, ``[1]``: no allowed mask of the layer costs less in
        all. None if the solver gives none.
    evidence
        What the bound rests on (the weakest of the rows'); None without a bound.
    scale
        Float64, shaped like ``bound``: what "equal" is measured against, `MaskProblem.scale` of the
        mask.
        None without a bound.
    status
        Why the solver stopped.
    solver
        Its name.
    stats
        Counts and times; each solver documents its own.
    trace
        Objective (and bound) over time, never rising.
    certificates
        Witnesses that `solvers.certificate.check` verifies, at most one per row, each of a bound
        of its own: that of the row where the evidence is `Evidence.CERTIFIED`. Empty if the
        solver gives none.
    """

    mask: Tensor
    objective: Tensor
    status: Status
    solver: str
    bound: Tensor | None = None
    evidence: Evidence | None = None
    scale: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    trace: tuple[TracePoint, ...] = ()
    certificates: tuple[Certificate, ...] = ()

    @property
    def gap(self) -> Tensor | None:
        """``(objective - bound) / |objective|``, float64, shaped like ``bound``; None without.

        0 where the two differ by less than `ABSOLUTE_GAP` of the scale; else infinite where the
        objective is 0 and the bound is not.
        """
        if self.bound is None:
            return None
        objective = self.objective
        if len(self.bound) != len(objective):
            objective = objective.sum().reshape(1)
        return relative_gap(objective, self.bound, self.scale)

    def __repr__(self) -> str:
        rows, d = self.mask.shape
        gap = ""
        if self.gap is not None and self.evidence is not None:
            gap = f", mean gap {float(self.gap.mean()):.2%} ({self.evidence.label})"
        return (
            f"MaskSolution({self.solver}, {rows} rows, {d} inputs, "
            f"objective {float(self.objective.sum()):.6g}{gap}, {self.status.name})"
        )


def relative_gap(objective: Tensor, bound: Tensor, scale: Tensor | None = None) -> Tensor:
    """``(objective - bound) / |objective|``, 0 where they agree up to `ABSOLUTE_GAP` of the scale.

    All float64 of one shape.
    """
    difference = objective - bound
    noise = 0.0 if scale is None else ABSOLUTE_GAP * scale
    return torch.where(difference.abs() <= noise, 0.0, difference / objective.abs())


def is_closed(objective: Tensor, bound: Tensor, scale: Tensor, rel_gap: float) -> Tensor:
    """Where objective and bound are as near as asked for, or cannot be told apart; bool."""
    tolerance = torch.maximum(rel_gap * objective.abs(), ABSOLUTE_GAP * scale)
    return objective - bound <= tolerance
