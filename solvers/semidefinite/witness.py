"""Multipliers turned into statements that stand on their own.

`Witness` proves a bound by a verified Cholesky factorisation and a few sums, whatever method
found its multipliers and however badly it converged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..certificate import Certificate
from ..rounding import factorisation_error, gamma, least_shift, proves_semidefinite
from .cuts import FAMILIES, Array
from .dual import Multipliers, projected
from .program import BinaryProgram

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class ConvexForm:
    """``x^T P x + p^T x + constant <= loss(x)`` for every allowed binary x, convex in between.

    ``P`` is positive semi-definite on the directions that keep every cell's sum, so this is a
    convex programme over the relaxed masks whose optimum is the semidefinite bound or better:
    quadratic convex reformulation (Billionnet, Elloumi and Plateau 2009), with cuts. What rounding
    may have changed is taken off the constant.
    """

    quadratic: Array
    linear: Array
    constant: float

    @classmethod
    def of(cls, program: BinaryProgram, multipliers: Multipliers) -> ConvexForm:
        """From any multipliers; convexity is forced by shifting the diagonal."""
        products, linear, constant = multipliers.cuts.combined(
            multipliers.cut_multiplier, program.inputs
        )
        quadratic = program.quadratic - products
        quadratic[np.diag_indices(program.inputs)] -= multipliers.diagonal
        shift = verified_shift(quadratic, program.cell_normals())
        quadratic[np.diag_indices(program.inputs)] += shift
        # What forming these numbers, and the program's own, may have lost at a binary x.
        magnitude, roundings = _magnitude(program, multipliers)
        size = float(magnitude.sum()) + abs(program.constant) + 2 * program.inputs * shift
        return cls(
            quadratic=quadratic,
            linear=program.linear - linear + multipliers.diagonal - shift,
            constant=program.constant
            - constant
            - gamma(roundings + 2 * program.inputs + 8) * (size + abs(constant)),
        )

    def value(self, x: Array) -> float:
        """The under-estimate at ``x``."""
        return float(x @ self.quadratic @ x + self.linear @ x + self.constant)


@dataclass(frozen=True)
class Witness:
    """Proof that a row's loss is at least a bound: multipliers, and a shift.

    ``C + shift I`` is positive semi-definite on the complement of the normals, hence
    ``y^T C y >= -shift (1 + ones)``, ``ones`` at most, for every allowed ``y = (1, x)``.
    """

    multipliers: Multipliers
    shift: float

    @classmethod
    def of(cls, program: BinaryProgram, multipliers: Multipliers) -> Witness:
        """Find the least shift that can be verified, by eigenvalues."""
        residual, _ = multipliers.residual(program)
        normals = program.normals()
        least = max(0.0, -float(np.linalg.eigvalsh(projected(residual, normals))[0]))
        return cls(multipliers, least + checkers_margin(program, multipliers, least))

    @classmethod
    def near(cls, program: BinaryProgram, multipliers: Multipliers) -> Witness:
        """For multipliers that are feasible but for rounding: no eigenvalues are needed.

        The shift grows from what the checker needs until it is verified; it is least only if the
        multipliers are feasible indeed.
        """
        residual, _ = multipliers.residual(program)
        normals = program.normals()
        margin = checkers_margin(program, multipliers)
        least = least_shift(
            lambda shift: is_verified(residual, normals, shift + margin / 2), 0.0, 2 * margin
        )
        if least > 0:
            margin = checkers_margin(program, multipliers, least)
        return cls(multipliers, least + margin)

    def bound(self, program: BinaryProgram) -> float:
        """The bound that the witness claims, less the rounding errors of computing it."""
        residual, constant = self.multipliers.residual(program)
        value: float = constant - self.shift * (1 + program.ones)
        terms = np.abs(residual).sum() + abs(constant)
        if len(self.multipliers.cuts):
            terms += 8 * float(self.multipliers.cut_multiplier.sum())
        terms += abs(self.shift) * (1 + program.ones)
        return float(value - 8 * EPS * terms)


def certificate(
    row: int, mask: Array, program: BinaryProgram, witness: Witness, price: float | None = None
) -> Certificate:
    """The witness of one row as the checker reads it."""
    multipliers = witness.multipliers
    return Certificate(
        row=row,
        mask=mask,
        bound=witness.bound(program),
        offset=multipliers.offset,
        diagonal=multipliers.diagonal,
        family=multipliers.cuts.family.astype(np.int64),
        index=multipliers.cuts.index.astype(np.int64),
        multiplier=multipliers.cut_multiplier,
        shift=witness.shift,
        price=price,
    )


def checkers_margin(program: BinaryProgram, multipliers: Multipliers, shift: float = 0.0) -> float:
    """How much more than the least shift makes `solvers.checker` accept a witness.

    The checker tests ``T = N^T (C + shift I) N`` with ``N = [(1, x^) | e_i - e_l]`` for one allowed
    x^ and an input l of each cell, and takes a guard off its diagonal for rounding. With a shift
    that is larger by ``m`` than the least, ``T >= m N^T N``. Here, for ``z = (z_0, z')``, split x^
    into its cells' means and a rest of squared length ``r = sum_g s_g (1 - s_g / size_g)``: with
    ``a = 1 + sum_g s_g^2 / size_g``,

        |N z|^2 >= a z_0^2 + (|z'| - sqrt(r) |z_0|)^2,

    a form with determinant a and trace ``1 + a + r = 2 + ones``, hence with no eigenvalue below
    ``a / (2 + ones)``. Without cells, N is the identity. The guard is the checker's with all inputs
    in the place of x^, which no mask exceeds; four times as much also covers the eigenvalue's error
    and the factorisation's.

    Parameters
    ----------
    program, multipliers
        Of the witness.
    shift
        Least shift.
    """
    magnitude, roundings = _magnitude(program, multipliers)
    if not magnitude.any():
        return 0.0  # nothing is computed, and nothing lost
    magnitude[np.diag_indices(len(magnitude))] += shift
    n, cells, least = len(magnitude), len(program.pruned), 1.0
    error = gamma(roundings) * magnitude
    if cells:
        size = np.bincount(program.cell, minlength=cells)
        least = (1 + float((program.pruned**2 / size).sum())) / (2 + program.ones)
        rows = magnitude.sum(axis=1)
        order = np.lexsort((rows[1:], program.cell))
        leaders = order[np.concatenate([[0], np.cumsum(size)[:-1]])]
        their = 1 + leaders[program.cell]
        every = 1 + np.arange(program.inputs)
        for _ in range(2):
            first = magnitude.sum(axis=1)
            magnitude = np.column_stack([first, magnitude[:, every] + magnitude[:, their]]).T
        error = gamma(roundings) * magnitude
        error[0] *= 1 + 2 * n / roundings
        error[1:, 0] = error[0, 1:]
    trace = float(np.trace(magnitude))
    guard = float(np.linalg.norm(error)) + factorisation_error(n, trace)
    guard += 8 * n**3 * (1 + trace) ** 2 * float(np.finfo(np.float64).tiny)  # underflow
    return 4 * guard / least


def _magnitude(program: BinaryProgram, multipliers: Multipliers) -> tuple[Array, int]:
    """Sums of absolute values that make up C, and the most roundings of an entry."""
    d, cuts = program.inputs, multipliers.cuts
    i, j, k = cuts.index.T
    c = np.abs(FAMILIES[cuts.family].T) * multipliers.cut_multiplier
    at = np.concatenate([i * d + j, i * d + k, j * d + k])
    half = np.bincount(at, np.concatenate([c[0], c[1], c[2]]) / 2, d * d).reshape(d, d)
    single = np.concatenate([i, j, k])
    found = np.zeros((d + 1, d + 1))
    found[1:, 1:] = (
        np.abs(program.quadratic) + half + half.T + np.diag(np.abs(multipliers.diagonal))
    )
    border = np.bincount(single, np.concatenate([c[3], c[4], c[5]]), d)
    found[0, 1:] = (np.abs(program.linear) + np.abs(multipliers.diagonal) + border) / 2
    found[1:, 0] = found[0, 1:]
    found[0, 0] = abs(multipliers.offset)
    terms = max(np.bincount(at, minlength=1).max(), np.bincount(single, minlength=1).max())
    return found, 2 * int(terms) + 16


def verified_shift(matrix: Array, normals: Array) -> float:
    """A ``shift >= 0`` with ``matrix + shift I >= 0`` on the complement of ``normals``.

    The smallest eigenvalue gives the candidate; `is_verified` must accept it, else it grows.
    """
    restricted = projected(matrix, normals)
    least = float(np.linalg.eigvalsh(restricted)[0])
    guard = rounding_guard(matrix)
    return least_shift(
        lambda shift: is_verified(matrix, normals, shift), max(0.0, -least) + 4 * guard, guard
    )


def is_verified(matrix: Array, normals: Array, shift: float) -> bool:
    """Whether a Cholesky factorisation proves ``matrix + shift I >= 0`` off the normals.

    `rounding_guard` is taken off beforehand, and what the factorisation itself may be off.
    """
    size = float(np.linalg.norm(matrix))
    if size == 0:
        return True
    tested = projected(matrix, normals) + size * (normals @ normals.T)
    tested[np.diag_indices(len(tested))] += shift
    return proves_semidefinite(torch.from_numpy(tested), rounding_guard(matrix))


def rounding_guard(matrix: Array) -> float:
    """More than `projected` loses to rounding, in the spectral norm."""
    return gamma(8 * len(matrix)) * float(np.linalg.norm(matrix))
