"""Linear constraints on binaries in exact arithmetic, whatever the sizes of their coefficients.

A solver with absolute tolerances cannot tell ``1e12 x + y <= 1e12`` from ``1e12 x <= 1e12``. Here
sums are compared with bounds exactly, variables that one constraint alone decides are fixed, and a
constraint can be split into digits:

    sum_j a_j x_j <= b   with   a_j = sum_k d_jk M^k,   b = sum_k b_k M^k

holds for whole numbers if and only if there are whole carries ``t_1, ..., t_K`` with

    sum_j d_jk x_j + t_k <= b_k + M t_{k+1}   for k = 0..K,   t_0 = t_{K+1} = 0.

(Weighted with ``M^k`` and added up, the carries cancel; conversely, take each the least that its
digit allows: roundings upwards of nested quotients are one rounding of the quotient.) All
coefficients are then at most M, and a constraint that is broken is so by 1 or more. The continuous
relaxation is no weaker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from .pattern import Constraints
from .rounding import UNIT_ROUNDOFF, gamma

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_DIGIT = 12
"""Bits of a digit."""

_MOST_BITS = 120
"""Coefficients below this share of the largest are cut off where a constraint is split."""

_RATIO = 2.0**30
"""Constraints whose coefficients differ more than this are split before an oracle is asked."""

_ROUNDS = 50
"""How often fixing variables may lead to fixing others; more would do no harm but take time."""


@dataclass(frozen=True)
class Layout:
    """Constraints as an oracle sees them, and the bounds of the carries, its last columns."""

    constraints: Constraints
    carry_lower: Floats
    carry_upper: Floats

    def extended(self, cost: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats, Floats]:
        """Costs and bounds of the variables, then of the carries."""
        return (
            np.concatenate([cost, np.zeros(len(self.carry_lower))]),
            np.concatenate([lower, self.carry_lower]),
            np.concatenate([upper, self.carry_upper]),
        )


class ExactRows:
    """``lower <= matrix @ x <= upper`` for binary ``x``.

    Parameters
    ----------
    constraints
        Bounds are meant exactly.

    Attributes
    ----------
    lower, upper
        Float64 ``[n]``, 0 or 1: what all allowed masks have in common.
    infeasible
        Whether that shows that there are none.
    split_at_once
        Constraints that no oracle should see as they are.
    """

    def __init__(self, constraints: Constraints) -> None:
        matrix = csr_array(constraints.matrix, copy=True)
        self._owner = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        largest = _largest(matrix)
        exponent = -np.frexp(largest)[1]
        whole = np.bincount(self._owner, matrix.data % 1 != 0, matrix.shape[0]) == 0
        with np.errstate(over="ignore", under="ignore"):
            sizes = np.bincount(self._owner, np.abs(matrix.data), matrix.shape[0])
            matrix.data = np.ldexp(matrix.data, exponent[self._owner])
            self._low = np.ldexp(constraints.lower, exponent)
            self._high = np.ldexp(constraints.upper, exponent)
        self._matrix, self._absolute = matrix, abs(matrix)
        # Sums of whole numbers are exact as long as they are below 2^53.
        self._doubt = np.where(whole & (sizes <= 2.0**53), 0.0, gamma(matrix.shape[1] + 1))
        self.lower, self.upper = np.zeros(matrix.shape[1]), np.ones(matrix.shape[1])
        self.infeasible = not self._propagate()
        self._reduced = self._without_fixed()
        self.split_at_once = self._uneven()
        self._layouts: dict[frozenset[int], Layout] = {}

    def violated(self, mask: Bools) -> tuple[Bools, Bools]:
        """Which constraints fall below their lower and exceed their upper bound, exactly."""
        x = mask.astype(np.float64)
        sums = self._matrix @ x
        doubt = self._doubt * (self._absolute @ x)
        low, high = sums < self._low, sums > self._high
        near = np.minimum(np.abs(sums - self._low), np.abs(sums - self._high)) <= doubt
        for i in np.flatnonzero(near & (doubt > 0)).tolist():
            part = slice(*self._matrix.indptr[i : i + 2])
            terms = self._matrix.data[part][mask[self._matrix.indices[part]]].tolist()
            # The sign of a sum rounded once is that of the sum.
            low[i] = np.isfinite(self._low[i]) and math.fsum([*terms, -self._low[i]]) < 0
            high[i] = np.isfinite(self._high[i]) and math.fsum([*terms, -self._high[i]]) > 0
        return low, high

    def layout(self, split: frozenset[int]) -> Layout:
        """The constraints without the fixed variables, those of ``split`` as digits."""
        if split not in self._layouts:
            self._layouts[split] = self._lay_out(split)
        return self._layouts[split]

    def _propagate(self) -> bool:
        """Fix what a constraint alone decides; False if nothing is left."""
        data, column, owner = self._matrix.data, self._matrix.indices, self._owner
        count = self._matrix.shape[0]
        for _ in range(_ROUNDS):
            at_lower, at_upper = data * self.lower[column], data * self.upper[column]
            least, most = np.minimum(at_lower, at_upper), np.maximum(at_lower, at_upper)
            doubt = (gamma(self._matrix.shape[1] + 4) + 4 * UNIT_ROUNDOFF) * np.bincount(
                owner, np.maximum(np.abs(least), np.abs(most)), count
            )
            lowest = np.bincount(owner, least, count) - doubt
            highest = np.bincount(owner, most, count) + doubt
            if ((lowest > self._high) | (highest < self._low)).any():
                return False
            free = self.lower[column] < self.upper[column]
            with np.errstate(invalid="ignore"):
                # Infinite bounds leave infinite room.
                above = (self._high - lowest) * (1 + 8 * UNIT_ROUNDOFF)
                below = (highest - self._low) * (1 + 8 * UNIT_ROUNDOFF)
            at_least = free & (np.abs(data) > above[owner])  # must stay where the sum is least
            at_most = free & (np.abs(data) > below[owner])
            if not (at_least | at_most).any():
                return True
            self.upper[column[at_least & (data > 0)]] = 0.0
            self.lower[column[at_least & (data < 0)]] = 1.0
            self.lower[column[at_most & (data > 0)]] = 1.0
            self.upper[column[at_most & (data < 0)]] = 0.0
            if (self.lower > self.upper).any():
                return False
        return True

    def _without_fixed(self) -> Constraints:
        """The constraints on the variables that are not fixed."""
        column, owner = self._matrix.indices, self._owner
        free = self.lower[column] < self.upper[column]
        lower, upper = self._low.copy(), self._high.copy()
        kept = ~free & (self.lower[column] == 1)
        for i in np.unique(owner[kept]).tolist():
            terms = self._matrix.data[kept & (owner == i)]
            for bound in (lower, upper):
                if np.isfinite(bound[i]):
                    bound[i] = math.fsum([bound[i], *(-terms).tolist()])
        shape = self._matrix.shape
        matrix = csr_array((self._matrix.data[free], (owner[free], column[free])), shape=shape)
        return Constraints(matrix, lower, upper)

    def _uneven(self) -> frozenset[int]:
        matrix = self._reduced.matrix
        smallest = np.full(matrix.shape[0], np.inf)
        owner = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        np.minimum.at(smallest, owner, np.abs(matrix.data))
        return frozenset(np.flatnonzero(_largest(matrix) > _RATIO * smallest).tolist())

    def _lay_out(self, split: frozenset[int]) -> Layout:
        reduced = self._reduced
        count, n = reduced.matrix.shape
        plain = [i for i in range(count) if i not in split]
        part = csr_array(reduced.matrix[plain]).tocoo()
        rows, columns, values = part.row.tolist(), part.col.tolist(), part.data.tolist()
        lower, upper = reduced.lower[plain].tolist(), reduced.upper[plain].tolist()
        carries: list[tuple[int, int]] = []
        for i in sorted(split):
            for index, digits, bounds in self._digits(i):
                incoming = (0, 0)
                for k, (digit, bound) in enumerate(zip(digits, bounds, strict=True)):
                    row = len(upper)
                    entries = [(j, d) for j, d in zip(index, digit, strict=True) if d]
                    if k > 0:
                        entries.append((n + len(carries) - 1, 1))
                    if k + 1 < len(digits):
                        most = sum(digit) + incoming[1] - bound
                        incoming = -((bound - incoming[0]) >> _DIGIT), -((-most) >> _DIGIT)
                        entries.append((n + len(carries), -(1 << _DIGIT)))
                        carries.append(incoming)
                    rows += [row] * len(entries)
                    columns += [j for j, _ in entries]
                    values += [float(d) for _, d in entries]
                    lower.append(-np.inf)
                    upper.append(float(bound))
        shape = (len(upper), n + len(carries))
        matrix = csr_array((np.array(values, dtype=np.float64), (rows, columns)), shape=shape)
        ends = np.array(carries, dtype=np.float64).reshape(-1, 2)
        return Layout(Constraints(matrix, np.array(lower), np.array(upper)), ends[:, 0], ends[:, 1])

    def _digits(self, i: int) -> list[tuple[list[int], list[list[int]], list[int]]]:
        """Columns, digits from the lowest and digits of the bound, of both sides of a constraint.

        The lower side is that of the negated constraint.
        """
        matrix = self._reduced.matrix
        part = slice(*matrix.indptr[i : i + 2])
        index = matrix.indices[part].tolist()
        own = self._owner == i
        kept = self._matrix.data[own & (self.lower[self._matrix.indices] == 1)].tolist()
        found = []
        for sign, bound in ((1, self._high[i]), (-1, self._low[i])):
            if not np.isfinite(bound):
                continue
            room = sign * (Fraction(float(bound)) - sum(map(Fraction, kept)))
            ratios = [(sign * a).as_integer_ratio() for a in matrix.data[part].tolist()]
            unit = max((q for _, q in ratios), default=1)
            numbers = [p * (unit // q) for p, q in ratios]
            divisor = math.gcd(*numbers) or 1
            numbers, most = [a // divisor for a in numbers], math.floor(room * unit / divisor)
            bits = max((abs(a).bit_length() for a in numbers), default=0)
            if bits > _MOST_BITS:  # rounded downwards: no mask is lost
                numbers = [a >> (bits - _MOST_BITS) for a in numbers]
                most, bits = most >> (bits - _MOST_BITS), _MOST_BITS
            most = max(most, sum(a for a in numbers if a < 0) - 1)
            most = min(most, sum(a for a in numbers if a > 0))
            digits, bounds = [], []
            for _ in range(max(1, -(-bits // _DIGIT)) - 1):
                digits.append([a & ((1 << _DIGIT) - 1) for a in numbers])
                bounds.append(most & ((1 << _DIGIT) - 1))
                numbers, most = [a >> _DIGIT for a in numbers], most >> _DIGIT
            found.append((index, [*digits, numbers], [*bounds, most]))
        return found


def _largest(matrix: csr_array) -> Floats:
    """Largest absolute coefficient of each constraint."""
    return np.asarray(abs(matrix).max(axis=1).todense(), dtype=np.float64).ravel()
