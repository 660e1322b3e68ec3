"""Rows that move together: relaxed masks, correlations, the oracle, steps along a line."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import CellPattern, Pattern
from ..swap.rows import ScaledRows
from ..threads import matmul_precision

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tfloat32": torch.float32,
    "bfloat16": torch.bfloat16,
}

SNAP = 1e-12
"""Entries of ``z`` this close to 0 or 1 are set there."""


class Product:
    """Products with the Gram matrix in the chosen precision.

    Parameters
    ----------
    gram
        Float64 ``[d, d]``.
    name
        One of `DTYPES`.
    """

    def __init__(self, gram: Tensor, name: str) -> None:
        self._dtype, self._tfloat = DTYPES[name], name == "tfloat32"
        self._gram = self._rounded(gram)

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ gram``, float64 ``[rows, d]``."""
        if self._dtype != torch.float32:
            return (self._rounded(rows) @ self._gram).double()
        with matmul_precision("high" if self._tfloat else "highest", rows.device):
            return (self._rounded(rows) @ self._gram).double()

    def _rounded(self, values: Tensor) -> Tensor:
        values = values.to(self._dtype)
        if not self._tfloat:
            return values
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Batch:
    """Rows that still move: relaxed masks, correlations, and the oracle.

    Attributes
    ----------
    rows
        Weights and Gram matrix, scaled; with one common scale where rows move jointly.
    z, correlation
        Float64 ``[rows, d]``: relaxed mask and ``c = G q``.
    lower
        Bool ``[rows, d]``, entries fixed as kept, or None.
    joint
        Whether all rows make one step together.
    lmo_calls
        Calls of the pattern's oracle.
    """

    def __init__(
        self,
        pattern: Pattern,
        rows: ScaledRows,
        z: Tensor,
        lower: Tensor | None,
        product: Product | None = None,
    ) -> None:
        self.pattern, self.rows, self.z, self.lower = pattern, rows, z, lower
        self.joint = pattern.coupled or not isinstance(pattern, CellPattern)
        self.lmo_calls = 0
        self._product = product or Product(rows.gram, "float64")
        self.refresh()

    def refresh(self) -> None:
        """Compute ``c`` anew in float64."""
        self.correlation = (self.rows.weight * (1 - self.z)) @ self.rows.gram

    def product(self, move: Tensor) -> Tensor:
        """``G (w * move)`` in the chosen precision, ``[rows, d]``."""
        return self._product(self.rows.weight * move)

    def value(self) -> Tensor:
        """Relaxed loss, ``[rows]``."""
        cost = self.rows.weight * self.correlation + self.rows.linear
        return ((1 - self.z) * cost).sum(dim=1)

    def gradient(self, correlation: Tensor) -> Tensor:
        """Gradient in ``z`` where ``c`` is ``correlation``, ``[rows, d]``."""
        return -(2 * self.rows.weight * correlation + self.rows.linear)

    def lmo(self, direction: Tensor) -> Tensor:
        """The pattern's oracle with the fixed entries, bool ``[rows, d]``."""
        self.lmo_calls += 1
        return self.pattern.unchecked_lmo(direction, self.lower)

    def away(self, gradient: Tensor) -> Tensor:
        """Worst vertex of the smallest face that holds ``z``, bool ``[rows, d]``."""
        self.lmo_calls += 1
        lower = self.z >= 1
        return self.pattern.unchecked_lmo(
            -gradient, lower if self.lower is None else lower | self.lower, self.z > 0
        )

    def total(self, values: Tensor) -> Tensor:
        """What counts for each row's step: its own value, or the sum of all, ``[rows]``."""
        return values.sum().expand_as(values) if self.joint else values

    def move(self, direction: Tensor, product: Tensor, step: Tensor) -> None:
        """``z += step * direction``, where ``product`` is ``G (w * direction)``."""
        z = (self.z + step[:, None] * direction).clamp_(0, 1)
        self.z = z.masked_fill_(z < SNAP, 0.0).masked_fill_(z > 1 - SNAP, 1.0)
        self.correlation = self.correlation - step[:, None] * product

    def exact_step(
        self, gradient: Tensor, direction: Tensor, product: Tensor, most: Tensor
    ) -> Tensor:
        """Minimiser of the loss along ``direction`` within ``[0, most]``, ``[rows]``."""
        slope = self.total((gradient * direction).sum(dim=1))
        curvature = 2 * self.total((self.rows.weight * direction * product).sum(dim=1))
        step = torch.where(curvature > 0, -slope / curvature, torch.inf)
        return torch.where(slope < 0, torch.minimum(step, most), 0.0)

    def take(self, index: Tensor) -> None:
        """Keep only some rows."""
        self.rows = self.rows.take(index)
        self.z, self.correlation = self.z[index], self.correlation[index]
        self.lower = None if self.lower is None else self.lower[index]
