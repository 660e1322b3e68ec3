"""The best lengths' multipliers for given cuts, by a logarithmic barrier.

    max  sum(D) + mu log det (M - Diag(D) on the complement of N)

by Newton's method in float64 (Helmberg, Rendl, Vanderbei and Wolkowicz 1996). Its iterates stay
feasible, so a bound from any of them needs no shift; the Hessian is ``mu X * X`` (entry by entry)
with ``X = (M - Diag(D))^-1`` on the complement.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def feasible_lengths(
    form: Tensor,
    lengths: Tensor,
    normals: Tensor,
    *,
    tolerance: float,
    steps: int,
    expired: Callable[[], bool],
) -> tuple[Tensor, int]:
    """Feasible multipliers near given ones, improved.

    Parameters
    ----------
    form
        ``M``, float64 ``[d + 1, d + 1]``.
    lengths
        ``D``, float64 ``[d + 1]``, perhaps infeasible.
    normals
        ``N``, orthonormal ``[d + 1, cells]``.
    tolerance
        Stop when ``(d + 1) mu``, the most that is left to gain, is below.
    steps
        Most Newton steps.
    expired
        Whether to stop now.

    Returns
    -------
    tuple
        ``D`` with ``M - Diag(D)`` positive definite off N, and the Newton steps made.
    """
    weight = float(form.norm()) or 1.0
    beside = weight * (normals @ normals.T)
    projected = _projected(form, normals) + beside

    def factor(at: Tensor) -> Tensor | None:
        root, info = torch.linalg.cholesky_ex(projected - _projected_diagonal(at, normals))
        return root if int(info) == 0 else None

    lengths = torch.nan_to_num(lengths)
    margin = 0.05 * float(lengths.abs().median())
    root = factor(lengths - margin)
    while root is None:
        margin = 1.5 * margin + torch.finfo(torch.float64).eps * weight
        root = factor(lengths - margin)
    at, mu = lengths - margin, margin
    for step in range(steps):
        if len(at) * mu < tolerance or expired():
            return at, step
        inverse = torch.cholesky_inverse(root) - beside / weight**2
        gradient = 1 - mu * inverse.diagonal()
        hessian = torch.linalg.cholesky_ex(mu * inverse.square())
        if int(hessian.info) != 0:
            return at, step
        move = torch.cholesky_solve(gradient[:, None], hessian.L)[:, 0]
        length = 1.0
        new = factor(at + move)
        while new is None and length > 1e-3:
            length *= 0.6
            new = factor(at + 0.9 * length * move)
        if new is None:
            return at, step
        at = at + (1.0 if length == 1.0 else 0.9 * length) * move
        root = new
        mu *= 0.2 if length == 1.0 else 0.5
    return at, steps


def _projected(matrix: Tensor, normals: Tensor) -> Tensor:
    """``P M P`` with ``P = I - N N^T``."""
    half = normals.T @ matrix
    correction = normals @ (half - half @ normals @ normals.T / 2)
    return matrix - correction - correction.T


def _projected_diagonal(diagonal: Tensor, normals: Tensor) -> Tensor:
    """The same of ``Diag(D)``."""
    half = normals.T * diagonal
    correction = normals @ (half - half @ normals @ normals.T / 2)
    return torch.diag(diagonal) - correction - correction.T
