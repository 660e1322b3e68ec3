"""Which input a node is split on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from ..semidefinite.cuts import Array
from .state import FREE, ONE, ZERO

Branching = Literal["most_infeasible", "curvature", "pseudocost", "strong"]

BRANCHINGS: tuple[Branching, ...] = ("most_infeasible", "curvature", "pseudocost", "strong")

Trial = Callable[[Array, Array, Array], None]
"""Raises the bounds of nodes, given as states, points and bounds, by a few steps in place."""

_STRONG_CANDIDATES = 8
_PRIOR_SPLITS = 4
_TINY = 1e-30


class Brancher:
    """A branching rule, for many nodes at once.

    Parameters
    ----------
    rule
        "most_infeasible"; "curvature", fraction squared times curvature; "pseudocost", the product
        of both children's expected gains, which are distance squared times curvature times what
        that predicted too little in earlier splits; "strong", the best of a few by trial.
    curvature
        Diagonal of the form, ``[d]``.
    """

    def __init__(self, rule: Branching, curvature: Array) -> None:
        self._rule, self._curvature = rule, np.maximum(curvature, 0.0)
        self._gain = np.zeros((2, len(curvature)))
        self._predicted = np.zeros((2, len(curvature)))

    def choose(self, state: Array, x: Array, bound: Array, cutoff: float, trial: Trial) -> Array:
        """One free input per node.

        Parameters
        ----------
        state, x, bound
            Of the nodes: ``[nodes, d]``, ``[nodes, d]``, ``[nodes]``.
        cutoff
            Bound from which gains no longer count.
        trial
            For the "strong" rule.
        """
        fraction = np.minimum(x, 1 - x)
        if self._rule != "most_infeasible":
            fraction = fraction**2 * self._curvature
        if self._rule == "pseudocost" and self._predicted.any(axis=1).all():
            fraction = self._gains(x)
        # Among integral free inputs, which the under-estimator may still leave open, any will do.
        score = np.where(state == FREE, fraction + _TINY, -1.0)
        if self._rule == "strong":
            return _strong(score, state, x, bound, cutoff, trial)
        chosen: Array = score.argmax(axis=1)
        return chosen

    def learn(self, at: Array, one: Array, distance: Array, gain: Array) -> None:
        """Hear what children gained: input, whether fixed at one, how far it moved."""
        side, predicted = one.astype(np.int64), distance**2 * self._curvature[at]
        np.add.at(self._gain, (side, at), gain)
        np.add.at(self._predicted, (side, at), predicted)

    def _gains(self, x: Array) -> Array:
        """Product of the gains expected of both children; few splits count as average ones."""
        average = self._gain.sum(axis=1) / self._predicted.sum(axis=1)
        prior = _PRIOR_SPLITS * self._curvature / 4
        factor = (self._gain + average[:, None] * prior) / (self._predicted + prior + _TINY)
        found: Array = factor[0] * factor[1] * (x * (1 - x) * self._curvature) ** 2
        return found


def _strong(
    score: Array, state: Array, x: Array, bound: Array, cutoff: float, trial: Trial
) -> Array:
    """The candidate whose weaker child gains most after a few steps."""
    nodes, count = len(state), min(_STRONG_CANDIDATES, score.shape[1])
    candidates = np.argpartition(-score, count - 1, axis=1)[:, :count]
    at = np.repeat(candidates.ravel(), 2)
    owner = np.repeat(np.arange(nodes), 2 * count)
    tried, points, bounds = state[owner], x[owner], bound[owner]
    every = np.arange(len(at))
    allowed = tried[every, at] == FREE
    tried[every[allowed], at[allowed]] = np.where(every % 2 == 0, ZERO, ONE)[allowed]
    trial(tried, points, bounds)
    weaker = np.minimum(bounds, cutoff).reshape(nodes, count, 2).min(axis=2)
    weaker[~allowed.reshape(nodes, count, 2)[:, :, 0]] = -np.inf
    best: Array = candidates[np.arange(nodes), weaker.argmax(axis=1)]
    return best
