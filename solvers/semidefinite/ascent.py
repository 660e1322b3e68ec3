"""The rounds of the dual ascent on one row: when to add cuts, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from .cuts import Array
from .dual import DualAscent, Multipliers
from .program import BinaryProgram
from .witness import Witness

_ITERATIONS = 30
_THRESHOLD = 1e-3
_STALL_ROUNDS = 6
_TRIANGLE_EVERY = 2
THREADS_PAY_FROM = 600
"""Inputs from which BLAS threads gain more than solving rows side by side."""


@dataclass(frozen=True)
class Bounded:
    """What the ascent found for a row, in the row's own units.

    Attributes
    ----------
    bound
        Proven by the witness.
    witness
        Of the best round.
    relaxed
        Relaxed ``x`` (1 = pruned), ``[d]``.
    rounds, evaluations, cuts
        Counts.
    """

    bound: float
    witness: Witness
    relaxed: Array
    rounds: int
    evaluations: int
    cuts: int


def strengthen(
    program: BinaryProgram,
    incumbent: float,
    *,
    rel_gap: float,
    max_rounds: int,
    seconds: float,
    least_gain: float,
    triangles_above: float,
    improved: Callable[[Array], float] | None = None,
) -> Bounded:
    """Raise the bound of a row until it meets the incumbent, stalls, or a limit is hit.

    Parameters
    ----------
    program
        The row.
    incumbent
        Loss of the best ``x`` known.
    rel_gap
        Stop when ``incumbent - bound <= rel_gap * |incumbent|``.
    max_rounds, seconds
        Limits; at least one round is made.
    least_gain
        Stop when six rounds close less than this share of the gap.
    triangles_above
        When that happens at a larger relative gap than this, triangle inequalities are added to
        the pairwise ones, and the ascent goes on until it stalls again.
    improved
        Given the relaxed ``x`` after each round, a primal heuristic that returns the incumbent.
    """
    with _blas_threads(program.inputs):
        return _strengthen(
            program, incumbent, rel_gap, max_rounds, seconds, least_gain, triangles_above, improved
        )


def _strengthen(
    program: BinaryProgram,
    incumbent: float,
    rel_gap: float,
    max_rounds: int,
    seconds: float,
    least_gain: float,
    triangles_above: float,
    improved: Callable[[Array], float] | None,
) -> Bounded:
    began = time.perf_counter()
    size = program.size
    if size == 0:
        zero = Multipliers.zero(program.inputs)
        witness = Witness.of(program, zero)
        relaxed = program.pruned[program.cell] / np.bincount(program.cell)[program.cell]
        return Bounded(0.0, witness, relaxed, 0, 0, 0)
    scaled = program.scaled(1 / size)
    target = incumbent / size
    ascent = DualAscent(scaled)
    scale = 0.1 / (program.inputs * (1 + program.ones))
    best_bound, best = -np.inf, Multipliers.zero(program.inputs)
    gaps: list[float] = []
    rounds, triangles = 0, False
    while rounds < max_rounds:
        ascent.ascend(scale * max(0.5, 3 * 0.95**rounds), _ITERATIONS)
        rounds += 1
        bound = Witness.of(scaled, ascent.multipliers).bound(scaled)
        if bound > best_bound:
            best_bound, best = bound, ascent.multipliers
        if improved is not None:
            target = min(target, improved(ascent.relaxed) / size)
        if target - best_bound <= rel_gap * abs(target):
            break
        if time.perf_counter() - began >= seconds:
            break
        gaps.append(target - best_bound)
        if len(gaps) > _STALL_ROUNDS and gaps[-1] > (1 - least_gain) * gaps[-1 - _STALL_ROUNDS]:
            if triangles or gaps[-1] <= triangles_above * abs(target):
                break
            triangles = True
            gaps.clear()
        with_triangles = triangles and rounds % _TRIANGLE_EVERY == 0
        ascent.add_cuts(10 * program.inputs, _THRESHOLD, with_triangles)
    witness = Witness.of(program, best.scaled(size))
    return Bounded(
        bound=witness.bound(program),
        witness=witness,
        relaxed=ascent.relaxed.copy(),
        rounds=rounds,
        evaluations=ascent.evaluations,
        cuts=len(best.cuts),
    )


def _blas_threads(inputs: int) -> AbstractContextManager[object]:
    """One BLAS thread where more would only wait for each other."""
    from threadpoolctl import threadpool_limits

    return nullcontext() if inputs >= THREADS_PAY_FROM else threadpool_limits(1, user_api="blas")
