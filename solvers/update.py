"""Weights after the mask: how the kept weights of a layer make up for the pruned ones.

Everything here knows a weight ``W [rows, d]``, a Gram matrix ``G = X X^T / tokens`` and a mask
(True = keep), and returns new weights that are zero where the mask prunes. With ``y = W x`` the
dense and ``v = V x`` the updated output, a row loses ``E (v - y)^2 = (v - w)^T G (v - w)``.

Where the dense targets come from other inputs than the pruned layer sees, ``cross`` is
``C = X X^^T / tokens [d, d]``: dense inputs times the inputs of ``G``. Without it, ``C = G``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import InvalidInput
from .options import checked_options, option

_CHUNK = 1 << 24
"""Float64 entries of the batch of systems that is factorised at once (128 MiB)."""

_WIDEST_CHOLESKY = 1536
"""Kept weights per row above which conjugate gradients are cheaper than factorising each row."""

Method = Literal["auto", "cholesky", "cg"]


def updated_loss(weight: Tensor, gram: Tensor, updated: Tensor) -> Tensor:
    """``E (v - y)^2`` of every row, float64 ``[rows]``."""
    change = updated.double() - weight.double()
    return ((change @ gram.double()) * change).sum(dim=1)


def unbiased_gain(
    weight: Tensor, gram: Tensor, mask: Tensor, cross: Tensor | None = None
) -> Tensor:
    """Masked weights, each row times the factor that makes ``E[v y] = E[y^2]``.

    Pruning shrinks outputs: the slope of the pruned on the dense output is below one. The factor
    is ``w^T G w / w^T C (m * w)``, one number per row.

    Parameters
    ----------
    weight, gram, mask
        ``[rows, d]``, ``[d, d]``, bool ``[rows, d]``.
    cross
        See the module; the energy of the dense output is then ``w^T C w``, which is exact where
        both inputs agree.

    Returns
    -------
    Tensor
        ``[rows, d]`` in the weight's dtype. A row whose pruned output is not positively
        correlated with its dense output has no such factor and stays as the mask leaves it.
    """
    w = weight.double()
    target = w @ (gram if cross is None else cross).double()
    energy = (target * w).sum(dim=1)
    kept = (target * w).masked_fill(~mask, 0.0).sum(dim=1)
    gain = torch.where((kept > 0) & (energy > 0), energy / kept, 1.0)
    return (w * gain[:, None]).masked_fill(~mask, 0.0).to(weight.dtype)


@dataclass(frozen=True)
class LeastSquares:
    """Exact least squares on the support: the best weights that a mask allows.

    Minimises ``(v - w)^T (G + damping * mean(diag G) * I) (v - w)`` over all ``v`` on the support,
    whose kept part solves ``(G_KK + lambda I) v_K = (W C)_K + lambda w_K``.

    Parameters
    ----------
    damping
        In units of the mean diagonal of ``G``: how much staying near the old weights counts. A
        rank-deficient ``G`` (fewer tokens than inputs, dead inputs) needs more than 0.
    method
        "cholesky" factorises the system of each row, in batches; "cg" runs conjugate gradients
        with the diagonal as preconditioner on all rows at once, which for wide layers is cheaper;
        "auto" chooses by the number of kept weights.
    tolerance
        Of "cg": relative residual, in the preconditioner's norm, at which a row stops.
    iterations
        Of "cg": most of them.
    """

    damping: float = option(1e-2, least=0)
    method: Method = "auto"
    tolerance: float = option(1e-9, least=0)
    iterations: int = option(2000, least=1)

    def __post_init__(self) -> None:
        checked_options(self, type(self).__name__)

    def __call__(
        self, weight: Tensor, gram: Tensor, mask: Tensor, cross: Tensor | None = None
    ) -> Tensor:
        """Updated weights, ``[rows, d]`` in the weight's dtype; computed in float64.

        Raises
        ------
        InvalidInput
            If a system is singular or conjugate gradients do not converge: more damping is needed.
        """
        w, g = weight.double(), gram.double()
        kept = w.masked_fill(~mask, 0.0)
        target = w @ (g if cross is None else cross.double())
        residual = (target - kept @ g).masked_fill(~mask, 0.0)
        # Of dead inputs alone the mean is 0, and any weights do: the old ones are the nearest.
        ridge = self.damping * (float(g.diagonal().mean()) or 1.0)
        most = int(mask.sum(dim=1).max()) if len(mask) else 0
        method = self.method
        if method == "auto":
            method = "cholesky" if most <= _WIDEST_CHOLESKY else "cg"
        if method == "cholesky":
            change = self._factorised(g, mask, residual, ridge, most)
        else:
            change = self._conjugate_gradients(g, mask, residual, ridge)
        return (kept + change).masked_fill(~mask, 0.0).to(weight.dtype)

    def _factorised(
        self, gram: Tensor, mask: Tensor, residual: Tensor, ridge: float, most: int
    ) -> Tensor:
        """Solution of every row's system by Cholesky; rows with fewer weights are padded."""
        change = torch.zeros_like(residual)
        if most == 0:
            return change
        place = (~mask).int().argsort(dim=1, stable=True)[:, :most]
        held = mask.gather(1, place)
        diagonal = torch.arange(most, device=gram.device)
        for at in range(0, len(mask), step := max(1, _CHUNK // most**2)):
            chunk = slice(at, at + step)
            index, real = place[chunk], held[chunk]
            system = gram[index[:, :, None], index[:, None, :]]
            system *= real[:, :, None] & real[:, None, :]
            system[:, diagonal, diagonal] += torch.where(real, ridge, 1.0)
            factor, info = torch.linalg.cholesky_ex(system)
            if bool(info.any()):
                raise self._singular(at + int(info.nonzero()[0]))
            right = residual[chunk].gather(1, index)
            solved = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
            change[chunk] = change[chunk].scatter(1, index, solved.masked_fill(~real, 0.0))
        return change

    def _conjugate_gradients(
        self, gram: Tensor, mask: Tensor, residual: Tensor, ridge: float
    ) -> Tensor:
        diagonal = gram.diagonal() + ridge
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        change = torch.zeros_like(residual)
        rest, ahead = residual.clone(), residual * inverse
        size = (rest * ahead).sum(dim=1)
        limit = self.tolerance**2 * size
        for _ in range(self.iterations):
            moving = size > limit
            if not bool(moving.any()):
                return change
            product = (ahead @ gram).masked_fill_(~mask, 0.0) + ridge * ahead
            curvature = (ahead * product).sum(dim=1)
            step = torch.where(moving & (curvature > 0), size / curvature, 0.0)[:, None]
            change += step * ahead
            rest -= step * product
            scaled = rest * inverse
            new = (rest * scaled).sum(dim=1)
            ahead = scaled + torch.where(moving, new / size, 0.0)[:, None] * ahead
            size = new
        if bool((size > limit).any()):
            raise InvalidInput(
                f"Least squares did not converge in {self.iterations} iterations in row "
                f"{int((size > limit).nonzero()[0])}; give more damping than {self.damping:g} "
                "or more iterations."
            )
        return change

    def _singular(self, row: int) -> InvalidInput:
        return InvalidInput(
            f"The least squares system of row {row} is singular with damping {self.damping:g}; "
            "give more damping, such as 0.01."
        )
