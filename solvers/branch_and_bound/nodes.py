"""Relaxations of many branch-and-bound nodes at once, by pairwise Frank-Wolfe steps (numba).

A node is a row with its own bounds. Its relaxation minimises a convex form over the relaxed
masks within bounds; a step moves weight between two inputs of one cell, along an edge of the
polytope, which is the difference of two neighbouring vertices (a pairwise Frank-Wolfe step that
needs no active set, after Garber and Meshi 2016). The bound is the Frank-Wolfe one, from the
bounded oracle at the last gradient: valid at any accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from ..semidefinite.cuts import Array
from .state import FREE, ONE, ZERO

_FAST = {"nsz", "contract", "reassoc"}
_CHECK_EVERY = 24
_ROUNDING = 2.0**-51
"""Four units of roundoff: see `solve_nodes`."""


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(nogil=True, cache=True, fastmath=_FAST)(function)


@_compiled
def _repair(x: Array, state: Array, cell_start: Array, pruned: Array) -> bool:
    """Put x within its bounds and restore every cell's sum; False if that is impossible."""
    for g in range(len(pruned)):
        low, high = cell_start[g], cell_start[g + 1]
        total, room_up, room_down = 0.0, 0.0, 0.0
        for j in range(low, high):
            if state[j] == ZERO:
                x[j] = 0.0
            elif state[j] == ONE:
                x[j] = 1.0
            else:
                x[j] = min(1.0, max(0.0, x[j]))
                room_up += 1.0 - x[j]
                room_down += x[j]
            total += x[j]
        missing = pruned[g] - total
        if missing > room_up + 1e-9 or -missing > room_down + 1e-9:
            return False
        if missing > 0.0 and room_up > 0.0:
            share = min(1.0, missing / room_up)
            for j in range(low, high):
                if state[j] == FREE:
                    x[j] += share * (1.0 - x[j])
        elif missing < 0.0 and room_down > 0.0:
            share = min(1.0, -missing / room_down)
            for j in range(low, high):
                if state[j] == FREE:
                    x[j] -= share * x[j]
    return True


@_compiled
def _oracle_value(
    gradient: Array, state: Array, cell_start: Array, pruned: Array, inside: Array, outside: Array
) -> float:
    """Least ``gradient . v`` over the vertices within bounds.

    Per cell, ``inside`` becomes the largest chosen free gradient and ``outside`` the smallest
    one that is not chosen (infinite where there is none).
    """
    value = 0.0
    for g in range(len(pruned)):
        low, high = cell_start[g], cell_start[g + 1]
        free = np.empty(high - low)
        n, left = 0, pruned[g]
        for j in range(low, high):
            if state[j] == ONE:
                value += gradient[j]
                left -= 1
            elif state[j] == FREE:
                free[n] = gradient[j]
                n += 1
        ordered = np.sort(free[:n])
        for k in range(left):
            value += ordered[k]
        inside[g] = ordered[left - 1] if left > 0 else -np.inf
        outside[g] = ordered[left] if left < n else np.inf
    return value


@_compiled
def solve_nodes(
    quadratic: Array,
    linear: Array,
    constant: float,
    cell_start: Array,
    pruned: Array,
    state: Array,
    x: Array,
    bound: Array,
    cutoff: float,
    tolerance: Array,
    magnitude: float,
    max_steps: int,
    tighten: bool,
    fixed: Array,
) -> int:
    """Bound and tighten nodes; the number of steps taken.

    Parameters
    ----------
    quadratic, linear, constant
        Of the convex form.
    cell_start, pruned
        Cell g holds inputs ``cell_start[g]..cell_start[g+1]-1``, ``pruned[g]`` of them ones.
    state
        ``[nodes, d]`` of `FREE`, `ZERO`, `ONE`; tightened in place.
    x
        ``[nodes, d]``: where to start, and the relaxed solution.
    bound
        ``[nodes]``: the parents' bounds, raised in place; infinite if nothing is within bounds.
    cutoff
        A node whose bound reaches it is finished.
    tolerance
        ``[nodes]``: Frank-Wolfe gap at which a node below the cutoff is finished.
    magnitude
        ``sum_i |l_i| + 2 sum_ij |Q_ij| + |constant|``, which no partial sum exceeds. The gradient
        is computed once and then changed by each step, with a relative error of ``(d + 6 steps) u``
        of it in all; value, slope and oracle add ``d`` roundings of theirs.
    tighten
        Whether to fix inputs by the dual gap.
    fixed
        ``[nodes]``: number of inputs fixed by tightening.
    """
    nodes, d = x.shape
    cells = len(pruned)
    gradient = np.empty(d)
    inside, outside = np.empty(cells), np.empty(cells)
    steps = 0
    for node in range(nodes):
        z, fix = x[node], state[node]
        if not _repair(z, fix, cell_start, pruned):
            bound[node] = np.inf
            continue
        for i in range(d):
            gradient[i] = linear[i]
        for j in range(d):
            if z[j] != 0.0:
                weight = 2.0 * z[j]
                for i in range(d):
                    gradient[i] += weight * quadratic[j, i]
        taken, stuck = 0, False
        while True:
            if taken % _CHECK_EVERY == 0 or stuck or taken >= max_steps:
                value, slope = constant, 0.0
                for i in range(d):
                    term = 0.5 * (gradient[i] + linear[i]) * z[i]
                    value += term
                    slope += gradient[i] * z[i]
                least = _oracle_value(gradient, fix, cell_start, pruned, inside, outside)
                gap = slope - least
                here = value - gap - _ROUNDING * (d + 8 + 6 * taken) * magnitude
                bound[node] = max(bound[node], here)
                finished = (
                    stuck
                    or taken >= max_steps
                    or bound[node] >= cutoff
                    or gap <= max(tolerance[node], 0.02 * (cutoff - value))
                )
                if finished:
                    if tighten and here < cutoff:
                        for g in range(cells):
                            for j in range(cell_start[g], cell_start[g + 1]):
                                if fix[j] != FREE:
                                    continue
                                if gradient[j] >= outside[g]:
                                    if here + gradient[j] - inside[g] > cutoff:
                                        fix[j] = ZERO
                                        fixed[node] += 1
                                elif here + outside[g] - gradient[j] > cutoff:
                                    fix[j] = ONE
                                    fixed[node] += 1
                    break
            taken += 1
            # The steepest way down in any cell, then the partner that gains most.
            away, best_slope = -1, 0.0
            for g in range(cells):
                top, bottom, at = -np.inf, np.inf, -1
                for j in range(cell_start[g], cell_start[g + 1]):
                    if fix[j] == FREE:
                        if z[j] > 0.0 and gradient[j] > top:
                            top, at = gradient[j], j
                        if z[j] < 1.0 and gradient[j] < bottom:
                            bottom = gradient[j]
                if at >= 0 and top - bottom > best_slope:
                    best_slope, away = top - bottom, at
                    cell = g
            if away < 0 or best_slope <= 0.0:
                stuck = True
                continue
            toward, best_gain, step = -1, 0.0, 0.0
            for j in range(cell_start[cell], cell_start[cell + 1]):
                if fix[j] == FREE and z[j] < 1.0:
                    down = gradient[away] - gradient[j]
                    if down > 0.0:
                        curve = quadratic[away, away] + quadratic[j, j] - 2.0 * quadratic[away, j]
                        length = min(z[away], 1.0 - z[j])
                        if curve > 0.0:
                            length = min(length, down / (2.0 * curve))
                        gain = length * (down - length * curve)
                        if gain > best_gain:
                            toward, best_gain, step = j, gain, length
            if toward < 0:
                stuck = True
                continue
            z[away] -= step
            z[toward] += step
            if z[away] < 1e-14:
                z[away] = 0.0
            if z[toward] > 1.0 - 1e-14:
                z[toward] = 1.0
            for i in range(d):
                gradient[i] += 2.0 * step * (quadratic[toward, i] - quadratic[away, i])
        steps += taken
    return steps
