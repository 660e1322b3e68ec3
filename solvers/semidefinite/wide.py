"""Bounds of wide rows: many rows at once, without an eigenvalue decomposition.

`lowrank` finds cuts and multipliers for a batch of rows by products with the Gram matrix, `barrier`
makes each row's multipliers feasible, and a `Witness` proves what came out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..clock import Clock
from ..estimates import cholesky_seconds
from ..problem import MaskProblem
from .ascent import Bounded, Effort
from .barrier import feasible_lengths
from .cuts import FAMILIES
from .dual import Iterate, Multipliers, projected
from .lowrank import LowRank, Rows
from .program import BinaryProgram
from .witness import Witness

_LEAST_ITERATIONS = 20
_SIGMA = 12_000.0
"""Penalty of a cut at one input, in mean losses per input: measured, 32 at 384 and 8 at 1536."""
_SLACK = 5e-3
_PLAIN_ROUNDS = 2
_STALL_ROUNDS = 6
_NEWTON_STEPS = 12
_NEWTON_FACTORS = 6
"""What a Newton step costs, in Cholesky factorisations."""
_LAST_SHARES = (0.1, 0.4)
"""Least and most of the time that is kept for the Newton steps."""


@dataclass(frozen=True)
class Batch:
    """What was found for some rows.

    Attributes
    ----------
    bounded
        Per row; None where the time was up before.
    relaxed
        Relaxed x (1 = pruned), ``[rows, d]``.
    """

    bounded: list[Bounded | None]
    relaxed: Tensor


def strengthen_batch(
    problem: MaskProblem,
    pruned: Tensor,
    loss: Tensor,
    effort: Effort,
    end: Clock,
    *,
    rel_gap: float,
    seed: int = 0,
) -> Batch:
    """Bounds for all rows of a problem, solved side by side.

    Parameters
    ----------
    problem
        Rows that do not share a budget, on any device.
    pruned, loss
        The best x known, bool ``[rows, d]``, and what it costs, float64 ``[rows]``.
    effort
        Limits for all rows together, and when to stop: six rounds move no row's value by the
        least share of its gap. What was found is proven even when the clock has expired.
    end
        When this one has expired, nothing more is proven.
    rel_gap
        Newton steps end when what they can still gain is less than a tenth of this share of the
        loss (but not below 1e-4 of it).
    seed
        Of the vectors at the start.
    """
    rows = Rows.of(problem)
    count, d = rows.shape
    normals = rows.normals()
    first = _before_proofs(
        effort.clock, count * _NEWTON_STEPS * _NEWTON_FACTORS * cholesky_seconds(d)
    )
    search = LowRank(rows, pruned, loss / rows.size, rank_for(d), seed)
    rounds = _search(search, loss / rows.size, effort, first)
    found: list[Bounded | None] = []
    for row in range(count):
        turn = effort.clock.part(1 / (count - row))
        found.append(
            None if end.expired else _proven(problem, search, row, normals, rel_gap, turn, rounds)
        )
    return Batch(found, search.relaxed)


def _before_proofs(clock: Clock, newton: float) -> Clock:
    """The time left but for what the Newton steps need."""
    if math.isinf(clock.remaining):
        return clock
    least, most = (share * clock.remaining for share in _LAST_SHARES)
    return clock.part(1.0, clock.remaining - min(max(newton, least), most))


def _search(search: LowRank, target: Tensor, effort: Effort, clock: Clock) -> int:
    """Rounds of the low-rank method; how many."""
    search.slack = _SLACK
    d = search.rows.shape[1]
    values: list[Tensor] = []
    rounds = 0
    while rounds < effort.max_rounds and not clock.expired:
        search.round(max(_LEAST_ITERATIONS, d // 40), clock)
        rounds += 1
        values.append(search.value)
        if len(values) > _PLAIN_ROUNDS + _STALL_ROUNDS:
            moved = (values[-1] - values[-1 - _STALL_ROUNDS]).abs()
            if bool((moved <= effort.least_gain * (target - values[-1]).abs()).all()):
                break
        if rounds >= _PLAIN_ROUNDS and rounds < effort.max_rounds:
            search.sigma = min(32.0, _SIGMA / d) * search.unit
            search.separate(10 * d)
    return rounds


def rank_for(d: int) -> int:
    """Length of the vectors: more than a solution without cuts needs, and room for cuts."""
    return min(d + 1, 24 + math.ceil(math.sqrt(2 * d)))


def _proven(
    problem: MaskProblem,
    search: LowRank,
    row: int,
    normals: Tensor,
    rel_gap: float,
    clock: Clock,
    rounds: int,
) -> Bounded:
    """Multipliers of one row made feasible, and proven."""
    program = BinaryProgram.of(problem.rows([row]).to("cpu"))
    matrix = projected(search.products(row).cpu().numpy(), program.normals())
    if program.size == 0:
        zero = Multipliers.zero(program.inputs)
        at, x = Iterate(zero, matrix), program.centre()
        return Bounded(0.0, Witness.of(program, zero), at, x, rounds, search.evaluations)
    form, lengths, constant, cuts, multiplier = search.multipliers(row)
    feasible, _ = feasible_lengths(
        form,
        lengths,
        normals,
        tolerance=max(1e-4, 0.1 * rel_gap) * float(search.unit[row]) * len(lengths),
        steps=_NEWTON_STEPS,
        expired=lambda: clock.expired,
    )
    # D z_i^2 = D is 4 D x_i^2 = 4 D x_i in terms of x; the constants make up gamma.
    offset = float(feasible.sum()) + constant + float(FAMILIES[cuts.family, 6] @ multiplier)
    multipliers = Multipliers(offset, 4 * feasible[1:].cpu().numpy(), cuts, multiplier)
    witness = Witness.near(program, multipliers.scaled(float(search.rows.size[row])))
    return Bounded(
        bound=witness.bound(program),
        witness=witness,
        last=Iterate(multipliers, matrix),
        relaxed=matrix[0, 1:],
        rounds=rounds,
        evaluations=search.evaluations,
    )
