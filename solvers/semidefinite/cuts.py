"""Inequalities that hold for products ``Y_ij = x_i x_j`` of binaries.

McCormick (reformulation-linearisation) and triangle inequalities, which BiqMac and BiqCrunch
add lazily (Rendl, Rinaldi and Wiegele 2010; Krislock, Malick and Roupin 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Coefficients of Y_ij, Y_ik, Y_jk, x_i, x_j, x_k and 1 in "... >= 0", per family.
FAMILIES = np.array(
    [
        [1, 0, 0, 0, 0, 0, 0],  # Y_ij >= 0
        [-1, 0, 0, 1, 0, 0, 0],  # Y_ij <= x_i
        [1, 0, 0, -1, -1, 0, 1],  # Y_ij >= x_i + x_j - 1
        [-1, -1, 1, 1, 0, 0, 0],  # Y_ij + Y_ik <= x_i + Y_jk
        [1, 1, 1, -1, -1, -1, 1],  # x_i + x_j + x_k - Y_ij - Y_ik - Y_jk <= 1
    ],
    dtype=np.float64,
)

_TRIANGLES_FROM = 3


@dataclass(frozen=True)
class Cuts:
    """A list of cuts.

    Attributes
    ----------
    family
        Row of `FAMILIES`, int ``[cuts]``.
    index
        Inputs i, j, k, int ``[cuts, 3]``; k = j where the family has only two.
    """

    family: Array
    index: Array

    @classmethod
    def none(cls) -> Cuts:
        """No cuts."""
        return cls(np.zeros(0, np.int64), np.zeros((0, 3), np.int64))

    def __len__(self) -> int:
        return len(self.family)

    @property
    def has_triangles(self) -> bool:
        """Whether triangle inequalities are among them."""
        return bool((self.family >= _TRIANGLES_FROM).any())

    def take(self, chosen: Array) -> Cuts:
        """Some of them."""
        return Cuts(self.family[chosen], self.index[chosen])

    def joined(self, other: Cuts) -> Cuts:
        """These and others."""
        return Cuts(
            np.concatenate([self.family, other.family]), np.concatenate([self.index, other.index])
        )

    def keys(self, d: int) -> Array:
        """One integer per cut, equal only for equal cuts."""
        i, j, k = self.index.T
        found: Array = ((self.family * d + i) * d + j) * d + k
        return found

    def value(self, x: Array, products: Array) -> Array:
        """Left-hand sides at ``x`` and ``Y``; at binaries with their products they are >= 0."""
        i, j, k = self.index.T
        c = FAMILIES[self.family].T
        quadratic = c[0] * products[i, j] + c[1] * products[i, k] + c[2] * products[j, k]
        found: Array = quadratic + c[3] * x[i] + c[4] * x[j] + c[5] * x[k] + c[6]
        return found

    def combined(self, multiplier: Array, d: int) -> tuple[Array, Array, float]:
        """Sum of the left-hand sides times multipliers, as ``x^T S x + t^T x + constant``.

        Returns ``S`` (symmetric ``[d, d]``), ``t`` ``[d]`` and the constant.
        """
        i, j, k = self.index.T
        c = FAMILIES[self.family].T * multiplier
        at = np.concatenate([i * d + j, i * d + k, j * d + k])
        half = np.bincount(at, np.concatenate([c[0], c[1], c[2]]) / 2, d * d).reshape(d, d)
        linear = np.bincount(np.concatenate([i, j, k]), np.concatenate([c[3], c[4], c[5]]), d)
        return half + half.T, linear, float(c[6].sum())


def separate(x: Array, products: Array, most: int, threshold: float, triangles: bool) -> Cuts:
    """The ``most`` most violated cuts of each family, violated by more than ``threshold``."""
    d = len(x)
    upper = np.triu(np.ones((d, d), dtype=bool), 1)
    off_diagonal = ~np.eye(d, dtype=bool)
    violations = (
        (-products, upper),
        (products - x[:, None], off_diagonal),
        (x[:, None] + x - 1 - products, upper),
    )
    found = Cuts.none()
    for family, (violation, where) in enumerate(violations):
        i, j = np.nonzero((violation > threshold) & where)
        worst = _largest(violation[i, j], most)
        index = np.stack([i[worst], j[worst], j[worst]], axis=1)
        found = found.joined(Cuts(np.full(len(index), family), index))
    if triangles:
        found = found.joined(_separate_triangles(x, products, upper, most, threshold))
    return found


def _separate_triangles(
    x: Array, products: Array, upper: Array, most: int, threshold: float
) -> Cuts:
    found = Cuts.none()
    values = np.zeros(0)
    d = len(x)
    for i in range(d):
        row = products[i]
        first = row[:, None] + row - products - x[i]
        second = x[i] + x[:, None] + x - row[:, None] - row - products - 1
        for family, violation in ((3, first), (4, second)):
            where = upper.copy() if family == 3 else upper & (np.arange(d)[:, None] > i)
            where[i] = where[:, i] = False
            j, k = np.nonzero((violation > threshold) & where)
            worst = _largest(violation[j, k], max(1, 4 * most // d))
            index = np.stack([np.full(len(worst), i), j[worst], k[worst]], axis=1)
            values = np.concatenate([values, violation[j[worst], k[worst]]])
            found = found.joined(Cuts(np.full(len(index), family), index))
    return found.take(_largest(values, 2 * most))


def _largest(values: Array, most: int) -> Array:
    """Indices of the largest values, at most so many."""
    if len(values) <= most:
        return np.arange(len(values))
    found: Array = np.argpartition(-values, most)[:most]
    return found
