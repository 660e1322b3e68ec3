"""What rounding, an indefinite Gram matrix and an inexact oracle may add to a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import CellPattern
from ..rounding import UNIT_ROUNDOFF
from .batch import Batch

_ORACLE_ERROR = 1e-9
"""How much of the largest cost an oracle that is not a selection may be off by."""


def doubt_of(batch: Batch, gradient: Tensor, vertex: Tensor, shift: float) -> Tensor:
    """What rounding, an indefinite Gram matrix and the oracle may add to the bound, ``[rows]``.

    Rounding: sums of ``d`` products, estimated with ``|G_ij| <= sqrt(G_ii G_jj)``. Gram matrix:
    with ``C`` its correlation form and ``C >= -shift``, ``(m - z)^T Q (m - z)`` is at least
    ``-shift * sum_j w_j^2 G_jj (m_j - z_j)^2``, and the largest such sum over all masks is linear
    in ``m``. ``shift`` is `MaskProblem.negative_part`.
    """
    rows, z = batch.rows, batch.z
    size = rows.weight.abs() * rows.gram.diagonal().sqrt()
    pruned = (size * (1 - z)).sum(dim=1)
    move = (z - vertex.double()).abs()
    moved = (size * move).sum(dim=1)
    linear = (rows.linear.abs() * (1 - z + move)).sum(dim=1)
    unit = torch.finfo(torch.float64).eps * (z.shape[1] + 8)
    doubt = 4 * unit * (pruned**2 + 2 * pruned * moved + linear)
    if shift:
        tilt = size**2 * (1 - 2 * z)
        farthest = batch.lmo(-tilt).double()
        doubt += shift * (size**2 * (farthest - z) ** 2).sum(dim=1)
    # The rows were scaled, which rounds their weights and the Gram matrix.
    doubt += 8 * UNIT_ROUNDOFF * size.sum(dim=1) ** 2
    if not isinstance(batch.pattern, CellPattern):
        doubt += _ORACLE_ERROR * gradient.abs().amax()
    return doubt
