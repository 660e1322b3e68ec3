"""The rounds of the dual ascent on one row: when to add cuts, and when to stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from ..clock import Clock
from ..estimates import eigen_seconds
from ..threads import one_blas_thread
from .cuts import Array
from .dual import DualAscent, Iterate, Multipliers
from .program import BinaryProgram
from .witness import Witness

_ITERATIONS = 30
_THRESHOLD = 1e-3
_STALL_ROUNDS = 6
_TRIANGLE_EVERY = 2
THREADS_PAY_FROM = 600
"""Inputs from which BLAS threads gain more than solving rows side by side."""


@dataclass(frozen=True)
class Effort:
    """How long the bound of a row is worked on.

    Attributes
    ----------
    max_rounds, clock
        Limits.
    least_gain
        Stop when six rounds close less than this share of the gap.
    triangles_above
        When that happens at a larger relative gap than this, triangle inequalities are added to
        the pairwise ones, and the ascent goes on until it stalls again.
    cuts
        Whether to add cuts at all; without, only the diagonal is improved.
    """

    max_rounds: int
    clock: Clock
    least_gain: float
    triangles_above: float
    cuts: bool = True


@dataclass(frozen=True)
class Bounded:
    """What the ascent found for a row, in the row's own units.

    Attributes
    ----------
    bound
        Proven by the witness.
    witness
        Of the best round.
    last
        Where the ascent ended; another may go on from here.
    relaxed
        Relaxed ``x`` (1 = pruned), ``[d]``.
    rounds, evaluations
        Counts.
    """

    bound: float
    witness: Witness
    last: Iterate
    relaxed: Array
    rounds: int
    evaluations: int


def strengthen(
    program: BinaryProgram,
    incumbent: float,
    effort: Effort,
    *,
    rel_gap: float,
    relaxed: Array | None = None,
    improved: Callable[[Array], float] | None = None,
) -> Bounded:
    """Raise the bound of a row until it meets the incumbent, stalls, or a limit is hit.

    Parameters
    ----------
    program
        The row, in any units.
    incumbent
        Loss of the best ``x`` known.
    effort
        Limits.
    rel_gap
        Stop when ``incumbent - bound <= rel_gap * |incumbent|``.
    relaxed
        Where the plain relaxation is about least, ``[d]``: the bound is no worse than what that
        proves. None for the mean of all allowed x.
    improved
        Given the relaxed ``x`` after each round, a primal heuristic that returns the incumbent.
    """
    size = program.size
    if size == 0:
        at = Iterate.zero(program.inputs)
        witness = Witness.of(program, at.multipliers)
        return Bounded(program.constant, witness, at, program.centre(), 0, 0)
    found = ascend(
        program.scaled(1 / size),
        incumbent / size,
        effort,
        rel_gap=rel_gap,
        relaxed=relaxed,
        improved=None if improved is None else lambda x: improved(x) / size,
    )
    witness = Witness.of(program, found.witness.multipliers.scaled(size))
    return replace(found, bound=witness.bound(program), witness=witness)


def ascend(
    program: BinaryProgram,
    incumbent: float,
    effort: Effort,
    *,
    rel_gap: float,
    start: Iterate | None = None,
    relaxed: Array | None = None,
    improved: Callable[[Array], float] | None = None,
) -> Bounded:
    """`strengthen` for a program whose losses are of the order of 1, also from a warm start."""
    with _blas_threads(program.inputs):
        return _ascend(program, incumbent, effort, rel_gap, start, relaxed, improved)


def _ascend(
    program: BinaryProgram,
    target: float,
    effort: Effort,
    rel_gap: float,
    start: Iterate | None,
    relaxed: Array | None,
    improved: Callable[[Array], float] | None,
) -> Bounded:
    warm = start is not None
    first = program.centre() if relaxed is None else relaxed
    start = start or Iterate.zero(program.inputs)
    ascent = DualAscent(program, start)
    known = start.multipliers if warm else Multipliers.of_relaxation(program, first)
    best = Witness.of(program, known) if warm else Witness.near(program, known)
    best_bound = best.bound(program)
    scale = 0.1 / (program.inputs * (1 + program.ones))
    gaps: list[float] = []
    rounds = 0
    triangles = start.multipliers.cuts.has_triangles

    def over() -> bool:
        small = target - best_bound <= rel_gap * abs(target)
        # A round needs three decompositions at least.
        late = effort.clock.remaining < 3 * eigen_seconds(program.inputs)
        return small or late or rounds >= effort.max_rounds or effort.clock.expired

    while not over():
        early = 0.0 if warm else 3 * 0.95**rounds
        ascent.ascend(scale * max(0.5, early), _ITERATIONS, effort.clock)
        rounds += 1
        witness = Witness.of(program, ascent.at.multipliers)
        if (bound := witness.bound(program)) > best_bound:
            best_bound, best = bound, witness
        if improved is not None:
            target = min(target, improved(ascent.at.relaxed))
        if over():
            break
        gaps.append(target - best_bound)
        stalled = len(gaps) > _STALL_ROUNDS
        if stalled and gaps[-1] > (1 - effort.least_gain) * gaps[-1 - _STALL_ROUNDS]:
            if triangles or not effort.cuts or gaps[-1] <= effort.triangles_above * abs(target):
                break
            triangles = True
            gaps.clear()
        if effort.cuts:
            with_triangles = triangles and rounds % _TRIANGLE_EVERY == 0
            ascent.add_cuts(10 * program.inputs, _THRESHOLD, with_triangles)
    x = ascent.at.relaxed if rounds or warm else first
    return Bounded(best_bound, best, ascent.at, x, rounds, ascent.evaluations)


def _blas_threads(inputs: int) -> AbstractContextManager[object]:
    """One BLAS thread where more would only wait for each other."""
    return nullcontext() if inputs >= THREADS_PAY_FROM else one_blas_thread()
