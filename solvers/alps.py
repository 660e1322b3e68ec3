"""ALPS: masks by the alternating direction method of multipliers on the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .estimates import eigen_seconds
from .options import option
from .pattern import NM, PerLayer, PerRow
from .registry import register
from .solution import Status
from .solver import Outcome, Search, Solver

_RHO_LIMIT = 1e6


@register
@dataclass(frozen=True)
class Alps(Solver):
    """The mask of ALPS (Meng et al., arXiv 2406.07831), meant for least squares after it.

    Splits ``min |V - W|_G^2`` over sparse ``V`` into a dense copy ``B`` and a sparse copy ``D``,
    on inputs scaled to unit norm:

        B = (G + rho I)^-1 (W G - Y + rho D),   D = sparse(B + Y / rho),   Y += rho (B - D)

    where ``sparse`` keeps the largest entries that the pattern allows. Every third iteration
    ``rho`` grows by a factor 1.3, 1.2 or 1.1 as the support still changes by more than a tenth,
    a 200th, or at all; a support that comes to rest ends the search, and one that changes little
    from the beginning restarts it with a fifth of ``rho``. ALPS is this mask with `LeastSquares`
    (which the paper approximates by ten steps of conjugate gradients). A linear term is ignored.

    Parameters
    ----------
    rho
        First penalty.
    iterations
        Most iterations.
    damping
        In units of the mean diagonal of the Gram matrix.
    settle
        Iterations after which a change of the support below 0.03 % ends the search.
    """

    rho: float = option(0.1, above=0)
    iterations: int = option(300, least=1)
    damping: float = option(1e-2, least=0)
    settle: int = option(30, least=0)

    name = "alps"
    summary = "ALPS: the mask by ADMM on the weights, meant for least squares after it"
    patterns = (PerRow, NM, PerLayer)
    ignores_linear = True

    def _search(self, search: Search) -> Outcome:
        problem, clock = search.problem, search.clock
        pattern = problem.pattern
        if clock.remaining < eigen_seconds(problem.shape[1]):
            first = pattern.round(problem.weight.double() ** 2 * problem.gram.diagonal().double())
            return Outcome(first, Status.TIME_LIMIT, stats={"iterations": 0, "rho": self.rho})
        gram = problem.gram.double().clone()
        gram.diagonal().add_(self.damping * gram.diagonal().mean())
        norm = gram.diagonal().sqrt()
        inverse = torch.where(norm > 0, 1 / norm, 0.0)
        gram = gram * inverse * inverse[:, None]
        dense = problem.weight.double() * norm
        target = dense @ gram
        values, vectors = torch.linalg.eigh(gram)

        def support(at: Tensor) -> Tensor:
            return pattern.round(at**2)

        rho, grown = self.rho, False
        first = support(dense)
        D, Y, B = dense.where(first, 0.0), torch.zeros_like(dense), dense
        before = first
        kept = max(1, int(first.sum()))
        status = Status.ITERATION_LIMIT
        done = 0
        for done in range(1, self.iterations + 1):
            right = target - Y + rho * D
            B = (right @ vectors / (values + rho)) @ vectors.T
            D = B + Y / rho
            held = support(D)
            D = D.where(held, 0.0)
            Y = Y + rho * (B - D)
            if done % 3 == 0:
                changed = int((held != before).sum())
                before = held
                share = changed / kept
                if share > 0.005:
                    rho, grown = rho * (1.3 if share > 0.1 else 1.2), True
                elif changed and grown:
                    rho *= 1.1
                elif changed:
                    rho /= 5
                    D, Y = dense.where(first, 0.0), torch.zeros_like(dense)
                elif grown:
                    status = Status.FEASIBLE
                    break
                else:
                    rho /= 5
                rho = min(rho, _RHO_LIMIT)
                if done > self.settle and share < 0.0003:
                    status = Status.FEASIBLE
                    break
            if clock.expired:
                status = Status.TIME_LIMIT
                break
        return Outcome(support(B), status, stats={"iterations": done, "rho": rho})
