"""The proof of `solvers.checker` in ball arithmetic (python-flint): no rounding to account for.

Floating-point numbers are dyadic rationals, so that every entry is exact or lies in a ball that
certainly holds it; what is found positive is positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

try:
    from flint import arb, arb_mat, ctx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "The exact check needs python-flint; install it with pip install 'mipprune[exact]'.",
        name="flint",
    ) from error

_BITS = 256
_ATTEMPTS = 4

Matrix = list[list[Any]]


def proven(
    weight: Any,
    gram: Any,
    linear: Any,
    claim: Any,
    cuts: Sequence[tuple[Sequence[int], Sequence[int], int]],
    removed: Any,
    leaders: Any,
    most: int,
) -> float | None:
    """The bound that a claim's witness proves; None if its matrix is not shown semi-definite.

    Parameters
    ----------
    weight, gram, linear
        Float64 ``[d]``, ``[d, d]``, ``[d]``.
    claim
        A `solvers.checker.Claim`.
    cuts
        The families of cuts.
    removed
        Inputs that the mask removes.
    leaders
        The input of each cell that the others are taken against; None without cells.
    most
        How many inputs are removed at most.
    """
    before = ctx.prec
    ctx.prec = _BITS
    try:
        form = _form(weight, gram, linear, claim, cuts)
        if leaders is not None:
            d, each = len(weight), len(weight) // len(leaders)
            others = np.setdiff1d(np.arange(d), leaders)
            pairs = [(1 + int(i), 1 + int(leaders[i // each])) for i in others]
            chosen = [0, *(1 + int(i) for i in removed)]
            form = _columns(_columns(form, chosen, pairs), chosen, pairs)
        if not _is_semidefinite(form):
            return None
        value = arb(claim.offset) - arb(claim.shift) * (1 + most)
        for family, u in zip(claim.family, claim.multiplier, strict=True):
            value -= cuts[family][2] * arb(float(u))
        low = value.lower()
        found = float(low)
        while not arb(found) <= low:
            found = float(np.nextafter(found, -math.inf))
        return found
    finally:
        ctx.prec = before


def _form(weight: Any, gram: Any, linear: Any, claim: Any, cuts: Any) -> Matrix:
    """``C + shift I``, entries exact up to the precision."""
    d, price = len(weight), arb(claim.price or 0.0)
    w = [arb(one) for one in weight.tolist()]
    form: Matrix = [[arb(0)] * (d + 1) for _ in range(d + 1)]
    for i, row in enumerate(gram.tolist()):
        for j in range(i + 1):
            form[i + 1][j + 1] = form[j + 1][i + 1] = w[i] * arb(row[j]) * w[j]
    for i in range(d):
        diagonal = arb(float(claim.diagonal[i]))
        form[i + 1][i + 1] += arb(claim.shift) - diagonal
        form[0][i + 1] = (arb(float(linear[i])) - price + diagonal) / 2
    for family, at, value in zip(claim.family, claim.index, claim.multiplier, strict=True):
        products, singles, _ = cuts[family]
        inputs, u = [1 + int(one) for one in at], arb(float(value))
        for sign, (a, b) in zip(products, ((0, 1), (0, 2), (1, 2)), strict=True):
            if sign:
                form[inputs[a]][inputs[b]] -= sign * u / 2
                form[inputs[b]][inputs[a]] -= sign * u / 2
        for sign, i in zip(singles, inputs, strict=True):
            if sign:
                form[0][i] -= sign * u / 2
    for i in range(1, d + 1):
        form[i][0] = form[0][i]
    form[0][0] = arb(claim.shift) - arb(claim.offset)
    return form


def _columns(matrix: Matrix, chosen: list[int], pairs: list[tuple[int, int]]) -> Matrix:
    """The transpose of ``M N``."""
    first = [sum((row[i] for i in chosen), arb(0)) for row in matrix]
    return [first, *([row[i] - row[j] for row in matrix] for i, j in pairs)]


def _is_semidefinite(matrix: Matrix) -> bool:
    """Whether a symmetric matrix T is shown to be positive semi-definite.

    For any matrix L and number s, ``T = L L^T + s I + E`` with an E that is computed exactly here;
    L L^T is semi-definite whatever L is, and ``s I + E`` is if the Frobenius norm of E is at most
    s. That L comes from a factorisation of ``T - s I`` in floating point need not be trusted.
    Rows of exact zeros are left out. (Elimination in balls would need thousands of bits: its radii
    grow with every pivot.)
    """
    live = [i for i, row in enumerate(matrix) if not all(entry == 0 for entry in row)]
    if not live:
        return True
    rest = [[matrix[i][j] for j in live] for i in live]
    rounded = np.array([[float(entry.mid()) for entry in row] for row in rest])
    shift = float(np.finfo(np.float64).eps * np.abs(rounded.diagonal()).sum())
    for _ in range(_ATTEMPTS):
        if not np.isfinite(rounded).all() or not np.isfinite(shift):
            return False
        try:
            factor = np.linalg.cholesky(rounded - shift * np.eye(len(live)))
        except np.linalg.LinAlgError:
            return False
        if not np.isfinite(factor).all():
            return False
        left = arb_mat(factor.tolist())
        product = (left * left.transpose()).tolist()
        square = arb(0)
        for i, (own, row) in enumerate(zip(product, rest, strict=True)):
            for j in range(i):
                square += 2 * (row[j] - own[j]) ** 2
            square += (row[i] - own[i] - shift) ** 2
        if square <= arb(shift) ** 2:
            return True
        shift = 1.25 * math.sqrt(float(square.upper()))
    return False
