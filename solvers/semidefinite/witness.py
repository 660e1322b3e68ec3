"""Multipliers turned into statements that stand on their own.

`Witness` proves a bound by a verified Cholesky factorisation and a few sums, whatever method
found its multipliers and however badly it converged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..certificate import Certificate
from .cuts import Array
from .dual import Multipliers, projected
from .program import BinaryProgram

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class ConvexForm:
    """``x^T P x + p^T x + constant <= loss(x)`` for every allowed binary x, convex in between.

    ``P`` is positive semi-definite on the directions that keep every cell's sum, so this is a
    convex programme over the relaxed masks whose optimum is the semidefinite bound or better:
    quadratic convex reformulation (Billionnet, Elloumi and Plateau 2009), with cuts.
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
        return cls(
            quadratic=quadratic,
            linear=program.linear - linear + multipliers.diagonal - shift,
            constant=program.constant - constant,
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
        """Find the least shift that can be verified."""
        residual, _ = multipliers.residual(program)
        return cls(multipliers, verified_shift(residual, program.normals()))

    @classmethod
    def near(cls, program: BinaryProgram, multipliers: Multipliers) -> Witness:
        """For multipliers that are feasible but for rounding: no eigenvalues are needed.

        The shift grows from the rounding guard until it is verified; it is least only if the
        multipliers are feasible indeed.
        """
        residual, _ = multipliers.residual(program)
        normals = program.normals()
        shift = 4 * rounding_guard(residual)
        while not is_verified(residual, normals, shift):
            shift *= 4
        return cls(multipliers, shift)

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
    """The witness of one row as the checker reads it.

    The claim is lowered by what the checker's own rounding guard may differ.
    """
    multipliers = witness.multipliers
    return Certificate(
        row=row,
        mask=mask,
        bound=witness.bound(program) - 1e-9 * program.size,
        offset=multipliers.offset,
        diagonal=multipliers.diagonal,
        family=multipliers.cuts.family.astype(np.int64),
        index=multipliers.cuts.index.astype(np.int64),
        multiplier=multipliers.cut_multiplier,
        shift=witness.shift,
        price=price,
    )


def verified_shift(matrix: Array, normals: Array) -> float:
    """A ``shift >= 0`` with ``matrix + shift I >= 0`` on the complement of ``normals``.

    The smallest eigenvalue gives the candidate; `is_verified` must accept it, else it grows.
    """
    restricted = projected(matrix, normals)
    least = float(np.linalg.eigvalsh(restricted)[0])
    shift = max(0.0, -least) + 4 * rounding_guard(matrix)
    while not is_verified(matrix, normals, shift):
        shift = 2 * shift + rounding_guard(matrix)
    return shift


def is_verified(matrix: Array, normals: Array, shift: float) -> bool:
    """Whether a Cholesky factorisation proves ``matrix + shift I >= 0`` off the normals.

    A floating-point factorisation that runs to its end proves semi-definiteness of a matrix
    within `rounding_guard` of the one given (Rump, "Verification of positive definiteness",
    2006); so that much is taken off beforehand.
    """
    size = float(np.linalg.norm(matrix))
    if size == 0:
        return True
    tested = projected(matrix, normals) + size * (normals @ normals.T)
    tested[np.diag_indices(len(tested))] += shift - rounding_guard(matrix)
    return int(torch.linalg.cholesky_ex(torch.from_numpy(tested)).info) == 0


def rounding_guard(matrix: Array) -> float:
    """More than projection and Cholesky factorisation lose to rounding, in the spectral norm."""
    n = len(matrix)
    return 16 * n * EPS * float(np.linalg.norm(matrix))
