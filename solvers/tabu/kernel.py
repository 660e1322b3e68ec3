"""Tabu search over swaps, row by row, on the CPU (numba).

A move prunes a kept ``u`` and revives a pruned ``p``; its change of the loss is that of
`swap.rows`. Each iteration makes the best move found, even if it raises the loss, and forbids for
a while to undo it; a forbidden move is made all the same if it leads below the best loss so far
(aspiration; Glover, 1989). Of all moves those are looked at whose ``u`` is among the cheapest to
prune: for a row with ``d`` inputs an iteration costs ``O(candidates * d)``, not ``O(d^2)``.

After ``stall`` iterations without a new best loss a row goes back to its best mask, or half way
between it and a mask that it was at before (path relinking), and some random swaps away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
_BIG = 1e30
_DRIFT = 1e3
"""Rounding errors of so many moves: a new best loss must be lower by more."""


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(nogil=True, cache=True, fastmath=_FAST)(function)


@_compiled
def _random(state: Array, below: int) -> int:
    """A random number in 0..below-1 (xorshift)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return int(x >> np.uint64(11)) % below


@_compiled
def _pick(state: Array, keep: Array, low: int, high: int, wanted: bool) -> int:
    """A random index in low..high-1 whose entry is ``wanted``; -1 if none is found soon."""
    for _ in range(64):
        j = low + _random(state, high - low)
        if keep[j] == wanted:
            return int(j)
    return -1


@_compiled
def _correlation(w: Array, keep: Array, gram: Array, c: Array) -> None:
    """``c = G q`` with ``q = w`` where pruned."""
    c[:] = 0.0
    for j in range(len(w)):
        if not keep[j]:
            for i in range(len(w)):
                c[i] += w[j] * gram[j, i]


@_compiled
def _loss(w: Array, linear: Array, keep: Array, c: Array) -> float:
    value = 0.0
    for j in range(len(w)):
        if not keep[j]:
            value += w[j] * c[j] + linear[j]
    return value


@_compiled
def search_row(
    w: Array,
    linear: Array,
    gram: Array,
    noise: float,
    keep: Array,
    best: Array,
    elite: Array,
    stamp: Array,
    counters: Array,
    state: Array,
    width: int,
    candidates: int,
    tenure: int,
    stall: int,
    iterations: int,
) -> float:
    """Some iterations of one row; the best loss.

    ``keep`` (current mask), ``best``, ``elite`` (the mask a restart last ended at), ``stamp``
    (iteration until which an index must not move), ``counters`` (iteration, iterations without a
    new best loss, restarts) and ``state`` carry the search on from call to call.
    """
    d = len(w)
    c = np.empty(d)
    cost = np.empty(d)
    chosen = np.empty(candidates, np.int64)
    price = np.empty(candidates)
    _correlation(w, best, gram, c)
    best_value: float = _loss(w, linear, best, c)
    _correlation(w, keep, gram, c)
    value = _loss(w, linear, keep, c)
    slack = _DRIFT * noise
    for _ in range(iterations):
        counters[0] += 1
        now = counters[0]
        aspire = best_value - slack - value
        for j in range(d):
            sign = 1.0 if keep[j] else -1.0
            cost[j] = sign * (2 * w[j] * c[j] + linear[j]) + w[j] * w[j] * gram[j, j]
        # The cheapest weights to prune; forbidden ones only if they could lead to a new best.
        count = 0
        for j in range(d):
            if keep[j] and stamp[j] < now and (count < candidates or cost[j] < price[count - 1]):
                at = count if count < candidates else candidates - 1
                while at > 0 and price[at - 1] > cost[j]:
                    price[at], chosen[at] = price[at - 1], chosen[at - 1]
                    at -= 1
                price[at], chosen[at] = cost[j], j
                if count < candidates:
                    count += 1
        least, u, p = _BIG, -1, -1
        for k in range(count):
            j = chosen[k]
            twice = 2 * w[j]
            low = j - j % width
            for i in range(low, low + width):
                if not keep[i]:
                    change = price[k] + cost[i] - twice * (w[i] * gram[j, i])
                    if change < least and (stamp[i] < now or change < aspire):
                        least, u, p = change, j, i
        if u < 0:
            counters[1] = stall  # every move is forbidden: go elsewhere
        else:
            keep[u], keep[p] = False, True
            for i in range(d):
                c[i] += w[u] * gram[u, i] - w[p] * gram[p, i]
            value += least
            stamp[u] = now + tenure + _random(state, tenure + 1)
            stamp[p] = now + tenure + _random(state, tenure + 1)
            counters[1] += 1
            if value < best_value - slack:
                best_value = value
                best[:] = keep
                counters[1] = 0
        if counters[1] >= stall:
            counters[1] = 0
            counters[2] += 1
            for j in range(d):
                other = elite[j]
                elite[j] = keep[j]
                keep[j] = best[j]
                stamp[j] = 0
                cost[j] = 1.0 if other != best[j] else 0.0
            if counters[2] % 2 == 0:
                _relink(state, keep, cost, width)
            shakes = 2 + _random(state, 1 + d // 16)
            for _ in range(shakes):
                j = _random(state, d)
                low = j - j % width
                i = _pick(state, keep, low, low + width, not keep[j])
                if i >= 0:
                    keep[i], keep[j] = keep[j], keep[i]
            _correlation(w, keep, gram, c)
            value = _loss(w, linear, keep, c)
    return best_value


@_compiled
def _relink(state: Array, keep: Array, differs: Array, width: int) -> None:
    """Swap about half of the pairs in which two masks differ, block by block."""
    for low in range(0, len(keep), width):
        p = low
        for u in range(low, low + width):
            if keep[u] and differs[u] == 1.0:
                while p < low + width and (keep[p] or differs[p] != 1.0):
                    p += 1
                if p == low + width:
                    break
                differs[p] = 0.0
                differs[u] = 0.0
                if _random(state, 2) == 0:
                    keep[u], keep[p] = False, True
                p += 1
