"""Proofs of masks checked again, by one file that shares nothing with what made them.

It imports NumPy and the standard library; nothing of this project, no PyTorch. What is stated of a
pattern and proven of a row is here; `checker_folder` reads it from a folder's files.

**The claim.** A row with weights w, Gram matrix G and perhaps a linear term l loses, when its mask
removes the inputs with ``x_i = 1``, ``f(x) = x^T Q x + l^T x`` with ``Q = Diag(w) G Diag(w)``. The
inputs fall into cells (the row, or groups of consecutive inputs), and of cell g exactly ``s_g`` are
removed. A bound is claimed below which no such x can come.

**The proof.** For binary x, ``x_i^2 = x_i`` and every cut of `CUTS` is non-negative. So for any
numbers ``gamma`` and ``D`` (of either sign) and ``u >= 0``, with ``y = (1, x)``,

    f(x) >= gamma - const(u) + y^T C y,
    C = [0 l/2; l/2 Q] - gamma E_00 - (D on x_i^2 - x_i) - sum_c u_c (cut_c without its constant).

Let x^ be any x with the right counts (the certificate's own mask), and l(g) an input of cell g.
Every y whose counts are right (sum over cell g = ``s_g y_0``) is ``y = N z`` with the integer
matrix ``N = [(1, x^) | e_i - e_l(g) for every other input i of every cell g]``. If therefore

    T = N^T (C + shift I) N   is positive semi-definite,

then ``y^T C y >= -shift |y|^2 = -shift (1 + number removed)`` for all of them, which is the bound
``gamma - const(u) - shift (1 + number removed)``. Rows that share a budget have no counts of their
own: there l is less by a price per removed weight, N is the identity, at most all inputs are
removed, and the rows' bounds plus the price times the number of removed weights bound their sum.

**Why floating point suffices.** Let ``u = 2^-53`` and ``gamma_k = k u / (1 - k u)``. A number that
is a sum of products, each formed and added with at most k roundings, is computed with an error of
at most ``gamma_k`` times the same sum of absolute values (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 3). Computing T from absolute values (every sign a plus) thus
bounds the error of each entry, and the Frobenius norm of these bounds bounds the error of T in the
spectral norm. The Cholesky factor R that is computed for a matrix A satisfies ``R^T R = A + F``
with ``|F| <= gamma_{n+1} |R^T| |R|`` (Higham, theorem 10.3), so ``|F|_2 <= gamma_{n+1} |R|_F^2 <=
gamma_{n+1} / (1 - gamma_{n+1}) trace(A)`` (Rump, Verification of positive definiteness, BIT 46,
2006). If T less the sum of both (and of what underflow and this subtraction change) on its diagonal
has a factor, and that factor is finite, T is positive semi-definite. With ``exact`` nothing of this
is needed: what the factor leaves of T is computed in ball arithmetic (`checker_exact`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CUTS: tuple[tuple[tuple[int, int, int], tuple[int, int, int], int], ...] = (
    ((1, 0, 0), (0, 0, 0), 0),
    ((-1, 0, 0), (1, 0, 0), 0),
    ((1, 0, 0), (-1, -1, 0), 1),
    ((-1, -1, 1), (1, 0, 0), 0),
    ((1, 1, 1), (-1, -1, -1), 1),
)
"""Families of cuts on inputs (i, j, k): coefficients of (x_i x_j, x_i x_k, x_j x_k), of
(x_i, x_j, x_k), and the constant; non-negative for all binary x, also where inputs coincide."""

UNIT = 2.0**-53
_TINY = 2.0**-1022
_SLACK = 1 + 1e-6  # for the roundings of the error bounds themselves
NOTHING = 1e-9  # a loss below this share of a row's scale is no loss


class Refused(ValueError):
    """What was to be checked does not prove what it claims; one sentence."""


class Claim(NamedTuple):
    """One row's bound with its witness, as the module's text names them.

    ``mask`` is bool ``[d]``, True = keep; ``diagonal`` float64 ``[d]``; ``family`` ``[cuts]`` and
    ``index`` ``[cuts, 3]`` integers; ``multiplier`` float64 ``[cuts]``; ``price`` None where the
    row has counts of its own.
    """

    row: int
    mask: Array
    bound: float
    offset: float
    diagonal: Array
    family: Array
    index: Array  # type: ignore[assignment]  # tuples have a method of that name
    multiplier: Array
    shift: float
    price: float | None


class Problem(NamedTuple):
    """Rows that share a Gram matrix, float64: ``[rows, d]``, ``[d, d]``, ``[rows, d]`` or None."""

    weight: Array
    gram: Array
    linear: Array | None


class Row(NamedTuple):
    """What is proven of a row: its loss, the bound (priced: its share), and its numbers' scale."""

    loss: float
    bound: float
    scale: float


# Patterns ---------------------------------------------------------------------------------------


def cells(pattern: Mapping[str, Any], rows: int, d: int) -> tuple[int, int]:
    """Size of a pattern's cells in a layer ``[rows, d]``, and how many each keeps."""
    kind, sparsity = pattern["kind"], pattern.get("sparsity")
    keep: Any = pattern.get("keep")
    if kind == "nm":
        size = pattern["group"]
        if d % size:
            raise Refused(f"Groups of {size} inputs do not fit {d} inputs.")
    elif kind in ("per_row", "per_layer"):
        size = d if kind == "per_row" else rows * d
        if (keep is None) == (sparsity is None):
            raise Refused("A pattern says either how many weights it keeps or its sparsity.")
        if keep is None:
            keep = size - _removed(size, float(sparsity or 0.0))
    else:
        raise Refused(f"The pattern {kind!r} has no cells of fixed count.")
    if type(keep) is not int or type(size) is not int or not 0 <= keep <= size:
        raise Refused(f"A cell of {size} weights cannot keep {keep}.")
    return size, keep


def _removed(size: int, sparsity: float) -> int:
    """The whole number that is not above the decimal that the sparsity reads, times the size."""
    if not 0 < sparsity < 1:
        raise Refused(f"A sparsity is a share between 0 and 1, not {sparsity}.")
    exact = Fraction(repr(sparsity)) * size
    below = exact.numerator // exact.denominator
    return below + (below + 1 - exact <= max(1e-9, 4e-16 * size))


def violation(pattern: Mapping[str, Any], mask: Array) -> str | None:
    """Why a mask (bool ``[rows, d]``) does not follow a pattern; None if it does."""
    size, keep = cells(pattern, *mask.shape)
    counts = mask.reshape(-1, size).sum(axis=1)
    wrong = np.flatnonzero(counts != keep)
    return f"a cell keeps {counts[wrong[0]]} weights, not {keep}" if len(wrong) else None


# The proof of a row -----------------------------------------------------------------------------


def gamma(k: float) -> float:
    """Relative error of k roundings."""
    return k * UNIT / (1 - k * UNIT)


def prove_rows(
    problem: Problem, pattern: Mapping[str, Any], claims: Sequence[Claim], exact: bool = False
) -> list[Row]:
    """Check certificates of some rows of a problem (of all where they share a budget).

    Raises
    ------
    Refused
        If one of them does not prove what it claims.
    """
    rows, d = _checked(problem).weight.shape
    coupled = pattern["kind"] == "per_layer"
    size, keep = cells(pattern, rows, d)
    for claim in claims:
        _check_types(claim, rows, d, coupled)
    if coupled:
        if sorted(c.row for c in claims) != list(range(rows)):
            raise Refused(f"The rows share a budget, so each of the {rows} needs one certificate.")
        if len({c.price for c in claims}) != 1:
            raise Refused("Rows that share a budget need one price, the same in all.")
    kept = np.stack([c.mask for c in claims]) if claims else np.zeros((0, d), bool)
    wrong = violation(pattern, kept) if len(kept) else None
    if wrong is not None:
        raise Refused(f"The masks do not follow the pattern: {wrong}.")
    found = []
    for claim in claims:
        try:
            found.append(_prove(problem, claim, None if coupled else size, keep, exact))
        except Refused as refused:
            raise Refused(f"Row {claim.row}: {refused}") from None
    return found


def _checked(problem: Problem) -> Problem:
    weight, gram, linear = problem
    d = weight.shape[-1]
    if weight.ndim != 2 or gram.shape != (d, d) or 0 in weight.shape:
        raise Refused(f"The weight {weight.shape} and the Gram matrix {gram.shape} do not fit.")
    if linear is not None and linear.shape != weight.shape:
        raise Refused(f"The linear term {linear.shape} does not fit the weight {weight.shape}.")
    for values in (weight, gram) if linear is None else (weight, gram, linear):
        if values.dtype != np.float64 or not np.isfinite(values).all():
            raise Refused("The problem has NaN or infinite values, which prove nothing.")
    if not (gram == gram.T).all():
        raise Refused("The Gram matrix is not symmetric, so it is none.")
    return problem


def _check_types(c: Claim, rows: int, d: int, coupled: bool) -> None:
    """Refuse a certificate whose parts are not what they have to be."""
    where = f"Row {c.row}"
    if not 0 <= c.row < rows:
        raise Refused(f"{where} is not among the problem's {rows} rows.")
    if c.mask.dtype != np.bool_ or c.mask.shape != (d,):
        raise Refused(f"{where}: the mask is not one truth value for each of {d} inputs.")
    if c.diagonal.dtype != np.float64 or c.multiplier.dtype != np.float64:
        raise Refused(f"{where}: diagonal and multipliers must be stored as float64.")
    if c.family.dtype.kind not in "iu" or c.index.dtype.kind not in "iu":
        raise Refused(f"{where}: families and inputs of cuts must be stored as integers.")
    if c.diagonal.shape != (d,) or c.family.ndim != 1:
        raise Refused(f"{where}: the diagonal or the families do not fit {d} inputs.")
    if c.index.shape != (len(c.family), 3) or c.multiplier.shape != c.family.shape:
        raise Refused(f"{where}: the cuts' families, inputs and multipliers differ in number.")
    if (c.price is not None) != coupled:
        raise Refused(
            f"{where} needs a price, since its layer shares a budget."
            if coupled
            else f"{where} has a price, but a number of its own to keep."
        )
    scalars = [c.bound, c.offset, c.shift, c.price or 0.0]
    if not all(np.isfinite(part).all() for part in (scalars, c.diagonal, c.multiplier)):
        raise Refused(f"{where}: the witness has NaN or infinite numbers.")
    for values, end in ((c.family, len(CUTS)), (c.index, d)):
        if values.size and not (values.min() >= 0 and values.max() < end):
            raise Refused(f"{where}: a cut names no family or inputs that there are.")
    if (c.multiplier < 0).any() or c.shift < 0:
        raise Refused(f"{where}: a multiplier or the shift is negative.")


def _prove(problem: Problem, c: Claim, size: int | None, keep: int, exact: bool) -> Row:
    """One row; ``size`` and ``keep`` of its cells, or None where it is priced."""
    weight, gram = problem.weight[c.row], problem.gram
    linear = np.zeros(len(weight)) if problem.linear is None else problem.linear[c.row]
    removed, d = np.flatnonzero(~c.mask), len(weight)
    most = d if size is None else d // size * (size - keep)
    with np.errstate(all="ignore"):
        # What the mask loses, and how far rounding may have put that off.
        w, block = weight[removed], gram[np.ix_(removed, removed)]
        paid = (c.price or 0.0) * len(removed)
        loss = float(w @ block @ w + linear[removed].sum())
        size_of_loss = float(abs(w) @ abs(block) @ abs(w) + abs(linear[removed]).sum())
        unsure = gamma(2 * d + 8) * _SLACK * (size_of_loss + abs(paid)) + d * d * _TINY
        if exact:
            ball = importlib.import_module(
                f"{__package__}.checker_exact" if __package__ else "checker_exact"
            )
            leaders = _leaders(abs(gram * weight).sum(axis=1) * abs(weight), size)
            proven = ball.proven(weight, gram, linear, c, CUTS, removed, leaders, most)
        else:
            proven = _value(c, most) if _is_semidefinite(weight, gram, linear, c, size) else None
        scale = float(w**2 @ block.diagonal() + abs(linear[removed]).sum())
    if proven is None:
        raise Refused("the witness' matrix is not positive semi-definite, so it proves nothing.")
    if not np.isfinite([proven, loss, unsure, scale]).all():
        raise Refused("its numbers overflow, so they prove nothing.")
    if c.bound > proven:
        raise Refused(f"it claims the bound {c.bound!r}, but only {proven!r} is proven.")
    if proven > loss - paid + unsure:
        raise Refused(f"its mask is allowed and loses {loss - paid!r}, less than {proven!r}.")
    # A row's share of a layer's bound: only the sum of all shares is one.
    share = proven
    if c.price is not None:
        high, low = _product(-c.price, len(removed))
        share = _sum_down([proven, -high, -low])
    return Row(loss, share, scale)


def _sum_down(terms: Iterable[float]) -> float:
    """The exact sum, rounded down."""
    terms = list(terms)
    nearest = math.fsum(terms)
    return nearest if math.fsum([*terms, -nearest]) >= 0 else math.nextafter(nearest, -math.inf)


def _product(value: float, count: int) -> tuple[float, float]:
    """Two floats whose sum is ``value * count``, or above it where that underflows."""
    high = value * count
    rest = Fraction(value) * count - Fraction(high)
    low = float(rest)
    return high, low if low >= rest else math.nextafter(low, math.inf)


def _value(c: Claim, most: int) -> float:
    """``gamma - const(u) - shift (1 + removed)``, rounded down."""
    u = c.multiplier[np.array([cut[2] for cut in CUTS])[c.family] != 0]
    if not np.isfinite(u.sum() + c.shift * (1 + most)):
        return math.nan
    high, low = _product(c.shift, 1 + most)
    return _sum_down([c.offset, *-u, -high, -low])


def _leaders(magnitude: Array, size: int | None) -> Array | None:
    """In each cell the input with the smallest entries, int ``[d / size]``; any would do."""
    if size is None:
        return None
    groups = magnitude.reshape(-1, size)
    return np.asarray(groups.argmin(axis=1) + size * np.arange(len(groups)))


def _is_semidefinite(weight: Array, gram: Array, linear: Array, c: Claim, size: int | None) -> bool:
    """Whether T is proven to be positive semi-definite; the module's text says why."""
    form, magnitude, roundings = _form(weight, gram, linear, c)
    leaders = _leaders(magnitude[1:].sum(axis=1), size)
    removed = np.flatnonzero(~c.mask)
    tested, bound = _reduced(form, removed, leaders, -1), _reduced(magnitude, removed, leaders, 1)
    n = len(tested)
    # Each entry: its roundings in C, and one for each sum over two columns and two rows; the
    # first row and column are sums over all removed inputs.
    error = gamma(roundings + 4) * bound
    error[0] = gamma(roundings + 4 + 2 * len(removed)) * bound[0]
    error[:, 0] = error[0]
    # Rows of zeros (weights or inputs that are zero) are exactly that, and prove themselves.
    live = bound.any(axis=1)
    if not live.any():
        return True
    tested, error = tested[np.ix_(live, live)], error[np.ix_(live, live)]
    diagonal = tested.diagonal()
    trace, largest = float(abs(diagonal).sum()), float(abs(diagonal).max())
    rump = gamma(n + 1) / (1 - gamma(n + 1)) * trace
    guard = float(np.linalg.norm(error)) + rump + 4 * UNIT * largest
    underflow = float(n + len(c.family)) ** 3 * _TINY * (1 + abs(weight).max()) * (1 + largest)
    guard = (guard + underflow) * _SLACK
    tested[np.diag_indices(len(tested))] -= guard
    if not (np.isfinite(guard) and np.isfinite(tested).all() and np.isfinite(error).all()):
        return False
    try:
        factor = np.linalg.cholesky(tested)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(factor).all())  # NaN does not stop the factorisation


def _form(weight: Array, gram: Array, linear: Array, c: Claim) -> tuple[Array, Array, float]:
    """``C + shift I``, the same sums of absolute values, and the most roundings of an entry."""
    d = len(weight)
    form = np.zeros((d + 1, d + 1))
    form[1:, 1:] = weight[:, None] * gram * weight
    magnitude = abs(form)
    # What underflows is not zero.
    magnitude[1:, 1:] += _TINY * ((gram != 0) & (weight != 0)[:, None] & (weight != 0))
    price = c.price or 0.0
    border, size = linear - price + c.diagonal, abs(linear) + abs(price) + abs(c.diagonal)
    inputs = 1 + np.arange(d)
    form[inputs, inputs] += c.shift - c.diagonal
    magnitude[inputs, inputs] += c.shift + abs(c.diagonal)
    terms = np.zeros((d + 1, d + 1), np.int32)
    for family, (products, singles, _) in enumerate(CUTS):
        chosen = c.family == family
        u, at = c.multiplier[chosen], c.index[chosen].astype(np.int64)
        for sign, (a, b) in zip(products, ((0, 1), (0, 2), (1, 2)), strict=True):
            for i, j in ((at[:, a] + 1, at[:, b] + 1), (at[:, b] + 1, at[:, a] + 1)):
                if sign:
                    np.add.at(form, (i, j), -sign * u / 2)
                    np.add.at(magnitude, (i, j), u / 2)
                    np.add.at(terms, (i, j), 1)
        for sign, a in zip(singles, range(3), strict=True):
            if sign:
                np.add.at(border, at[:, a], -sign * u)
                np.add.at(size, at[:, a], u)
                np.add.at(terms[0], at[:, a] + 1, 1)
    form[0, 1:] = form[1:, 0] = border / 2
    magnitude += _TINY * (terms > 0)
    magnitude[0, 1:] = magnitude[1:, 0] = size / 2 + _TINY * (size > 0)
    form[0, 0], magnitude[0, 0] = c.shift - c.offset, c.shift + abs(c.offset)
    return form, magnitude, float(terms.max()) + 6


def _reduced(matrix: Array, removed: Array, leaders: Array | None, sign: int) -> Array:
    """``N^T M N``, with ``sign`` in the place of N's minus signs."""
    if leaders is None:
        return matrix
    d = len(matrix) - 1
    others = np.setdiff1d(np.arange(d), leaders)
    their = leaders[others // (d // len(leaders))]
    for _ in range(2):  # columns, then rows
        first = matrix[:, 0] + matrix[:, 1 + removed].sum(axis=1)
        rest = matrix[:, 1 + others] + sign * matrix[:, 1 + their]
        matrix = np.asarray(np.column_stack([first, rest]).T)
    return matrix


# What is said of several rows -------------------------------------------------------------------


def gap(loss: float, bound: float, scale: float) -> float:
    """``(loss - bound) / |loss|``; 0 where both are nothing on the scale of their numbers."""
    nothing = NOTHING * scale
    if loss == bound or (abs(loss) <= nothing and abs(loss - bound) <= nothing):
        return 0.0
    return (loss - bound) / abs(loss) if loss else math.inf


def summed(rows: Sequence[Row]) -> Row:
    """Rows together; with shares of a layer's bound, the bound of that layer."""
    bound = _sum_down(row.bound for row in rows)
    return Row(math.fsum(row.loss for row in rows), bound, math.fsum(row.scale for row in rows))
