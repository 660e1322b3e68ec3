"""DSnoT: exchanges that bring a row's mean output back to what it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arrays import numbers
from .errors import InvalidInput
from .options import option
from .pattern import NM, PerLayer, PerRow
from .problem import MaskProblem
from .registry import get_solver, register
from .saliency import Wanda
from .solution import Status
from .solver import Outcome, Search, Solver


@register
@dataclass(frozen=True)
class DSnoT(Solver):
    """Dynamic Sparse no Training (Zhang et al., arXiv 2310.08915).

    A row's error is its mean change of output, ``e = sum of w_j E[x_j]`` over the pruned ``j``.
    Each cycle revives the pruned weight with the largest ``w_j E[x_j] / Var[x_j]`` of the sign of
    ``e``, and prunes the kept weight with Wanda's smallest score among those whose removal brings
    ``e`` down as well (in an N:M group: the smallest of the group). A row ends when ``|e|`` is
    small, when its sign would change, or after some cycles. No weight moves twice.

    The measure is the paper's, not the layer loss. Without a start the masks of ``initial`` are
    changed as published, whatever that does to the layer loss; a start that is given is, as for
    every solver, given back in the rows whose loss rose.

    Parameters
    ----------
    mean
        ``E[x]``, ``[d]``; a pruning run supplies it. Variances follow from the Gram matrix.
    initial
        Solver whose masks are changed.
    cycles
        Most exchanges per row.
    threshold
        ``|e|`` at which a row ends, in the units of the layer's output.

    Notes
    -----
    ``stats``: ``exchanges``.
    """

    mean: Tensor | Sequence[float] | None = None
    initial: str = "wanda"
    cycles: int = option(50, least=1)
    threshold: float = option(0.1, least=0)

    name = "dsnot"
    summary = "DSnoT: exchanges that restore a row's mean output; needs the inputs' mean"
    patterns = (PerRow, NM, PerLayer)
    ignores_linear = True

    def _search(self, search: Search) -> Outcome:
        problem, start = search.problem, search.start
        if self.mean is None:
            raise InvalidInput(
                "Solver 'dsnot' needs the mean of the inputs, which a problem file does not hold; "
                "give it as option 'mean', or use it in a pruning run."
            )
        mean = numbers(self.mean, "mean", problem.device).double()
        if mean.shape != problem.shape[1:]:
            raise InvalidInput(
                f"The mean has shape {tuple(mean.shape)}; it must be ({problem.shape[1]},)."
            )
        if not bool(torch.isfinite(mean).all()):
            raise InvalidInput("The mean has NaN or infinite values; mend the inputs first.")
        if start is None:
            start = get_solver(self.initial).solve(problem, seed=search.seed).mask
        mask = start.clone()
        exchanges = self._exchange(problem, mean, mask)
        return Outcome(mask, Status.FEASIBLE, stats={"exchanges": exchanges})

    def _exchange(self, problem: MaskProblem, mean: Tensor, mask: Tensor) -> int:
        """Change ``mask`` in place; how many exchanges were made."""
        pull = problem.weight.double() * mean
        variance = (problem.gram.double().diagonal() - mean**2).clamp_min(1e-30)
        wanda = Wanda().score(problem).double()
        grow = pull / variance
        row = torch.arange(len(mask), device=mask.device)
        error = pull.masked_fill(mask, 0.0).sum(dim=1)
        sign = error.sign()
        free = torch.ones_like(mask)
        active = torch.ones_like(row, dtype=torch.bool)
        group = problem.pattern.group if isinstance(problem.pattern, NM) else None
        exchanges = 0
        for _ in range(self.cycles):
            side = torch.where(error > 0, 1.0, -1.0)[:, None].double()
            revivable = ~mask & free & (pull * side > 0)
            revived = (grow * side).masked_fill(~revivable, -torch.inf).argmax(dim=1)
            prunable = mask & free
            if group is None:
                prunable &= pull * side < 0
            else:
                block = torch.arange(mask.shape[1], device=mask.device) // group
                prunable &= block == (revived // group)[:, None]
            pruned = wanda.masked_fill(~prunable, torch.inf).argmin(dim=1)
            after = error + pull[row, pruned] - pull[row, revived]
            active &= revivable[row, revived] & prunable[row, pruned]
            active &= (error.abs() > self.threshold) & (after.sign() == sign)
            if not bool(active.any()):
                break
            at = row[active]
            mask[at, revived[active]] = True
            mask[at, pruned[active]] = False
            free[at, revived[active]] = False
            free[at, pruned[active]] = False
            error = torch.where(active, after, error)
            exchanges += len(at)
        return exchanges
