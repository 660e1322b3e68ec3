"""Certificates: bounds that can be re-verified from files alone.

A certificate holds, for a row of a problem, the mask and the witness of a lower bound. The argument
is written, and checked, in `solvers.checker`, which imports nothing of the solvers; here are the
file format and the way from a `MaskProblem` to that checker.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import checker
from .arrays import short
from .checker import CUTS
from .errors import InvalidInput
from .files import replaced_on_success
from .options import finite_number, whole_number
from .pattern import CellPattern
from .problem import MaskProblem

__all__ = [
    "CUTS",
    "Certificate",
    "InvalidCertificate",
    "Verified",
    "check",
    "check_rows",
    "load_certificates",
    "save_certificates",
]

Array = npt.NDArray[Any]


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
    """What the checker found of one row, or of a layer with one budget; all recomputed.

    Attributes
    ----------
    row
        Of the problem; None for all rows together, where they share a budget.
    objective, bound
        What the mask loses, and what no allowed mask loses less than.
    scale
        What the two numbers are made of, `MaskProblem.scale` of the mask.
    """

    row: int | None
    objective: float
    bound: float
    scale: float = 0.0

    @property
    def gap(self) -> float:
        """``(objective - bound) / |objective|``; 0 where both are nothing on their scale."""
        return checker.gap(self.objective, self.bound, self.scale)


def check(
    problem: MaskProblem, certificates: Iterable[Certificate], *, exact: bool = False
) -> list[Verified]:
    """Verify certificates against a problem.

    Parameters
    ----------
    problem
        Of which the certificates are.
    certificates
        Of some rows; of all where they share a budget.
    exact
        Repeat the proof in ball arithmetic (needs python-flint) instead of floating point.

    Returns
    -------
    list of Verified
        Objective and bound of every row, recomputed; the bound is the proven one. Where the rows
        share a budget: one for all of them.

    Raises
    ------
    InvalidCertificate
        If a mask breaks the pattern, a multiplier has the wrong sign, a cut names no inputs, a
        number is not finite, the matrix is not positive semi-definite, or the claimed bound is
        above the proven one or the objective; where rows share a budget, also if a row is missing
        or the prices differ.
    """
    claims = _claims(certificates)
    rows = _proven(problem, claims, exact)
    if not problem.pattern.coupled:
        return [Verified(c.row, *row) for c, row in zip(claims, rows, strict=True)]
    try:
        return [Verified(None, *checker.summed(rows))]
    except OverflowError:
        raise InvalidCertificate(_OVERFLOW) from None


def check_rows(
    problem: MaskProblem, certificates: Iterable[Certificate], *, exact: bool = False
) -> list[checker.Row]:
    """`check`, row by row also where they share a budget.

    Then a row's bound is only its share, ``B_r + price * pruned_r``: the sum of all is a bound.
    """
    return _proven(problem, _claims(certificates), exact)


_OVERFLOW = "The certificates' numbers overflow, so they prove nothing."


def _proven(problem: MaskProblem, claims: list[checker.Claim], exact: bool) -> list[checker.Row]:
    """The checker's answer, its refusals as `InvalidCertificate`."""
    if not isinstance(exact, (bool, np.bool_)):
        raise InvalidInput(f"exact={short(exact)} must be True or False.")
    if not isinstance(problem.pattern, CellPattern):
        raise InvalidCertificate(f"The pattern {problem.pattern} has no cells of fixed count.")
    arrays = checker.Problem(
        problem.weight.double().cpu().numpy(),
        problem.gram.double().cpu().numpy(),
        None if problem.linear is None else problem.linear.double().cpu().numpy(),
    )
    try:
        return checker.prove_rows(arrays, problem.pattern.to_dict(), claims, bool(exact))
    except checker.Refused as refused:
        raise InvalidCertificate(str(refused)) from None
    except OverflowError:
        raise InvalidCertificate(_OVERFLOW) from None
    except ModuleNotFoundError as error:
        raise InvalidInput(str(error)) from None


def _claims(certificates: Iterable[Certificate]) -> list[checker.Claim]:
    """What the checker reads of each certificate, in the types that it works with."""
    if not isinstance(certificates, Iterable):
        raise InvalidCertificate(f"{short(certificates)} is no list of certificates.")
    claims = [_claim(one) for one in certificates]
    for row, count in Counter(claim.row for claim in claims).items():
        if count > 1:
            raise InvalidCertificate(f"Row {row} has {count} certificates; give one.")
    return claims


def _claim(c: Any) -> checker.Claim:
    if not isinstance(c, Certificate):
        raise InvalidCertificate(f"{short(c)} is no certificate.")
    try:
        row = whole_number(c.row, "A certificate's row")
        where = f"Row {row}: "
        scalars: Any = {name: finite_number(getattr(c, name), where + name) for name in _NUMBERS}
        arrays: Any = {name: _array(getattr(c, name), where + name) for name in _PER_ROW + _PER_CUT}
        price = None if c.price is None else finite_number(c.price, where + "price")
    except InvalidInput as refused:
        raise InvalidCertificate(str(refused)) from None
    return checker.Claim(row=row, price=price, **scalars, **arrays)


def _array(values: Any, name: str) -> Array:
    """An array of plain numbers; which ones and how many is the checker's matter."""
    if isinstance(values, Tensor):
        values = values.detach()
        if values.is_meta or values.layout != torch.strided:
            raise InvalidInput(f"{name} is a tensor without values of its own; give an array.")
        values = values.cpu()
    if np.ma.isMaskedArray(values):
        raise InvalidInput(f"{name} is a masked array; give one with all values.")
    try:
        found = np.array(values.numpy() if isinstance(values, Tensor) else values)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise InvalidInput(f"{name}={short(values)} must be an array of numbers.") from None
    if found.dtype.kind not in "biuf":
        raise InvalidInput(f"{name}={short(values)} must be an array of numbers.")
    return found


_NUMBERS = ("bound", "offset", "shift")
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
