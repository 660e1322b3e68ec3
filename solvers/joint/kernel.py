"""Swaps on the least squares loss of one row, on the CPU (numba).

With ``H`` the damped Gram matrix, ``K`` the kept and ``P`` the pruned inputs, the row's state is
the symmetric matrix that sweeping ``H`` on ``K`` gives (Beaton, 1964; Goodnight, 1979):

    T_KK = -H_KK^-1,   T_KP = H_KK^-1 H_KP,   T_PP = H_PP - H_PK H_KK^-1 H_KP

With ``z = T_:P w_P`` the best weights are ``v_K = w_K + z_K``, the correlations of the pruned
inputs with what is missing are ``z_P``, and the loss is ``w_P^T z_P``. Pruning ``u`` and reviving
``p`` changes it, the weights made best again, by

    v_u^2 / s_u - (z_p + v_u T_up / s_u)^2 / (T_pp + T_up^2 / s_u),     s_u = -T_uu

and two sweeps bring ``T`` up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(nogil=True, cache=True, fastmath=_FAST)(function)


@_compiled
def _sweep(t: Array, k: int, sign: float) -> None:
    """Take ``k`` into the kept inputs (sign 1) or out of them (-1)."""
    d = len(t)
    pivot = 1 / t[k, k]
    column = t[k].copy()
    for i in range(d):
        if i != k:
            factor = column[i] * pivot
            row = t[i]
            for j in range(d):
                row[j] -= factor * column[j]
            row[k] = sign * factor
    for j in range(d):
        t[k, j] = sign * column[j] * pivot
    t[k, k] = -pivot


@_compiled
def _state(t: Array, w: Array, keep: Array, z: Array) -> float:
    """``z = T_:P w_P``; the loss."""
    z[:] = 0.0
    for p in range(len(w)):
        if not keep[p]:
            for i in range(len(w)):
                z[i] += w[p] * t[p, i]
    loss = 0.0
    for p in range(len(w)):
        if not keep[p]:
            loss += w[p] * z[p]
    return loss


@_compiled
def improve_row(
    t: Array, w: Array, keep: Array, width: int, candidates: int, max_swaps: int, tolerance: float
) -> int:
    """Swaps of one row until none improves; how many.

    ``t``, the matrix ``T``, and ``keep`` are changed in place. The ``candidates`` weights that are
    cheapest to prune are tried first, all weights when none of them can be exchanged for the
    better.
    """
    d = len(w)
    z = np.empty(d)
    price = np.empty(d)
    swaps = 0
    loss = _state(t, w, keep, z)
    while swaps < max_swaps:
        for j in range(d):
            price[j] = (w[j] + z[j]) ** 2 / -t[j, j] if keep[j] else np.inf
        order = np.argsort(price, kind="mergesort")
        least, best_u, best_p = -tolerance * loss, -1, -1
        for k in range(d):
            u = order[k]
            if not keep[u] or (k >= candidates and best_u >= 0):
                break
            inverse = -1 / t[u, u]
            share = (w[u] + z[u]) * inverse
            low = u - u % width
            for p in range(low, low + width):
                if not keep[p]:
                    reach = t[u, p]
                    rest = z[p] + share * reach
                    change = price[u] - rest * rest / (t[p, p] + reach * reach * inverse)
                    if change < least:
                        least, best_u, best_p = change, u, p
        if best_u < 0:
            break
        _sweep(t, best_u, -1.0)
        _sweep(t, best_p, 1.0)
        keep[best_u], keep[best_p] = False, True
        loss = _state(t, w, keep, z)
        swaps += 1
    return swaps
