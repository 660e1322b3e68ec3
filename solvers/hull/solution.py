"""What a search over a hull answers, and what it tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..solution import Evidence, Status, TracePoint
from .domain import Floats


@dataclass(frozen=True)
class HullProgress:
    """The state after a node: nodes done and open, best value, bound, and seconds."""

    nodes: int
    open: int
    objective: float
    bound: float
    time: float


@dataclass(frozen=True)
class HullSolution:
    """A feasible point with its value and a bound on the optimum.

    Attributes
    ----------
    x
        Float64 ``[n]``, in the domain, whole where it must be.
    objective
        ``f(x)``.
    bound
        No feasible point has a smaller value; what that rests on is ``evidence``.
    status
        Why the search stopped.
    evidence
        What the bound rests on. GUARDED: rounding errors, of which there is a derived bound, are
        taken off (`Quadratic`, or a function that states its ``error``). CLAIMED: f states no
        rounding error, the domain's oracle is another solver with its tolerance, or
        ``strong_convexity`` is more than can be proven.
    stats
        ``nodes``, ``open``, ``depth``, ``lmo_calls``, ``heuristic_lmo_calls``,
        ``relaxed_lmo_calls``, ``iterations`` (of Frank-Wolfe), ``lazy`` (those without an oracle
        call), ``tightened_local`` and ``tightened_global`` (bounds), ``root_bound``,
        ``root_objective`` (best value after the root) and ``time``.
    trace
        Objective and bound over time; the one never rises, the other never falls.
    """

    x: Floats
    objective: float
    bound: float
    status: Status
    evidence: Evidence = Evidence.CLAIMED
    stats: dict[str, Any] = field(default_factory=dict)
    trace: tuple[TracePoint, ...] = ()

    @property
    def gap(self) -> float:
        """``(objective - bound) / |objective|``; 0 where they are equal."""
        difference = self.objective - self.bound
        if difference == 0:
            return 0.0
        return difference / abs(self.objective) if self.objective else float("inf")

    def __repr__(self) -> str:
        gap = f"gap {self.gap:.2%} ({self.evidence.label})"
        return (
            f"HullSolution(objective {self.objective:.6g}, bound {self.bound:.6g}, {gap}, "
            f"{self.stats.get('nodes', 0)} nodes, {self.status.name})"
        )
