"""Certificates: bounds that can be re-verified from files alone.

A certificate file holds, for rows of a problem, the mask and the witness of a lower bound. The
checker here shares no code with the solvers: from the problem and the file it rebuilds, in
float64 and with a guard for rounding, why no allowed mask can cost less than the bound.

The argument for a row with ``x = 1 - mask``, ``y = (1, x)``, ``Q = Diag(w) G Diag(w)``: for binary
x with the pattern's counts, ``x_i^2 = x_i`` and every cut of `CUTS` is non-negative, so for any
``gamma``, ``D`` and ``u >= 0``

    loss(x) >= gamma - const(u) + y^T C y,
    C = [0 l/2; l/2 Q] - gamma E_00 - Diag(D) on (x_i^2 - x_i) - sum_c u_c (cut_c without const).

If ``C + shift I`` is positive semi-definite on the vectors that satisfy the counts, then
``y^T C y >= -shift |y|^2 = -shift (1 + pruned)``.

Where the rows of a layer share a budget, a certificate has a price ``lambda`` and bounds
``loss(x) - lambda 1^T x`` over all binary x, whatever their counts. With the same price in all
rows, the bounds plus the price times the number of pruned weights bound the layer's loss.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import InvalidInput
from .files import replaced_on_success
from .pattern import CellPattern
from .problem import MaskProblem

Array = npt.NDArray[Any]

_ROUNDING = float(np.finfo(np.float64).eps)

CUTS: tuple[tuple[tuple[int, int, int], tuple[int, int, int], int], ...] = (
    ((1, 0, 0), (0, 0, 0), 0),
    ((-1, 0, 0), (1, 0, 0), 0),
    ((1, 0, 0), (-1, -1, 0), 1),
    ((-1, -1, 1), (1, 0, 0), 0),
    ((1, 1, 1), (-1, -1, -1), 1),
)
"""Families of cuts on inputs (i, j, k): coefficients of (x_i x_j, x_i x_k, x_j x_k), of
(x_i, x_j, x_k), and the constant; non-negative for all binary x."""


class InvalidCertificate(InvalidInput):
    """A certificate that does not prove what it claims."""


@dataclass(frozen=True)
class Certificate:
    """Mask and bound of one row, with the witness.

    Attributes
    ----------
    row
        Of the problem.
    mask
        Bool ``[d]``, True = keep.
    bound
        Claimed: no allowed mask of this row costs less (less ``price`` per pruned weight).
    offset, diagonal, family, index, multiplier, shift
        ``gamma``; ``D`` ``[d]``; families, inputs ``[cuts, 3]`` and multipliers of the cuts; shift.
    price
        ``lambda`` where the rows share a budget; None where they do not.
    """

    row: int
    mask: Array
    bound: float
    offset: float
    diagonal: Array
    family: Array
    index: Array
    multiplier: Array
    shift: float
    price: float | None = None


@dataclass(frozen=True)
class Verified:
    """What the checker found of one row, all recomputed.

    Where rows share a budget, ``bound`` is the row's share: only the sum over all rows means
    anything.
    """

    row: int
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """``(objective - bound) / |objective|``."""
        if self.objective == self.bound:
            return 0.0
        return (self.objective - self.bound) / abs(self.objective)


def check(problem: MaskProblem, certificates: Sequence[Certificate]) -> list[Verified]:
    """Verify certificates against a problem.

    Returns
    -------
    list of Verified
        Objective and bound of every row, recomputed; the bound is the proven one.

    Raises
    ------
    InvalidCertificate
        If a mask breaks the pattern, a multiplier has the wrong sign, a cut names no inputs, the
        matrix is not positive semi-definite, or the claimed bound is above the proven one; where
        rows share a budget, also if a row is missing or the prices differ.
    """
    if problem.pattern.coupled:
        _check_layer(problem, certificates)
    return [_check_row(problem, certificate) for certificate in certificates]


def _check_layer(problem: MaskProblem, certificates: Sequence[Certificate]) -> None:
    """What the rows of a shared budget must have in common."""
    rows, d = problem.shape
    if sorted(c.row for c in certificates) != list(range(rows)):
        raise InvalidCertificate(
            f"The rows share a budget, so each of the {rows} needs one certificate."
        )
    prices = {c.price for c in certificates}
    if len(prices) != 1 or None in prices:
        raise InvalidCertificate("Rows that share a budget need one price, the same in all.")
    if any(c.mask.shape != (d,) or c.mask.dtype != np.bool_ for c in certificates):
        raise InvalidCertificate(f"A mask does not fit {d} inputs.")
    ordered = sorted(certificates, key=lambda c: c.row)
    mask = torch.from_numpy(np.stack([c.mask for c in ordered]))
    violation = problem.pattern.violation(mask)
    if violation is not None:
        raise InvalidCertificate(f"The masks do not follow the pattern: {violation}.")


def _check_row(problem: MaskProblem, certificate: Certificate) -> Verified:
    rows, d = problem.shape
    pattern, c = problem.pattern, certificate
    where = f"Row {c.row}"
    if not 0 <= c.row < rows:
        raise InvalidCertificate(f"{where} is not among the problem's {rows} rows.")
    if not isinstance(pattern, CellPattern):
        raise InvalidCertificate(f"The pattern {pattern} has no cells.")
    if c.price is not None and not pattern.coupled:
        raise InvalidCertificate(f"{where} has a price, but a number of its own to keep.")
    if c.mask.shape != (d,) or c.mask.dtype != np.bool_ or c.diagonal.shape != (d,):
        raise InvalidCertificate(f"{where}: mask or diagonal does not fit {d} inputs.")
    if c.index.shape != (len(c.family), 3) or c.multiplier.shape != c.family.shape:
        raise InvalidCertificate(f"{where}: the cuts' families, inputs and multipliers differ.")
    price = c.price or 0.0
    numbers = [c.bound, c.offset, c.shift, price, *c.diagonal, *c.multiplier]
    if not np.isfinite(numbers).all():
        raise InvalidCertificate(f"{where}: the witness has NaN or infinite numbers.")
    if len(c.family) and not (
        (c.family >= 0).all()
        and (c.family < len(CUTS)).all()
        and (c.index >= 0).all()
        and (c.index < d).all()
    ):
        raise InvalidCertificate(f"{where}: a cut names no family or inputs that there are.")
    if (c.multiplier < 0).any() or c.shift < 0:
        raise InvalidCertificate(f"{where}: a multiplier or the shift is negative.")
    counts = np.zeros((d, 0))
    ones = np.zeros(0)
    if not pattern.coupled:
        violation = pattern.violation(torch.from_numpy(c.mask)[None])
        if violation is not None:
            raise InvalidCertificate(f"{where}: the mask does not follow the pattern: {violation}.")
        size = pattern.cell_size((1, d))
        ones = np.full(d // size, size - pattern.kept_per_cell((1, d)))
        counts = np.repeat(np.eye(d // size), size, axis=0)
    weight, gram = problem.weight[c.row].double().cpu().numpy(), problem.gram.double().cpu().numpy()
    linear = np.zeros(d) if problem.linear is None else problem.linear[c.row].cpu().numpy()
    quadratic = weight[:, None] * gram * weight
    proven = _proven_bound(quadratic, linear - price, counts, ones, c, where)
    if c.bound > proven:
        raise InvalidCertificate(
            f"{where} claims the bound {c.bound!r}, but only {proven!r} is proven."
        )
    x = (~c.mask).astype(np.float64)
    loss = float(x @ quadratic @ x + linear @ x)
    paid = price * float(x.sum())
    bound = proven + paid - 4 * _ROUNDING * (abs(proven) + abs(paid)) if paid else proven
    return Verified(c.row, loss, bound)


def _proven_bound(
    quadratic: Array, linear: Array, counts: Array, ones: Array, c: Certificate, where: str
) -> float:
    """The bound that the witness proves for ``x^T Q x + l^T x`` where ``counts^T x = ones``."""
    d = len(linear)
    form = np.zeros((d + 1, d + 1))
    form[1:, 1:] = quadratic - np.diag(c.diagonal)
    border = linear + c.diagonal
    constant = c.offset
    magnitude = np.abs(form).sum() + np.abs(c.diagonal).sum() + abs(c.offset)
    for family, (products, singles, one) in enumerate(CUTS):
        chosen = c.family == family
        u, at = c.multiplier[chosen], c.index[chosen]
        for coefficient, (a, b) in zip(products, ((0, 1), (0, 2), (1, 2)), strict=True):
            np.add.at(form, (1 + at[:, a], 1 + at[:, b]), -coefficient * u / 2)
            np.add.at(form, (1 + at[:, b], 1 + at[:, a]), -coefficient * u / 2)
        for coefficient, a in zip(singles, range(3), strict=True):
            np.add.at(border, at[:, a], -coefficient * u)
        constant -= one * u.sum()
        magnitude += 8 * u.sum()
    form[0, 1:] = form[1:, 0] = border / 2
    form[0, 0] = -c.offset
    normals = np.linalg.qr(np.vstack([-ones, counts]))[0]
    if not _is_semidefinite_beside(form, normals, c.shift):
        raise InvalidCertificate(
            f"{where}: the witness' matrix is not positive semi-definite, so it proves nothing."
        )
    total = 1 + (ones.sum() if len(ones) else d)
    value = constant - c.shift * total
    return float(value - 4 * _ROUNDING * (d + 8) * (magnitude + c.shift * total))


def _is_semidefinite_beside(form: Array, normals: Array, shift: float) -> bool:
    """Whether ``form + shift I`` is positive semi-definite on the complement of ``normals``.

    A Cholesky factorisation in floating point that succeeds proves it for a matrix within a few
    ``n eps |form|`` (Rump 2006), which is taken off the shift first.
    """
    n, norm = len(form), float(np.linalg.norm(form))
    if norm == 0:
        return True
    projector = np.eye(n) - normals @ normals.T
    tested = projector @ form @ projector
    tested = (tested + tested.T) / 2 + norm * (normals @ normals.T)
    tested += (shift - 8 * n * _ROUNDING * norm) * np.eye(n)
    try:
        np.linalg.cholesky(tested)
    except np.linalg.LinAlgError:
        return False
    return True


_SCALARS = ("row", "bound", "offset", "shift")
_PER_ROW = ("mask", "diagonal")
_PER_CUT = ("family", "index", "multiplier")


def save_certificates(path: str | os.PathLike[str], certificates: Sequence[Certificate]) -> None:
    """Write certificates of one problem as safetensors."""
    from safetensors.numpy import save_file

    tensors = {
        **{n: np.array([getattr(c, n) for c in certificates]) for n in _SCALARS},
        "price": np.array([np.nan if c.price is None else c.price for c in certificates]),
        **{n: np.stack([getattr(c, n) for c in certificates]) for n in _PER_ROW},
        **{n: np.concatenate([getattr(c, n) for c in certificates]) for n in _PER_CUT},
        "cuts": np.array([len(c.family) for c in certificates]),
    }
    with replaced_on_success(path) as temporary:
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, temporary)


def load_certificates(path: str | os.PathLike[str]) -> list[Certificate]:
    """Read certificates.

    Raises
    ------
    InvalidCertificate
        If the file is missing, unreadable or incomplete.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise InvalidCertificate(f"There are no certificates at {path}.")
    try:
        t = load_file(path)
        ends = t["cuts"].cumsum()
        spans = [slice(end - n, end) for end, n in zip(ends, t["cuts"], strict=True)]
        if not all(len(t[name]) == ends[-1] for name in _PER_CUT):
            raise InvalidCertificate(f"{path} has cuts that belong to no row.")
        return [
            Certificate(
                row=int(t["row"][i]),
                mask=t["mask"][i],
                bound=float(t["bound"][i]),
                offset=float(t["offset"][i]),
                diagonal=t["diagonal"][i],
                family=t["family"][span],
                index=t["index"][span],
                multiplier=t["multiplier"][span],
                shift=float(t["shift"][i]),
                price=None if np.isnan(t["price"][i]) else float(t["price"][i]),
            )
            for i, span in enumerate(spans)
        ]
    except (SafetensorError, KeyError, IndexError, ValueError) as error:
        raise InvalidCertificate(f"{path} is no file of certificates ({error}).") from error
