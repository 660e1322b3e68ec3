"""The mask selection problem of one linear layer.

Row ``r`` of a weight ``W [rows, d]`` with Gram matrix ``G = X X^T / tokens`` loses

    L_r(m) = q^T G q + linear_r^T x,    x = 1 - m,  q = x * w_r

when the mask ``m`` (1 = keep) is applied: with no linear term, the squared change of the
layer's output per token (Wanda, SparseFW eq. 1, SparseSwaps).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arrays import ArrayLike, matrix, truths
from .errors import InvalidInput
from .files import replaced_on_success
from .pattern import Pattern
from .rounding import gamma, negative_part

_OBJECTIVE_CHUNK = 1 << 24
"""Entries of a float64 block of rows while an objective is computed (128 MiB)."""

LEAST = 1e-270
"""Scale of a row, at least, unless it is 0: products of its numbers do not underflow."""

LARGEST = {"weight": 1e70, "gram": 1e140, "linear": 1e140}
"""Absolute values up to which no loss, nor what a solver makes of it, leaves float64."""


class MaskProblem:
    """A batch of rows that share one Gram matrix, and the masks they may take.

    Parameters
    ----------
    weight
        ``[rows, d]``: a torch tensor, a NumPy array or nested lists of real numbers, held as
        float32 or float64 (see `solvers.arrays`).
    gram
        ``[d, d]``, symmetric positive semi-definite up to rounding.
    pattern
        The allowed masks.
    linear
        Optional ``[rows, d]``: cost of *pruning* each weight, added to the quadratic loss.
    copy
        Whether the problem gets tensors of its own, so that a change to the caller's does not
        reach it. False spares the memory, for callers that do not change theirs while the problem
        is in use.

    Attributes
    ----------
    weight, gram, linear, pattern
        As given, validated; ``gram`` exactly symmetric, ``linear`` float64 or None. An input whose
        mean square is below the smallest normal number of the Gram matrix's type is dead: its row
        and column are zero.

    Raises
    ------
    InvalidInput
        If shapes do not fit, a value is not finite or above `LARGEST`, a row's losses underflow,
        the Gram matrix is not symmetric positive semi-definite beyond rounding, or the pattern
        cannot hold for this shape.
    """

    weight: Tensor
    gram: Tensor
    linear: Tensor | None
    pattern: Pattern

    def __init__(
        self,
        weight: ArrayLike,
        gram: ArrayLike,
        pattern: Pattern,
        linear: ArrayLike | None = None,
        *,
        copy: bool = True,
    ) -> None:
        self.weight = _matrix(weight, "weight", copy=copy)
        rows, d = self.weight.shape
        gram = _matrix(gram, "gram", self.weight.device, copy=copy)
        if gram.shape != (d, d):
            raise InvalidInput(
                f"The Gram matrix has shape {tuple(gram.shape)} but the weight has {d} inputs; "
                f"it must be ({d}, {d})."
            )
        self.gram = _checked_gram(gram)
        self.linear = None
        if linear is not None:
            self.linear = _matrix(linear, "linear", self.weight.device, copy=copy).double()
            if self.linear.shape != self.weight.shape:
                raise InvalidInput(
                    f"The linear term has shape {tuple(self.linear.shape)}; it must match the "
                    f"weight, {(rows, d)}."
                )
        if not isinstance(pattern, Pattern):
            raise InvalidInput(
                f"{pattern!r} is no pattern; give one such as PerRow(sparsity=0.5) or NM(2, 4)."
            )
        pattern.check((rows, d))
        self.pattern = pattern
        scale = self.scale()
        lost = (scale > 0) & (scale < LEAST)
        if bool(lost.any()):
            raise InvalidInput(
                f"Row {int(lost.nonzero()[0])} loses so little ({float(scale[lost][0]):.3g}) that "
                "float64 cannot resolve it; scale its weights up."
            )
        self._negative_part: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, d)``."""
        rows, d = self.weight.shape
        return rows, d

    @property
    def device(self) -> torch.device:
        """Where weight and Gram matrix are."""
        return self.weight.device

    def __repr__(self) -> str:
        rows, d = self.shape
        extra = "" if self.linear is None else ", linear term"
        return f"MaskProblem({rows} rows, {d} inputs, {self.pattern}{extra})"

    def objective(self, mask: ArrayLike) -> Tensor:
        """Loss of every row, float64 ``[rows]``, recomputed from the definition.

        Parameters
        ----------
        mask
            Bool ``[rows, d]``, True = keep. It need not follow the pattern.
        """
        mask = self.as_mask(mask)
        rows, d = self.shape
        gram = self.gram.double()
        out = torch.empty(rows, dtype=torch.float64, device=self.device)
        step = max(1, _OBJECTIVE_CHUNK // d)
        for at in range(0, rows, step):
            chunk = slice(at, at + step)
            q = self.weight[chunk].double().masked_fill(mask[chunk], 0.0)
            out[chunk] = ((q @ gram) * q).sum(dim=1)
            if self.linear is not None:
                out[chunk] += self.linear[chunk].masked_fill(mask[chunk], 0.0).sum(dim=1)
        return out

    def output_energy(self) -> Tensor:
        """Mean square of each dense output, ``w_r^T G w_r``, float64 ``[rows]``."""
        weight = self.weight.double()
        return ((weight @ self.gram.double()) * weight).sum(dim=1)

    def scale(self, mask: ArrayLike | None = None) -> Tensor:
        """``sum w_j^2 G_jj + |linear_j|`` over what a mask prunes, float64 ``[rows]``.

        What the terms of its objective are: of two numbers that differ by a tiny share of it
        nobody cares which is right. Over all weights without a mask; with an outlier among the
        inputs, which good masks keep, that says nothing about their losses.
        """
        pruned = self.weight.double()
        linear = self.linear
        if mask is not None:
            mask = self.as_mask(mask)
            pruned = pruned.masked_fill(mask, 0.0)
            linear = None if linear is None else linear.masked_fill(mask, 0.0)
        scale = pruned.square() @ self.gram.diagonal().double()
        return scale if linear is None else scale + linear.abs().sum(dim=1)

    def rounding(self, mask: ArrayLike) -> Tensor:
        """How far `objective` may be from the exact loss of a mask, float64 ``[rows]``.

        ``|G_ij| <= sqrt(G_ii G_jj)`` but for rounding, so that no partial sum is larger than the
        square of ``sum |w_j| sqrt(G_jj)`` over what is pruned.
        """
        mask = self.as_mask(mask)
        size = self.weight.double().abs() * self.gram.diagonal().double().sqrt()
        terms = size.masked_fill(mask, 0.0).sum(dim=1).square() * (1 + 1e-4)
        if self.linear is not None:
            terms += self.linear.abs().masked_fill(mask, 0.0).sum(dim=1)
        return gamma(2 * self.shape[1] + 8) * terms

    def quadratic_form(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """``Q`` and ``l`` of the summed loss ``x^T Q x + l^T x`` over all weights, row after row.

        Dense float64 ``[rows * d, rows * d]`` (block-diagonal) and ``[rows * d]``: for a row, or
        a small layer.
        """
        rows, d = self.shape
        weight, gram = self.weight.double().cpu().numpy(), self.gram.double().cpu().numpy()
        quadratic = np.zeros((rows * d, rows * d))
        for r, w in enumerate(weight):
            block = slice(r * d, (r + 1) * d)
            quadratic[block, block] = w[:, None] * gram * w
        linear = np.zeros(rows * d)
        if self.linear is not None:
            linear = self.linear.cpu().numpy().ravel()
        return quadratic, linear

    def as_mask(self, mask: ArrayLike) -> Tensor:
        """``mask`` as a bool tensor on the problem's device; `InvalidInput` if it does not fit."""
        mask = truths(mask, "A mask", self.device)
        if tuple(mask.shape) != self.shape:
            raise InvalidInput(f"The mask has shape {tuple(mask.shape)}; it must be {self.shape}.")
        return mask

    def rows(self, index: int | slice | ArrayLike) -> MaskProblem:
        """The same problem on some rows (a whole-layer sparsity then holds over those rows).

        Parameters
        ----------
        index
            Whole numbers, negative ones counting from the end; a slice; or one bool per row, the
            True ones chosen.
        """
        chosen = self._chosen(index).to(self.device)
        linear = None if self.linear is None else self.linear[chosen]
        part = self._derived(self.weight[chosen], self.gram, self.pattern, linear)
        part._negative_part = self._negative_part
        return part

    def negative_part(self) -> float:
        """How far the Gram matrix is proven to be from positive semi-definite, see `rounding`.

        In correlation form; 0 in all usual cases. Computed once.
        """
        if self._negative_part is None:
            self._negative_part = negative_part(self.gram.double())
        return self._negative_part

    def _chosen(self, index: int | slice | ArrayLike) -> Tensor:
        """The rows that an index names, long, or `InvalidInput`."""
        rows = self.shape[0]
        refusal = InvalidInput(
            f"Rows must be a non-empty choice from 0..{rows - 1}: whole numbers, or one bool per "
            "row."
        )
        if isinstance(index, slice):
            index = range(rows)[index]
        try:
            array = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        except (TypeError, ValueError, RuntimeError):
            raise refusal from None
        array = array.reshape(-1)
        if array.dtype.kind == "b":
            if len(array) != rows:
                raise refusal
            array = array.nonzero()[0]
        if array.dtype.kind not in "iu" or len(array) == 0:
            raise refusal
        if int(array.min()) < -rows or int(array.max()) >= rows:
            raise refusal
        return torch.from_numpy(array.astype(np.int64))

    def to(self, device: torch.device | str) -> MaskProblem:
        """The same problem on another device."""
        linear = None if self.linear is None else self.linear.to(device)
        return self._derived(self.weight.to(device), self.gram.to(device), self.pattern, linear)

    @classmethod
    def _derived(
        cls, weight: Tensor, gram: Tensor, pattern: Pattern, linear: Tensor | None
    ) -> MaskProblem:
        """A problem from parts that an existing one has validated."""
        problem = cls.__new__(cls)
        problem.weight, problem.gram, problem.linear = weight, gram, linear
        problem._negative_part = None
        pattern.check(problem.shape)
        problem.pattern = pattern
        return problem

    @classmethod
    def load(cls, path: str | os.PathLike[str], pattern: Pattern) -> MaskProblem:
        """Read a safetensors file with ``weight``, ``gram`` and perhaps ``linear``.

        Raises
        ------
        InvalidInput
            If the file is missing, unreadable or lacks a tensor.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise InvalidInput(f"There is no problem file at {path}.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise InvalidInput(f"{path} is not a readable safetensors file ({error}).") from error
        missing = {"weight", "gram"} - tensors.keys()
        if missing:
            raise InvalidInput(
                f"{path} lacks the tensor {sorted(missing)[0]!r}; "
                "a problem file holds weight and gram."
            )
        parts = tensors["weight"], tensors["gram"], pattern, tensors.get("linear")
        return cls(*parts, copy=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weight, gram (and linear) as safetensors; the pattern is not stored."""
        from safetensors.torch import save_file

        tensors = {"weight": self.weight, "gram": self.gram}
        if self.linear is not None:
            tensors["linear"] = self.linear
        with replaced_on_success(path) as temporary:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary)


def _matrix(
    values: Any, name: str, device: torch.device | None = None, *, copy: bool = True
) -> Tensor:
    checked = matrix(values, name, device, copy=copy)
    if float(checked.abs().amax()) > LARGEST[name]:
        row = int((checked.abs() > LARGEST[name]).any(dim=1).nonzero()[0])
        raise InvalidInput(
            f"{name} has values above {LARGEST[name]:g}, first in row {row}; scale it down."
        )
    return checked


def _checked_gram(gram: Tensor) -> Tensor:
    """Symmetrised Gram matrix, or `InvalidInput`.

    Tested in correlation form ``G_ij / sqrt(G_ii G_jj)``, where rounding errors of an
    accumulated ``X X^T`` are of the size of float32 epsilon whatever the inputs' scales.
    """
    d = gram.shape[0]
    gram = _without_underflow(gram)
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        raise InvalidInput(
            f"The Gram matrix has a negative diagonal entry at input {int(diagonal.argmin())}; "
            "it must be positive semi-definite, as X X^T is."
        )
    scale = torch.where(diagonal > 0, diagonal.double().rsqrt(), 0.0).to(gram.dtype)
    correlation = gram * scale * scale[:, None]
    epsilon = torch.finfo(torch.float32).eps
    if not bool(torch.isfinite(correlation).all()):
        raise _indefinite()
    if float((correlation - correlation.T).abs().max()) > 64 * epsilon:
        raise InvalidInput("The Gram matrix is not symmetric; pass X X^T, or (G + G^T) / 2.")
    dead = diagonal == 0
    if bool(gram[dead].any()):
        raise InvalidInput(
            f"The Gram matrix has a zero diagonal but a non-zero row at input "
            f"{int((gram.ne(0).any(dim=1) & dead).nonzero()[0])}; it is not positive semi-definite."
        )
    correlation.diagonal().add_(d * epsilon)
    if int(torch.linalg.cholesky_ex(correlation).info) != 0:
        raise _indefinite()
    return gram if bool((gram == gram.T).all()) else (gram + gram.T) / 2


def _without_underflow(gram: Tensor) -> Tensor:
    """Zero rows and columns for the inputs whose mean square underflowed.

    Below the smallest normal number ``t`` of the type a mean square has no relative accuracy, or
    is 0, while products ``G_ij``, of size ``sqrt(G_ii G_jj)``, may still be there. Where they are
    no larger than a mean square of ``t`` allows, the input is dead; others are left for the tests
    to refuse.
    """
    tiny = torch.finfo(gram.dtype).tiny
    diagonal = gram.diagonal()
    lost = (diagonal < tiny) & (diagonal >= 0)
    if not bool(gram[lost].any()):
        return gram
    largest = diagonal.double().clamp_min(tiny).sqrt() * math.sqrt(tiny) * (1 + 1e-6)
    lost[lost.clone()] = (gram[lost].double().abs() <= largest).all(dim=1)
    gram = gram.masked_fill(lost, 0.0)
    return gram.masked_fill_(lost[:, None], 0.0)


def _indefinite() -> InvalidInput:
    return InvalidInput(
        "The Gram matrix is not positive semi-definite beyond rounding; pass X X^T, "
        "or add damping to its diagonal."
    )
