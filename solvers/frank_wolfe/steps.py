"""Ways to move the rows of a batch: open loop, line search, pairwise, sliding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..pattern import CellPattern
from .batch import SNAP, Batch

_NEWTON_STEPS = 100
"""Most steps to a cell's multiplier; few are used, since each either is exact or halves."""


class Rule(Protocol):
    """A way to move the rows of a batch."""

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        """Move once, given the gradient and the oracle's vertex (float64 ``[rows, d]``)."""

    def take(self, index: Tensor) -> None:
        """Keep only some rows."""


class _OpenLoop:
    """Towards the vertex, by ``2 / (t + 2)``."""

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        direction = vertex - batch.z
        step = torch.full_like(direction[:, 0], 2 / (iteration + 2))
        batch.move(direction, batch.product(direction), step)

    def take(self, index: Tensor) -> None:
        pass


class _LineSearch:
    """Towards the vertex, to the exact minimum."""

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        direction = vertex - batch.z
        product = batch.product(direction)
        most = torch.ones_like(direction[:, 0])
        batch.move(direction, product, batch.exact_step(gradient, direction, product, most))

    def take(self, index: Tensor) -> None:
        pass


class _InFace:
    """From the worst vertex of the smallest face to the best vertex of all.

    After a step that the box cut short, a row goes towards the vertex once: where many entries
    differ, one that is nearly 0 or 1 would otherwise hold up all others again and again.
    """

    def __init__(self, batch: Batch) -> None:
        self._cut = torch.zeros_like(batch.z[:, 0], dtype=torch.bool)

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        origin = torch.where(self._cut[:, None], batch.z, batch.away(gradient).double())
        direction = vertex - origin
        product = batch.product(direction)
        room = torch.where(direction > 0, 1 - batch.z, batch.z) / direction.abs()
        most = room.masked_fill(direction == 0, torch.inf).amin(dim=1)
        if batch.joint:
            most = most.amin().expand_as(most)
        step = batch.exact_step(gradient, direction, product, most)
        self._cut = (step == most) & ~self._cut
        batch.move(direction, product, step)

    def take(self, index: Tensor) -> None:
        self._cut = self._cut[index]


class _ActiveSet:
    """From the worst of the vertices that make up ``z`` to the best vertex of all."""

    def __init__(self, batch: Batch) -> None:
        self._vertices = batch.z[None].clone()
        self._shares = torch.ones_like(batch.z[0, :1])

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        away = int((self._vertices * gradient).sum(dim=(1, 2)).argmax())
        direction = vertex - self._vertices[away]
        product = batch.product(direction)
        most = self._shares[away].expand(len(vertex))
        step = batch.exact_step(gradient, direction, product, most)
        self._shares[away] -= step[0]
        same = (self._vertices == vertex).all(dim=2).all(dim=1).nonzero()
        if len(same):
            self._shares[int(same[0])] += step[0]
        else:
            self._vertices = torch.cat([self._vertices, vertex[None]])
            self._shares = torch.cat([self._shares, step[:1]])
        held = self._shares > SNAP
        self._vertices, self._shares = self._vertices[held], self._shares[held]
        batch.move(direction, product, step)

    def take(self, index: Tensor) -> None:
        raise AssertionError("rows that move jointly are never taken apart")


class _Sliding:
    """Accelerated steps whose model, with a diagonal metric, is minimised cell by cell."""

    _GROWTH, _DECAY, _LEAST, _FLOOR, _LINEAR_FLOOR = 1.5, 0.98, 1e-2, 1e-2, 1e-6

    def __init__(self, batch: Batch, pattern: CellPattern) -> None:
        z = batch.z
        self._pattern = pattern
        self._kept = pattern.kept_per_cell((z.shape[0], z.shape[1]))
        size = batch.rows.weight**2 * batch.rows.gram.diagonal()
        mean = size.mean().expand(len(z)) if batch.joint else size.mean(dim=1)
        mean = torch.where(mean > 0, mean, 1.0)[:, None]
        # Where the linear term outweighs all else, a step of 1e6 leads to a vertex as well as any,
        # and longer ones leave nothing of the differences between entries.
        linear = batch.rows.linear.abs()
        linear = linear.amax().expand(len(z)) if batch.joint else linear.amax(dim=1)
        floor = torch.maximum(self._FLOOR * mean, self._LINEAR_FLOOR * linear[:, None])
        self._metric = 2 * torch.maximum(size, floor)
        self._factor = torch.full_like(z[:, 0], 4.0)
        self._momentum = torch.ones_like(self._factor)
        self._ahead, self._ahead_correlation = torch.zeros_like(z), torch.zeros_like(z)
        self._multiplier = torch.zeros_like(pattern.cells(z)[:, :1])

    def advance(self, batch: Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        z, c = batch.z, batch.correlation
        y, c_y = z + self._ahead, c + self._ahead_correlation
        metric = self._factor[:, None] * self._metric
        new = self._minimise(y - batch.gradient(c_y) / metric, metric, batch.lower)
        step = new - y
        product = batch.product(step)
        new_c = c_y - product
        length = batch.total((self._metric * step**2).sum(dim=1))
        bent = 2 * batch.total((batch.rows.weight * step * product).sum(dim=1))
        curvature = torch.where(length > 0, bent / length, 0.0)
        refused = curvature > self._factor * (1 + 1e-9)
        self._factor = torch.where(
            refused,
            torch.maximum(curvature, self._GROWTH * self._factor),
            (self._DECAY * self._factor).clamp_min(self._LEAST),
        )
        uphill = batch.total((self._metric * step * (new - z)).sum(dim=1)) < 0
        old = torch.where(uphill, 1.0, self._momentum)
        momentum = (1 + (1 + 4 * old**2).sqrt()) / 2
        share = ((old - 1) / momentum)[:, None]
        self._momentum = torch.where(refused, self._momentum, momentum)
        stay = refused[:, None]
        self._ahead = torch.where(stay, self._ahead, share * (new - z))
        self._ahead_correlation = torch.where(stay, self._ahead_correlation, share * (new_c - c))
        batch.z, batch.correlation = torch.where(stay, z, new), torch.where(stay, c, new_c)

    def take(self, index: Tensor) -> None:
        self._multiplier = self._multiplier.view(len(self._factor), -1)[index].view(-1, 1)
        self._metric, self._factor = self._metric[index], self._factor[index]
        self._momentum, self._ahead = self._momentum[index], self._ahead[index]
        self._ahead_correlation = self._ahead_correlation[index]

    def _minimise(self, point: Tensor, metric: Tensor, lower: Tensor | None) -> Tensor:
        """Nearest ``z`` in the hull to ``point`` in the metric, ``[rows, d]``.

        With the multiplier ``t`` of a cell's count it is ``clip(point - t / metric)``, whose sum
        falls piecewise linearly in ``t``: Newton's method, halving the bracket if it leaves it.
        """
        cell, inverse = self._pattern.cells(point), 1 / self._pattern.cells(metric)
        least = cell.new_zeros(()) if lower is None else self._pattern.cells(lower.double())
        high = ((cell.abs() + 1) / inverse).amax(dim=1, keepdim=True)
        low = -high
        t = torch.minimum(torch.maximum(self._multiplier, low), high)
        size = cell.abs().amax(dim=1, keepdim=True) + 1
        tolerance = 4 * torch.finfo(torch.float64).eps * cell.shape[1] * size
        for _ in range(_NEWTON_STEPS):
            free = cell - t * inverse
            clipped = free.clamp_max(1.0).clamp_min(least)
            excess = clipped.sum(dim=1, keepdim=True) - self._kept
            if not bool((excess.abs() > tolerance).any()):
                break
            low, high = torch.where(excess > 0, t, low), torch.where(excess < 0, t, high)
            newton = t + excess / inverse.where(clipped == free, 0.0).sum(dim=1, keepdim=True)
            inside = (newton > low) & (newton < high)
            better = torch.where(inside, newton, (low + high) / 2)
            t = torch.where(excess.abs() > tolerance, better, t)
        self._multiplier = t
        return clipped.reshape(point.shape)


def rule_of(step: str, batch: Batch) -> Rule:
    """The rule of that name, for a batch that begins."""
    pattern = batch.pattern
    if step == "open_loop":
        return _OpenLoop()
    if step == "line_search":
        return _LineSearch()
    if step == "pairwise":
        return _InFace(batch) if isinstance(pattern, CellPattern) else _ActiveSet(batch)
    assert isinstance(pattern, CellPattern)
    return _Sliding(batch, pattern)
