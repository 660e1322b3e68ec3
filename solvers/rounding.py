"""What floating point may have changed, derived once for all bounds.

Unit roundoff ``u = 2^-53``, ``gamma_n = n u / (1 - n u)`` (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InvalidInput

UNIT_ROUNDOFF = 2.0**-53

_TINY = torch.finfo(torch.float64).tiny


def gamma(n: int) -> float:
    """Relative error of a sum of n products, whatever its order."""
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)


def factorisation_error(n: int, trace: float) -> float:
    """How far below zero an eigenvalue of a matrix may be whose Cholesky factorisation succeeds.

    The factor R satisfies ``R^T R = A + E`` with ``|E| <= gamma_{n+1} |R^T| |R|`` (Higham, theorem
    10.3), hence ``|E|_2 <= gamma_{n+1} sum_j |r_j|^2 <= gamma_{n+1} / (1 - gamma_{n+1}) trace(A)``
    (Rump, Verification of positive definiteness, BIT 46, 2006). Underflow costs less than the
    last term.
    """
    growth = gamma(n + 1)
    return growth / (1 - growth) * trace + n * n * _TINY


def proves_semidefinite(matrix: Tensor, error: float) -> bool:
    """Whether all symmetric matrices within ``error`` of this one are positive semi-definite.

    Parameters
    ----------
    matrix
        Float64 ``[n, n]``, symmetric.
    error
        Spectral norm of what the matrix may differ from the one that is meant.

    Returns
    -------
    bool
        True is a proof; False says nothing.
    """
    n = len(matrix)
    if n == 0:
        return True
    diagonal = matrix.diagonal()
    # The shift itself is rounded, once per entry of the diagonal.
    shift = error + factorisation_error(n, float(diagonal.abs().sum()))
    shift += 2 * UNIT_ROUNDOFF * (float(diagonal.abs().max()) + shift)
    tested = matrix.clone()
    tested.diagonal().sub_(shift)
    if not bool(torch.isfinite(tested).all()):
        return False
    factor, info = torch.linalg.cholesky_ex(tested)
    return int(info) == 0 and bool(torch.isfinite(factor.diagonal()).all())


def negative_part(gram: Tensor) -> float:
    """``s >= 0`` with ``C + s I`` positive semi-definite, C the Gram matrix in correlation form.

    ``C_ij = G_ij / sqrt(G_ii G_jj)`` over the inputs with ``G_jj > 0``. 0 where that is proven,
    which it is for Gram matrices of full rank; otherwise as small as can be verified.

    Parameters
    ----------
    gram
        Float64 ``[d, d]``, symmetric.
    """
    live = gram.diagonal() > 0
    if not bool(live.any()):
        return 0.0
    gram = gram[live][:, live]
    d = len(gram)
    scale = gram.diagonal().rsqrt()
    correlation = gram * scale * scale[:, None]
    # Two roundings an entry, of entries that are about 1 at most; scale need not be exact.
    error = 4 * UNIT_ROUNDOFF * float(correlation.norm())
    eye = torch.eye(d, dtype=torch.float64, device=gram.device)
    shift = least_shift(
        lambda shift: proves_semidefinite(correlation + shift * eye, error),
        0.0,
        2 * (error + factorisation_error(d, float(d))),
    )
    return shift * (1 + 1e-6)


def least_shift(proven: Callable[[float], bool], first: float, step: float) -> float:
    """The first of ``first``, and of numbers that grow from ``first + step``, that is proven.

    Raises
    ------
    InvalidInput
        If none is: the numbers overflow.
    """
    shift = first
    while not proven(shift):
        shift = 2 * shift + step + _TINY
        if not math.isfinite(shift):
            raise InvalidInput("The problem's numbers overflow; scale its weights or inputs.")
    return shift
