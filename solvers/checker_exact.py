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
_BLOCK = 32

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
    """Whether a symmetric matrix is shown to be, by Schur complements of blocks on its diagonal.

    Rows of exact zeros are left out; the rest is shown to be positive definite.
    """
    live = [i for i, row in enumerate(matrix) if not all(entry == 0 for entry in row)]
    rest = [[matrix[i][j] for j in live] for i in live]
    while rest:
        block = min(_BLOCK, len(rest))
        corner = [row[:block] for row in rest[:block]]
        if not _is_definite(corner):
            return False
        if block == len(rest):
            return True
        below = arb_mat([row[:block] for row in rest[block:]])
        try:
            solved = arb_mat(corner).solve(below.transpose())
        except ZeroDivisionError:
            return False
        taken = (below * solved).tolist()
        rest = [
            [entry - less for entry, less in zip(row[block:], own, strict=True)]
            for row, own in zip(rest[block:], taken, strict=True)
        ]
    return True


def _is_definite(matrix: Matrix) -> bool:
    """The same for a small matrix, by elimination: every pivot is positive."""
    rows = [list(row) for row in matrix]
    for k in range(len(rows)):
        if not rows[k][k] > 0:
            return False
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            for j in range(k + 1, len(rows)):
                rows[i][j] -= factor * rows[k][j]
    return True
