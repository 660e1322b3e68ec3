"""What a solver answers: a mask, what it costs, and how good it is known to be."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .certificate import Certificate


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
        Float64 ``[rows]``: no allowed mask of that row costs less; None if the solver gives none.
    status
        Why the solver stopped.
    solver
        Its name.
    stats
        Counts and times; each solver documents its own.
    trace
        Objective (and bound) over time, never rising.
    certificates
        Witnesses of the bounds that `solvers.certificate.check` verifies, one per row; empty if
        the solver gives none.
    """

    mask: Tensor
    objective: Tensor
    status: Status
    solver: str
    bound: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    trace: tuple[TracePoint, ...] = ()
    certificates: tuple[Certificate, ...] = ()

    @property
    def gap(self) -> Tensor | None:
        """``(objective - bound) / |objective|`` per row, float64; None without a bound."""
        if self.bound is None:
            return None
        difference = self.objective - self.bound
        return torch.where(difference == 0, 0.0, difference / self.objective.abs())

    def __repr__(self) -> str:
        rows, d = self.mask.shape
        gap = "" if self.gap is None else f", mean gap {float(self.gap.mean()):.2%}"
        return (
            f"MaskSolution({self.solver}, {rows} rows, {d} inputs, "
            f"objective {float(self.objective.sum()):.6g}{gap}, {self.status.name})"
        )


def shared_out(bound: float, objective: Tensor) -> Tensor:
    """A bound on the sum as bounds of rows, float64 ``[rows]``, none above its objective.

    For rows that are only bounded together: only the sum of these numbers means anything.
    """
    gap = max(0.0, float(objective.sum()) - bound)
    size = objective.abs()
    share = size / size.sum() if float(size.sum()) > 0 else torch.full_like(size, 1 / len(size))
    return objective - gap * share
