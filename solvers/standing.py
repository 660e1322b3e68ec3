"""What a bounding search knows so far: masks, bounds and what these rest on.

Every search that gives bounds begins with what is nearly free: the relaxation's optimum by
Frank-Wolfe, a bound on every row or on the layer, and masks from its rounding and from swaps.
However short the time, its answer is no worse than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .certificate import Certificate
from .clock import Clock
from .frank_wolfe.solver import relax
from .pattern import CellPattern
from .problem import MaskProblem
from .saliency import Wanda
from .solution import ABSOLUTE_GAP, Evidence, Status, TracePoint, is_closed
from .solver import Outcome, Progress, Search
from .swap import Swap
from .trivial import trivial_bound

Array = npt.NDArray[Any]

_SECONDS = 0.08 / 96**2
"""Per weight squared, the time in which the bound of a unit rises about as fast as ever.

Measured at 96 inputs: in half of it next to nothing happens, after three times of it most is done.
"""


def least_seconds(weights: int) -> float:
    """What a unit of so many weights gets at least, in a search that has too little for all.

    An equal share of too little time raises no bound at all; so some units are bounded well and
    the rest has the bounds that are free. With more time there are more of them, whereas equal
    shares let a search end with a larger gap after 1 s than after 0.3 s.
    """
    return _SECONDS * weights**2


class Standing:
    """Best masks and best bounds of a problem's rows.

    A *unit* is what has a bound of its own: a row, or all rows where they share a budget.

    Attributes
    ----------
    problem, clock
        Of the search.
    mask, objective
        Bool ``[rows, d]``, float64 ``[rows]``.
    bound, evidence
        Float64 ``[units]``, and what each rests on.
    relaxed
        The relaxation's optimum, nearly: float64 ``[rows, d]``, 1 = pruned. A mask's, where the
        pattern has no cells.
    certificates
        By row, the best of each; where a bound has no witness, it may prove less than that.
    """

    def __init__(self, search: Search) -> None:
        self.problem, self.clock = search.problem, search.clock
        self._callback = search.callback
        self.trace: list[TracePoint] = []
        if search.start is not None:
            self.mask, self.objective = search.start.clone(), search.start_objective.clone()
            self.note()
        self.certificates: dict[int, Certificate] = {}
        if isinstance(self.problem.pattern, CellPattern):
            first, self.relaxed, self.bound = self._relaxation(search)
        else:  # every call of the oracle is a mixed-integer program
            first = self.problem.pattern.lmo(-Wanda().score(self.problem))
            self.bound = trivial_bound(self.problem)
            self.relaxed = (~first).double()
        self.evidence = [Evidence.GUARDED] * len(self.bound)
        if search.start is None:
            self.mask, self.objective = first, self.problem.objective(first)
        else:
            self.offer(slice(None), first)
        self.note()
        if isinstance(self.problem.pattern, CellPattern):
            for start in (search.start, first):
                if start is not None and not self.clock.expired:
                    swapped = Swap().solve(self.problem, start=start, time_limit=self.clock.limit)
                    self.offer(slice(None), swapped.mask)
            self.note()

    def _relaxation(self, search: Search) -> tuple[Tensor, Tensor, Tensor]:
        """A rounded mask, the relaxed x, and the bound of each unit."""
        outcome, z = relax(self.problem, search.start, self.clock)
        assert outcome.bound is not None
        bound = torch.maximum(outcome.bound, trivial_bound(self.problem))
        return outcome.mask, 1.0 - z, bound

    @property
    def coupled(self) -> bool:
        """Whether all rows are one unit."""
        return self.problem.pattern.coupled

    @property
    def units(self) -> list[list[int]]:
        """Rows of each unit."""
        rows = range(self.problem.shape[0])
        return [list(rows)] if self.coupled else [[row] for row in rows]

    @property
    def scale(self) -> Tensor:
        """`MaskProblem.scale` of each unit's mask, float64 ``[units]``."""
        return self._by_unit(self.problem.scale(self.mask))

    @property
    def total(self) -> float:
        """Summed objective."""
        return float(self.objective.sum())

    def closed(self, rel_gap: float) -> Tensor:
        """Units whose gap is as small as asked for, bool ``[units]``."""
        return is_closed(self._by_unit(self.objective), self.bound, self.scale, rel_gap)

    def offer(self, rows: Sequence[int] | slice, mask: Tensor) -> None:
        """Take over masks (bool ``[some rows, d]``) where they are better."""
        part = self.problem.rows(rows)
        objective = part.objective(mask)
        better = objective < self.objective[rows]
        if self.coupled:
            better = (objective.sum() < self.objective[rows].sum()).expand_as(better)
        self.mask[rows] = mask.where(better[:, None], self.mask[rows])
        self.objective[rows] = torch.where(better, objective, self.objective[rows])

    def raise_bound(
        self, unit: int, bound: float, evidence: Evidence, certificates: Sequence[Certificate] = ()
    ) -> None:
        """Take over a bound that is higher, or as high up to rounding and rests on more."""
        old, noise = float(self.bound[unit]), ABSOLUTE_GAP * float(self.scale[unit])
        stronger = evidence is not self.evidence[unit] and (
            Evidence.weakest(evidence, self.evidence[unit]) is self.evidence[unit]
        )
        if bound > old or (stronger and bound >= old - noise):
            self.bound[unit], self.evidence[unit] = bound, evidence
        self.certificates.update({one.row: one for one in certificates})

    def note(self, done: int = 0) -> None:
        """Add to the trace, and tell whoever listens that some rows are done."""
        self.trace.append(TracePoint(self.clock.seconds, self.total))
        if done and self._callback is not None:
            self._callback(Progress(done, len(self.mask), self.clock.seconds))

    def outcome(self, status: Status, stats: dict[str, Any]) -> Outcome:
        """The answer; a certificate holds the mask that was found."""
        end = TracePoint(self.clock.seconds, self.total, float(self.bound.sum()))
        return Outcome(
            mask=self.mask,
            status=Status.TIME_LIMIT if self.clock.expired else status,
            bound=self.bound,
            evidence=Evidence.weakest(*self.evidence),
            stats=stats,
            trace=[*self.trace[:-1], end],
            certificates=[self.certificates[row] for row in sorted(self.certificates)],
        )

    def _by_unit(self, values: Tensor) -> Tensor:
        return values.sum().reshape(1) if self.coupled else values


class Incumbent:
    """Best mask of some rows, improved by rounding relaxed points and swapping from there.

    Attributes
    ----------
    problem
        The rows.
    mask, objective
        Of the best mask so far: bool ``[rows, d]``, float64 ``[rows]``.
    """

    def __init__(self, problem: MaskProblem, mask: Tensor, clock: Clock | None = None) -> None:
        self.problem, self.mask = problem, mask
        self.objective = problem.objective(mask)
        self._clock = clock or Clock()
        self._tried: set[bytes] = set()

    @property
    def total(self) -> float:
        """Summed objective."""
        return float(self.objective.sum())

    def improve(self, relaxed: Array) -> float:
        """Round a relaxed ``x`` (1 = pruned, flat), swap, and return the best total so far."""
        kept = torch.from_numpy(1.0 - relaxed).view(self.problem.shape).to(self.problem.device)
        start = self.problem.pattern.round(kept)
        key = np.packbits(start.cpu().numpy()).tobytes()
        if key not in self._tried and not self._clock.expired:
            self._tried.add(key)
            swap = Swap(dtype="float64")
            solution = swap.solve(self.problem, start=start, time_limit=self._clock.limit)
            if float(solution.objective.sum()) < self.total:
                self.mask, self.objective = solution.mask, solution.objective
        return self.total
