"""Proofs of masks checked again, by one file that shares nothing with what made them.

``python solvers/checker.py DIR`` (or ``mipprune check DIR``) reads a folder that ``mipprune
certify`` wrote. It imports NumPy and the standard library; nothing of this project, no PyTorch.

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

**The folder.** See `check_folder`; what files cannot prove, `NOT_PROVEN` says.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
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

NOT_PROVEN = (
    "That the Gram matrices belong to the calibration text cannot be proven from files; "
    "mipprune certify, run again on the recorded model, text, seed and versions, computes them "
    "anew."
)

UNIT = 2.0**-53
_TINY = 2.0**-1022
_SLACK = 1 + 1e-6  # for the roundings of the error bounds themselves
_SAME = 1e-6  # what is recomputed on another machine may differ from the record by so much
_NOTHING = 1e-9  # a loss below this share of a row's scale is no loss


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


class Proven(NamedTuple):
    """What is proven of a layer: how many rows, and the gap of their summed loss."""

    rows: int
    gap: float


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
        scale = float(weight**2 @ gram.diagonal() + abs(linear).sum())
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
    nothing = _NOTHING * scale
    if loss == bound or (abs(loss) <= nothing and abs(loss - bound) <= nothing):
        return 0.0
    return (loss - bound) / abs(loss) if loss else math.inf


def summed(rows: Sequence[Row]) -> Row:
    """Rows together; with shares of a layer's bound, the bound of that layer."""
    bound = _sum_down(row.bound for row in rows)
    return Row(math.fsum(row.loss for row in rows), bound, math.fsum(row.scale for row in rows))


def estimates(rows: Sequence[Row], population: int) -> dict[str, float | None]:
    """Loss, bound and gap of some rows, and what they say about all rows of the layer.

    ``gap_margin`` and ``margin`` are half widths of 95 % confidence intervals: of the gap (ratio
    estimate) and of ``mean_row_gap`` (Student's t, finite population); 0 for all rows, None for
    a single one.
    """
    losses, bounds = np.array([row.loss for row in rows]), np.array([row.bound for row in rows])
    loss, bound, scale = summed(rows)
    of_all = gap(loss, bound, scale)
    gaps = np.array([gap(*row) for row in rows])
    mean = losses.mean()
    apart = (losses - bounds - of_all * losses) / mean if of_all and mean else 0 * losses
    return {
        "loss": loss,
        "bound": bound,
        "gap": of_all,
        "gap_margin": margin(apart, population),
        "mean_row_gap": float(gaps.mean()),
        "margin": margin(gaps, population),
    }


def margin(values: Array, population: int) -> float | None:
    """Half width of the 95 % confidence interval of the mean over the whole population."""
    n = len(values)
    if n == population:
        return 0.0
    if n == 1:
        return None
    spread = float(values.std(ddof=1)) if np.isfinite(values).all() else math.inf
    return _quantile(n - 1) * spread / math.sqrt(n) * math.sqrt(1 - n / population)


def _quantile(freedom: int) -> float:
    """The t that Student's distribution exceeds in absolute value with probability 5 %."""

    def inside(t: float) -> float:  # Abramowitz and Stegun 26.7.3 and 26.7.4
        angle = math.atan2(t, math.sqrt(freedom))
        odd, square = freedom % 2, math.cos(angle) ** 2
        k = np.arange(1, (freedom - odd) // 2 if not odd else (freedom - 1) // 2)
        ratios = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * square
        series = 1 + float(np.cumprod(ratios).sum())
        if not odd:
            return math.sin(angle) * series
        tail = math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0
        return (angle + tail) * 2 / math.pi

    low, high = 0.0, 13.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


# Files ------------------------------------------------------------------------------------------

_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class Tensor(NamedTuple):
    """A stored tensor: its type as safetensors calls it, and its numbers (BF16 as uint16)."""

    dtype: str
    data: Array

    def float64(self) -> Array:
        """The same numbers, exactly."""
        if self.dtype == "BF16":
            wide: Array = self.data.astype(np.uint32) << np.uint32(16)
            return np.asarray(wide.view(np.float32).astype(np.float64))
        if not self.dtype.startswith("F"):
            raise Refused(f"A tensor of type {self.dtype} holds no real numbers.")
        return self.data.astype(np.float64)

    def digest(self) -> str:
        """SHA-256 over type, shape and numbers."""
        head = f"{self.dtype} {self.data.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.data).tobytes()).hexdigest()


def _real_file(path: Path) -> Path:
    """A path that is a file of its own: no link leads to it, or away from it."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        raise Refused(f"There is no file {path}.") from None
    if not stat.S_ISREG(mode) or stat.S_ISLNK(os.lstat(path.parent).st_mode):
        raise Refused(f"{path} is a link or no regular file; put the file itself there.")
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("A name stands twice in a JSON object; keep one.")
    return found


def _no_number(text: str) -> float:
    raise Refused(f"{text} is no number of a record.")


def _json(text: bytes, what: object) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not JSON ({error}).") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, mapped and not yet read, and its metadata.

    The format: eight bytes with the length of a JSON header, the header, and the data, which the
    tensors have to fill without gap or overlap.
    """
    _real_file(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise Refused(f"{path} is shorter than its header says.")
        header = _json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    tensors, ends = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = tuple(about["shape"]), about["data_offsets"]
        if about["dtype"] not in _TYPES:
            raise Refused(f"{path} stores {name} as {about['dtype']}, which is not known here.")
        kind = np.dtype(_TYPES[about["dtype"]])
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise Refused(f"{path} gives {name} an impossible shape or place.")
        if begin != ends or end - begin != math.prod(shape) * kind.itemsize:
            raise Refused(f"{path} gives {name} a place that does not fit its shape.")
        ends = end
        if begin == end:
            data = np.zeros(shape, kind)
        else:
            data = np.memmap(path, kind, "r", 8 + length + begin, shape)
        tensors[name] = Tensor(about["dtype"], data)
    if ends != total - 8 - length:
        raise Refused(f"{path} has {total - 8 - length} bytes of data where {ends} are named.")
    return tensors, metadata


def read_problem(path: Path) -> tuple[Problem, dict[str, str | None]]:
    """A problem, and the digests of its parts as the record has them."""
    stored, _ = read_tensors(path)
    linear = stored.get("linear")
    problem = Problem(
        stored["weight"].float64(),
        stored["gram"].float64(),
        None if linear is None else linear.float64(),
    )
    return problem, {
        name: stored[name].digest() if name in stored else None
        for name in ("weight", "gram", "linear")
    }


def read_claims(path: Path) -> list[Claim]:
    """The certificates of a file."""
    t = {name: tensor.data for name, tensor in read_tensors(path)[0].items()}
    counts = t["cuts"]
    if counts.dtype.kind not in "iu" or t["row"].dtype.kind not in "iu" or (counts < 0).any():
        raise Refused(f"{path.name} counts rows or cuts in no whole numbers.")
    if any(t[name].dtype != np.float64 for name in ("bound", "offset", "shift", "price")):
        raise Refused(f"{path.name} has numbers that are not stored as float64.")
    ends = np.cumsum(counts)
    if len(counts) == 0 or any(len(t[n]) != ends[-1] for n in ("family", "index", "multiplier")):
        raise Refused(f"{path.name} has no rows, or cuts that belong to no row.")
    per_row = ("row", "bound", "offset", "shift", "price", "mask", "diagonal")
    if any(len(t[name]) != len(counts) for name in per_row):
        raise Refused(f"{path.name} has rows of which something is missing.")
    claims = []
    for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
        cuts, price = slice(int(end - count), int(end)), float(t["price"][i])
        about: dict[str, Any] = {n: float(t[n][i]) for n in ("bound", "offset", "shift")}
        about |= {n: t[n][cuts] for n in ("family", "index", "multiplier")}
        about["price"] = None if math.isnan(price) else price
        claims.append(Claim(int(t["row"][i]), t["mask"][i], diagonal=t["diagonal"][i], **about))
    return claims


# A folder as a whole ----------------------------------------------------------------------------


class Checked(dict[str, Proven]):
    """What a folder's files prove: by layer, and of how much of the model.

    Attributes
    ----------
    layers, rows
        Of the record, certified or not.
    missing
        Layers without a certificate.
    no_bound
        Layers whose loss cannot be negative and whose bound is not above zero: nothing is known.
    not_proven
        `NOT_PROVEN`.
    """

    not_proven = NOT_PROVEN

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        self.layers, self.rows = layers, rows
        self.missing: list[str] = []
        self.no_bound: list[str] = []

    @property
    def certified_rows(self) -> int:
        """How many rows are certified."""
        return sum(one.rows for one in self.values())

    @property
    def smallest(self) -> float:
        """Smallest gap of a layer."""
        return min(one.gap for one in self.values())

    @property
    def largest(self) -> float:
        """Largest gap of a layer."""
        return max(one.gap for one in self.values())

    def __str__(self) -> str:
        return (
            f"{coverage_text(len(self), self.layers, self.certified_rows, self.rows)} verified; "
            f"layer gaps {gaps_text([g for _, g in self.values()], len(self.no_bound))}."
        )


def coverage_text(layers: int, of_layers: int, rows: int, of_rows: int) -> str:
    """``7 of 42 layers, 14 of 10 368 rows``."""
    counts = f"{rows:,} of {of_rows:,} rows".replace(",", " ")
    return f"{layers} of {of_layers} layers, {counts}"


def gaps_text(gaps: Sequence[float], unbounded: int) -> str:
    """Smallest and largest gap of layers, of which some have no bound."""
    known = f"{min(gaps):.2%} to {max(gaps):.2%}"
    if not unbounded:
        return known
    if unbounded == len(gaps):
        return "no bound"
    return f"{min(gaps):.2%} to no bound ({unbounded} of {len(gaps)} layers have none)"


class _Folder:
    """A folder's record, masks and weights, each read with suspicion."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = _json(_real_file(path / "mipprune.json").read_bytes(), "mipprune.json")
        self.settings: dict[str, Any] = self.record["settings"]
        self.layers: list[dict[str, Any]] = self.record["layers"]
        self.names = [layer["name"] for layer in self.layers]
        if not self.names or len(set(self.names)) != len(self.names):
            raise Refused("The record names a layer twice, or none.")
        for name in self.names:
            if not isinstance(name, str) or not name or re.search(r"[/\\\0]", name):
                raise Refused(f"{name!r} is no name of a layer.")
        self.masks = self._read_masks()
        self.tensors = self._read_model()

    def _read_masks(self) -> dict[str, Array]:
        """Masks by layer, bool ``[rows, d]``, those that the record's hash is of."""
        stored, metadata = read_tensors(self.path / "masks.safetensors")
        widths, masks, digest = json.loads(metadata["widths"]), {}, hashlib.sha256()
        for name in sorted(stored):
            packed, width = stored[name].data, widths[name]
            if packed.dtype != np.uint8 or packed.shape[1] != -(-width // 8):
                raise Refused(f"Layer {name}: its mask is not one bit per weight.")
            masks[name] = np.unpackbits(packed, axis=1, count=width).astype(bool)
            digest.update(f"{name} {masks[name].shape}".encode())
            digest.update(np.packbits(masks[name], axis=1).tobytes())
        if set(masks) != set(self.names):
            raise Refused("masks.safetensors and the record name different layers.")
        if digest.hexdigest() != self.record["mask_hash"]:
            raise Refused("masks.safetensors is not what the record's hash of the masks says.")
        for layer in self.layers:
            if masks[layer["name"]].shape != (layer["rows"], layer["inputs"]):
                raise Refused(f"Layer {layer['name']}: its mask has not the size in the record.")
        return masks

    def _read_model(self) -> dict[str, Tensor]:
        """The saved model's tensors by name."""
        single, index = "model.safetensors", "model.safetensors.index.json"
        files = [name for name in (single, index) if os.path.lexists(self.path / name)]
        if len(files) != 1:
            raise Refused(f"The folder needs either {single} or {index}, and has {len(files)}.")
        if files == [single]:
            return read_tensors(self.path / single)[0]
        where = _json(_real_file(self.path / index).read_bytes(), index)["weight_map"]
        if any(re.search(r"[/\\\0]", file) for file in where.values()):
            raise Refused(f"{index} names files outside the folder.")
        shards = {file: read_tensors(self.path / file)[0] for file in set(where.values())}
        return {name: shards[file][name] for name, file in where.items()}

    def pattern(self, name: str) -> dict[str, Any]:
        """The pattern of a layer, by the record's rules."""
        rules = self.settings.get("rules")
        default: dict[str, Any] = self.settings["pattern"]
        if rules is None:
            return default
        if rules["default"] != default:
            raise Refused("The record's pattern is not the default of its rules.")
        only = rules["only"]
        dense = any(_matches(one, name) for one in rules["ignore"])
        if dense or (only and not any(_matches(one, name) for one in only)):
            raise Refused("the record's rules leave it dense.")
        for expression, pattern in rules["rules"]:
            if _matches(expression, name):
                default = pattern
                break
        if default is None:
            raise Refused("the record's rules leave it dense.")
        return default

    def sample(self, name: str) -> list[int]:
        """The rows that the recorded seed draws: by block, and by place within the block."""
        about, rows = self.record["certificate"], len(self.masks[name])
        if about["rows"] is None or about["rows"] >= rows:
            return list(range(rows))
        blocks = [self._block(other) for other in self.names]
        own = self.names.index(name)
        place = blocks[:own].count(blocks[own])
        random = np.random.default_rng((about["seed"], blocks[own], place))
        return sorted(int(row) for row in random.choice(rows, about["rows"], replace=False))

    def _block(self, name: str) -> int:
        prefix = self.settings["blocks"] + "."
        number = name.removeprefix(prefix).partition(".")[0]
        if not name.startswith(prefix) or not number.isdecimal():
            raise Refused(f"Layer {name} is in no block of {prefix}")
        return int(number)

    def stored(self, parts: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> Tensor:
        """A layer's weight ``[rows, d]`` out of the saved tensors, as its record says."""
        if not parts:
            raise Refused("its record does not say where the model stores it.")
        found, kinds = [], set()
        for part in parts:
            tensor = self.tensors[part["tensor"]]
            matrix = tensor.data if part["index"] is None else tensor.data[part["index"]]
            found.append(matrix.T if part["transposed"] else matrix)
            kinds.add(tensor.dtype)
        matrix = np.concatenate(found) if len(found) > 1 else found[0]
        if matrix.shape != shape or len(kinds) != 1:
            raise Refused(f"the model stores it as {matrix.shape}, but its mask is {shape}.")
        return Tensor(kinds.pop(), matrix)


def _matches(expression: str, layer: str) -> bool:
    """Whether a name with ``*``, or a regular expression after ``re:``, is a layer's name."""
    if expression.startswith("re:"):
        return re.fullmatch(expression[3:], layer) is not None
    return re.fullmatch(".*".join(map(re.escape, expression.split("*"))), layer) is not None


def check_folder(folder: str | Path, exact: bool = False) -> Checked:
    """Check a certified folder from its files alone.

    For every layer of the record: the mask in ``masks.safetensors`` follows the pattern of the
    record's rules and is the one that the saved weights carry; the certified rows are those that
    the recorded seed draws, their masks the layer's, their kept weights the saved ones (where a
    run changes weights: their digest is the record's); every row's bound is proven; loss, bound,
    gap and margins, computed from these, are those of the record.

    Raises
    ------
    Refused
        If anything of this does not hold.
    """
    what = "The folder"
    try:
        opened = _Folder(Path(folder))
        checked = Checked(len(opened.names), sum(len(mask) for mask in opened.masks.values()))
        for layer in opened.layers:
            what = f"Layer {layer['name']}"
            if layer.get("certificate") is None:
                checked.missing.append(layer["name"])
            else:
                _check_layer(opened, layer, exact, checked)
    except Refused as refused:
        text = str(refused)
        raise Refused(text if what == "The folder" else f"{what}: {text}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever else forged files make of this code is a refusal too
        raise Refused(f"{what} is not what mipprune certify writes ({error!r}).") from error
    if not checked:
        raise Refused(f"{folder} has no certificates; make them with mipprune certify.")
    return checked


def _check_layer(folder: _Folder, layer: dict[str, Any], exact: bool, checked: Checked) -> None:
    name, claimed = layer["name"], layer["certificate"]
    mask, pattern = folder.masks[name], folder.pattern(name)
    wrong = violation(pattern, mask)
    if wrong is not None:
        raise Refused(f"The mask does not follow the pattern: {wrong}.")
    rows = folder.sample(name)
    if claimed["rows"] != rows:
        raise Refused("the certified rows are not those that the recorded seed draws.")
    if "stored" not in claimed:
        raise Refused("it was certified by an older version; run mipprune certify again.")
    saved = folder.stored(claimed["stored"], mask.shape)
    if Tensor(saved.dtype, saved.data[~mask]).float64().any():
        raise Refused("the saved weights are not zero where its mask removes them.")
    proven, plain = _prove_groups(folder, layer, pattern, rows, saved, exact)
    found = estimates(proven, len(mask))
    _check_claimed(claimed, found, sum(one.scale for one in proven))
    loss, bound = found["loss"] or 0.0, found["bound"] or 0.0
    if plain:
        whole = layer["loss"] if layer.get("surrogate_loss") is None else layer["surrogate_loss"]
        # Losses of runs are of the dense model in its own precision; certify allows 1e-3 too.
        if not loss <= whole + 2e-3 * abs(whole) + _NOTHING * sum(one.scale for one in proven):
            raise Refused(f"its rows lose {loss:.6g}, more than the record's {whole:.6g}.")
        if len(rows) == len(mask) and not loss >= whole - 2e-3 * abs(whole):
            raise Refused(f"its rows lose {loss:.6g}, less than the record's {whole:.6g}.")
    checked[name] = Proven(len(rows), found["gap"] or 0.0)
    if plain and bound <= 0 and checked[name].gap > 0:
        checked.no_bound.append(name)


def _check_claimed(
    claimed: Mapping[str, Any], found: Mapping[str, float | None], scale: float
) -> None:
    """Refuse a record whose numbers are not those computed here."""
    for key, value in found.items():
        said = claimed[key]
        if value is None or not math.isfinite(value):
            same = said is None
        else:
            near = abs(value) if key in ("loss", "bound") else max(1.0, abs(value))
            margin = _SAME * near + (1e-12 * scale if key in ("loss", "bound") else 0.0)
            same = isinstance(said, (int, float)) and abs(said - value) <= margin
        if not same:
            raise Refused(f"the record claims the {key} {said!r}, but it is {value!r}.")


def _prove_groups(
    folder: _Folder,
    layer: dict[str, Any],
    pattern: dict[str, Any],
    rows: list[int],
    saved: Tensor,
    exact: bool,
) -> tuple[list[Row], bool]:
    """The certified rows of a layer, by groups with Gram matrices of their own; and if plain."""
    name, claimed, mask = layer["name"], layer["certificate"], folder.masks[layer["name"]]
    step = folder.settings.get("layer_step") or {"update": "none", "surrogate": {}}
    wanted = min(step["surrogate"].get("row_groups", 1), len(mask))
    size, larger = divmod(len(mask), wanted)
    begins = [size * group + min(group, larger) for group in range(wanted + 1)]
    found: list[Row] = []
    plain, digests = True, list(claimed["digests"])
    for group in range(wanted):
        own = [row for row in rows if begins[group] <= row < begins[group + 1]]
        if not own:
            continue
        base = f"{name}.group{group}" if wanted > 1 else name
        place = folder.path / "certificates"
        problem, digest = read_problem(place / f"{base}.problem.safetensors")
        claims = read_claims(place / f"{base}.safetensors")
        if not digests or digests.pop(0) != digest:
            raise Refused("its problem is not the one whose digests the record has.")
        if [c.row for c in claims] != list(range(len(own))) or len(problem.weight) != len(own):
            raise Refused("its files hold other rows than were certified.")
        if not all(np.array_equal(c.mask, mask[row]) for c, row in zip(claims, own, strict=True)):
            raise Refused("a certified mask is not the model's.")
        if step["update"] == "none" and not _same_weights(problem.weight, saved, mask, own):
            raise Refused("the kept weights of its problem are not those of the saved model.")
        part = pattern
        if pattern["kind"] == "per_layer":
            part = {"kind": "per_layer", "keep": int(mask[own].sum())}
        found += prove_rows(problem, part, claims, exact)
        plain = plain and problem.linear is None
    if digests:
        raise Refused("the record has digests of problems that are not there.")
    return found, plain


def _same_weights(weight: Array, saved: Tensor, mask: Array, rows: list[int]) -> bool:
    """Whether kept weights (float64 ``[rows, d]``), rounded to the stored type, are the saved."""
    kept = mask[rows]
    stored, dense = Tensor(saved.dtype, saved.data[rows]).float64()[kept], weight[kept]
    with np.errstate(over="ignore"):
        if saved.dtype != "F64":
            dense = dense.astype(np.float32)
        if saved.dtype == "F16":
            dense = dense.astype(np.float16)
        elif saved.dtype == "BF16":  # to nearest, ties to even
            bits = dense.view(np.uint32).astype(np.uint64)
            bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & 0xFFFF0000
            dense = bits.astype(np.uint32).view(np.float32)
    return bool((stored == dense.astype(np.float64)).all())


def main(arguments: Sequence[str]) -> int:
    """``checker.py DIR [--exact]``: 0 if the folder is what it claims to be."""
    folders = [one for one in arguments if one != "--exact"]
    if len(folders) != 1:
        print("usage: checker.py DIR [--exact]", file=sys.stderr)
        return 2
    try:
        print(f"{check_folder(folders[0], '--exact' in arguments)}\n{NOT_PROVEN}")
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
