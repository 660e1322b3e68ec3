"""Improving the multipliers of the semidefinite relaxation of one row.

With ``y = (1, x)`` and ``X = y y^T``, every allowed ``x`` satisfies ``X >= 0``, ``diag(Y) = x``,
``X_00 = 1``, the cuts, and ``N^T y = 0`` for the normals N of the equality constraints. Multipliers
``gamma``, ``D`` (free) and ``u >= 0`` of these give

    loss(x) = gamma + const(u) + y^T C y + (something >= 0)

with ``C = [0 l/2; l/2 Q] - gamma E_00 - (D on x_i^2 - x_i) - sum_c u_c cut_c``. The augmented
Lagrangian (proximal in X: "boundary point", Povh, Rendl and Wiegele 2006; Malick et al. 2009)

    max_{gamma, D, u >= 0}  gamma + const(u) - |[alpha X_k - C]_+|^2 / (2 alpha)

is smooth and concave; each evaluation needs only the negative eigenpairs, which are few, and
L-BFGS-B keeps the signs. Then ``X_{k+1} = [alpha X_k - C]_+ / alpha``. All matrices are projected
on the orthogonal complement of N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from ..clock import Clock
from .cuts import Array, Cuts, separate
from .program import BinaryProgram

_FEW_FROM = 80


@dataclass(frozen=True)
class Multipliers:
    """Multipliers of a row's semidefinite relaxation; any values give a valid bound.

    Attributes
    ----------
    offset
        ``gamma``, of ``X_00 = 1``.
    diagonal
        ``D``, of ``Y_ii = x_i``, ``[d]``, of both signs.
    cuts
        The cuts in use.
    cut_multiplier
        ``u >= 0``, ``[cuts]``.
    """

    offset: float
    diagonal: Array
    cuts: Cuts
    cut_multiplier: Array

    @classmethod
    def zero(cls, d: int) -> Multipliers:
        """The plain relaxation."""
        return cls(0.0, np.zeros(d), Cuts.none(), np.zeros(0))

    @classmethod
    def of_relaxation(cls, program: BinaryProgram, x: Array) -> Multipliers:
        """Those that prove what Frank-Wolfe's gap proves at a relaxed ``x`` ``[d]``.

        With the gradient ``g = 2 Q x + l`` and in each cell a threshold ``t`` between what an
        oracle chooses and what it does not, ``r = g - t`` and any binary ``v`` of the right counts

            loss(v) = loss(x) - gap + sum of |r_i| over v_i that the oracle chose otherwise
                      + (v - x)^T Q (v - x),

        and for binaries each of these ``|r_i|`` is ``|r_i| v_i^2`` or ``|r_i| (1 - v_i)^2``.
        """
        gradient = 2 * program.quadratic @ x + program.linear
        threshold = np.zeros(max(1, len(program.pruned)))
        for g, ones in enumerate(program.pruned):
            ordered = np.sort(gradient[program.cell == g])
            threshold[g] = ordered[max(0, ones - 1) : ones + 1].mean()
        cell = program.cell if len(program.pruned) else np.zeros(program.inputs, np.int64)
        reduced = gradient - threshold[cell]
        chosen = reduced < 0
        slack = np.where(chosen, 1 - x, x)
        offset = program.objective(x) - program.constant - float(np.abs(reduced) @ slack)
        return cls(offset, -np.abs(reduced), Cuts.none(), np.zeros(0))

    def scaled(self, factor: float) -> Multipliers:
        """Multipliers of the program whose losses are multiplied."""
        return Multipliers(
            self.offset * factor, self.diagonal * factor, self.cuts, self.cut_multiplier * factor
        )

    def residual(self, program: BinaryProgram) -> tuple[Array, float]:
        """``C`` (``[d + 1, d + 1]``) and a constant: ``loss >= constant + y^T C y``."""
        products, linear, constant = self.cuts.combined(self.cut_multiplier, program.inputs)
        lifted = program.lifted()
        lifted[1:, 1:] -= products
        inputs = 1 + np.arange(program.inputs)
        lifted[inputs, inputs] -= self.diagonal
        half = (self.diagonal - linear) / 2
        lifted[0, 1:] += half
        lifted[1:, 0] += half
        lifted[0, 0] -= self.offset
        # The constants of the cuts are not part of the quadratic form: they go to the bound.
        return lifted, program.constant + self.offset - constant

    def restricted(self, free: Array) -> Multipliers:
        """For the program over the ``free`` inputs; cuts on others are dropped."""
        inside: Array = np.all(free[self.cuts.index], axis=1)
        kept = self.cuts.take(inside)
        renumbered = np.cumsum(free) - 1
        return Multipliers(
            self.offset,
            self.diagonal[free],
            Cuts(kept.family, renumbered[kept.index]),
            self.cut_multiplier[inside],
        )

    def _packed(self) -> Array:
        return np.concatenate([[self.offset], self.diagonal, self.cut_multiplier])

    def _unpacked(self, values: Array) -> Multipliers:
        d = len(self.diagonal)
        return Multipliers(
            float(values[0]), values[1 : 1 + d], self.cuts, np.maximum(values[1 + d :], 0.0)
        )


@dataclass(frozen=True)
class Iterate:
    """Where the ascent stands: multipliers, and the matrix ``X``, ``[d + 1, d + 1]``."""

    multipliers: Multipliers
    matrix: Array

    @classmethod
    def zero(cls, d: int) -> Iterate:
        """Where it begins."""
        return cls(Multipliers.zero(d), np.zeros((d + 1, d + 1)))

    @property
    def relaxed(self) -> Array:
        """Relaxed ``x``, ``[d]``: the first row of X, only nearly feasible."""
        return self.matrix[0, 1:]

    def restricted(self, free: Array) -> Iterate:
        """For the program over the ``free`` inputs."""
        kept = np.concatenate([[True], free])
        return Iterate(self.multipliers.restricted(free), self.matrix[np.ix_(kept, kept)])


class DualAscent:
    """The augmented Lagrangian method on one row.

    Parameters
    ----------
    program
        Scaled so that its losses are of the order of 1.
    start
        Where to begin.

    Attributes
    ----------
    at
        Where it stands.
    evaluations
        Eigenvalue decompositions so far.
    """

    def __init__(self, program: BinaryProgram, start: Iterate) -> None:
        self._program = program
        self._normals = program.normals()
        self.at = start
        self.evaluations = 0

    def ascend(self, alpha: float, iterations: int, clock: Clock | None = None) -> None:
        """Improve the multipliers for fixed ``X_k``, then take the new X.

        Ends early when the clock expires.
        """
        from scipy.optimize import minimize  # slow to import: not by those who do without

        def look(_: object) -> None:
            if clock is not None and clock.expired:
                raise StopIteration

        at = self.at.multipliers
        free = 1 + self._program.inputs
        start = at._packed()
        bounds = [(None, None)] * free + [(0.0, None)] * (len(start) - free)
        result = minimize(
            lambda values: self._negative_dual(at._unpacked(values), alpha)[:2],
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            callback=look,
            options={"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 0.0, "gtol": 0.0},
        )
        multipliers = at._unpacked(result.x)
        self.at = Iterate(multipliers, self._negative_dual(multipliers, alpha)[2])

    def add_cuts(self, most: int, threshold: float, triangles: bool) -> int:
        """Drop cuts without a multiplier, add violated ones; the number of new ones."""
        d, at = self._program.inputs, self.at.multipliers
        new = separate(self.at.relaxed, self.at.matrix[1:, 1:], most, threshold, triangles)
        live = at.cut_multiplier > 0
        kept = at.cuts.take(live)
        new = new.take(~np.isin(new.keys(d), kept.keys(d)))
        multipliers = Multipliers(
            at.offset,
            at.diagonal,
            kept.joined(new),
            np.concatenate([at.cut_multiplier[live], np.zeros(len(new))]),
        )
        self.at = Iterate(multipliers, self.at.matrix)
        return len(new)

    def _negative_dual(self, at: Multipliers, alpha: float) -> tuple[float, Array, Array]:
        """Negative augmented dual, its gradient, and the new X."""
        self.evaluations += 1
        residual, constant = at.residual(self._program)
        residual = projected(residual, self._normals) - alpha * self.at.matrix
        value, vector = _negative_eigenpairs(residual)
        root = vector * np.sqrt(-value / alpha)
        matrix = root @ root.T
        x, products = matrix[0, 1:], matrix[1:, 1:]
        gradient = np.concatenate(
            [[1 - matrix[0, 0]], x - products.diagonal(), -at.cuts.value(x, products)]
        )
        return float(value @ value / (2 * alpha) - constant), -gradient, matrix


def _negative_eigenpairs(matrix: Array) -> tuple[Array, Array]:
    """Eigenpairs below zero; on large matrices they are few, and found without the others."""
    if len(matrix) > _FEW_FROM:
        try:
            value, vector = eigh(
                matrix, subset_by_value=(-np.inf, 0.0), driver="evr", check_finite=False
            )
            return value, vector
        except np.linalg.LinAlgError:  # the subset driver gives up on some clustered spectra
            pass
    value, vector = np.linalg.eigh(matrix)
    negative = value < 0
    return value[negative], vector[:, negative]


def projected(matrix: Array, normals: Array) -> Array:
    """``P M P`` with ``P = I - N N^T``, symmetric."""
    half = normals.T @ matrix
    inner = half @ normals
    correction = normals @ (half - inner @ normals.T / 2)
    result: Array = matrix - correction - correction.T
    return result
