"""Mask and weights together, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..errors import InvalidInput
from ..options import option
from ..pattern import NM, PerLayer, PerRow
from ..registry import get_solver, register
from ..solution import Status
from ..solver import Callback, Outcome, Progress, Search, Solver, warm_up
from ..update import LeastSquares, updated_loss

_CHUNK = 1 << 23
"""Float64 entries of the tableaux held at once (64 MiB)."""

_SWAPS_PER_CALL = 8
"""Swaps of a row between two looks at the clock."""


@register
@dataclass(frozen=True)
class Joint(Solver):
    """Swaps on the loss that is left once least squares has set the kept weights, on the CPU.

    The best subset of inputs for each row, by 1-swap local search: every exchange of a kept and a
    pruned weight is judged with all kept weights made best again, exactly, from the row's swept
    Gram matrix. The result has no improving exchange of that kind (`LOCAL_OPTIMUM`). It is a mask
    for `LeastSquares` with the same damping; its loss without a weight update is higher. A row
    with ``d`` inputs needs ``d^2`` memory and ``2 d^2`` operations per swap. A linear term is
    ignored.

    Parameters
    ----------
    initial
        Solver whose masks are improved, where no start is given. (A start is, as for every
        solver, given back in rows whose loss without update rose.)
    damping
        As of `LeastSquares`.
    candidates
        Weights to prune that are tried before all of them are.
    max_swaps
        Most swaps per row; None for no limit.
    tolerance
        A swap improves if it lowers the row's loss by more than this share of it.

    Notes
    -----
    ``stats``: ``swaps``, and summed over rows ``initial_loss`` and ``loss``, both after least
    squares and with its damping.
    """

    initial: str = "alps"
    damping: float = option(1e-2, least=0)
    candidates: int = option(16, least=1)
    max_swaps: int | None = option(None, least=1)
    tolerance: float = option(1e-6, least=0)

    name = "joint"
    summary = "mask and weights together: swaps on the least squares loss"
    patterns = (PerRow, NM, PerLayer)
    ignores_linear = True
    requires = ("numba",)

    def prepare(self, device: torch.device) -> None:
        get_solver(self.initial).prepare(device)
        warm_up(Joint(), device)

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        if start is None:
            initial = get_solver(self.initial)
            start = initial.solve(problem, time_limit=clock.limit, seed=search.seed).mask
        if clock.expired:
            return Outcome(start, Status.TIME_LIMIT, stats={"swaps": 0})
        neighbourhood = problem.pattern.neighbourhood(problem.shape)
        assert neighbourhood is not None
        weight, gram = problem.weight.double().cpu(), problem.gram.double().cpu()
        before = start.cpu()
        mask, swaps, complete = self._improved(
            weight, gram, before, neighbourhood.width, clock, search.callback
        )
        first, last = self._loss(weight, gram, before), self._loss(weight, gram, mask)
        risen = last > first  # by rounding, in an ill-conditioned row
        mask = torch.where(risen[:, None], before, mask)
        status = Status.LOCAL_OPTIMUM if complete else Status.ITERATION_LIMIT
        return Outcome(
            mask.to(problem.device),
            Status.TIME_LIMIT if clock.expired else status,
            stats={
                "swaps": swaps,
                "initial_loss": float(first.sum()),
                "loss": float(torch.minimum(first, last).sum()),
            },
        )

    def _damped(self, gram: Tensor) -> Tensor:
        damped = gram.clone()
        mean = float(gram.diagonal().mean()) or 1.0  # of dead inputs alone: any weights will do
        damped.diagonal().add_(self.damping * mean)
        return damped

    def _loss(self, weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
        """Damped loss after least squares, ``[rows]``."""
        damped = self._damped(gram)
        return updated_loss(weight, damped, LeastSquares(damping=0.0)(weight, damped, mask))

    def _improved(
        self,
        weight: Tensor,
        gram: Tensor,
        mask: Tensor,
        width: int,
        clock: Clock,
        callback: Callback | None,
    ) -> tuple[Tensor, int, bool]:
        """Improved masks, the number of swaps, and whether no row was cut short."""
        from .kernel import improve_row

        most = torch.iinfo(torch.long).max if self.max_swaps is None else self.max_swaps
        mask = mask.clone()
        swaps, complete = 0, True
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for rows, tableaux in _tableaux(self._damped(gram), mask):
                if clock.expired:
                    return mask, swaps, False
                keep = mask[rows].numpy()

                def improve(
                    at: int, rows: slice = rows, tableaux: Tensor = tableaux, keep: Any = keep
                ) -> tuple[int, bool]:
                    w, tableau, found = weight[rows][at].numpy(), tableaux[at].numpy(), 0
                    while found < most and not clock.expired:
                        step = min(_SWAPS_PER_CALL, most - found)
                        arguments = width, self.candidates, step, self.tolerance
                        made = improve_row(tableau, w, keep[at], *arguments)
                        found += made
                        if made < step:
                            return found, True
                    return found, False

                counts, ended = zip(*pool.map(improve, range(len(keep))), strict=True)
                mask[rows] = torch.from_numpy(keep)
                swaps += sum(counts)
                complete = complete and all(ended)
                if callback is not None:
                    done = min(rows.stop, len(mask))
                    callback(Progress(done, len(mask), clock.seconds))
        return mask, swaps, complete


def _tableaux(gram: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The Gram matrix swept on each row's kept inputs, ``[some rows, d, d]``, in chunks."""
    d = len(gram)
    most = int(mask.sum(dim=1).max())
    place = (~mask).int().argsort(dim=1, stable=True)[:, :most]
    diagonal = torch.arange(most)
    step = max(1, math.ceil(_CHUNK / d**2))
    for begin in range(0, len(mask), step):
        rows = slice(begin, begin + step)
        index, kept = place[rows], mask[rows]
        real = kept.gather(1, index)
        system = gram[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
        system[:, diagonal, diagonal] += (~real).double()
        factor, info = torch.linalg.cholesky_ex(system)
        if bool(info.any()):
            raise InvalidInput(
                f"The least squares system of row {begin + int(info.nonzero()[0])} is singular; "
                "give more damping, such as 0.01."
            )
        inverse = torch.cholesky_inverse(factor)
        sides = gram[index] * real[:, :, None]
        solved = inverse @ sides
        swept = gram - sides.transpose(1, 2) @ solved
        across = torch.zeros_like(swept).scatter_(
            1, index[:, :, None].expand(-1, -1, d), solved * real[:, :, None]
        )
        across.masked_fill_(kept[:, None, :], 0.0)
        inside = torch.zeros_like(swept)
        held = inverse * (real[:, :, None] & real[:, None, :])
        at = torch.arange(len(index))[:, None, None]
        inside[at, index[:, :, None], index[:, None, :]] = -held
        pruned = ~kept
        swept *= pruned[:, :, None] & pruned[:, None, :]
        yield rows, (swept + across + across.transpose(1, 2) + inside).contiguous()
