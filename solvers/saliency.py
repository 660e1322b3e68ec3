"""Closed-form saliencies: score every weight, keep the best-scored that the pattern allows.

They see single weights only, never their interaction, and ignore a linear term. They are the
baselines, and the starts of the searches.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import option
from .pattern import Pattern
from .problem import MaskProblem
from .registry import register
from .solution import Status
from .solver import Outcome, Search, Solver

_MODERATE = 1e-12, 1e12
"""Largest weight and input norm between which float32 holds products and sums of them."""


class Saliency(Solver):
    """A solver that keeps the highest summed score that the pattern allows."""

    patterns = (Pattern,)
    ignores_linear = True

    @abstractmethod
    def score(self, problem: MaskProblem) -> Tensor:
        """Importance of each weight, ``[rows, d]``, non-negative."""

    def _search(self, search: Search) -> Outcome:
        problem = search.problem
        return Outcome(problem.pattern.lmo(-self.score(problem)), Status.FEASIBLE)


@register
@dataclass(frozen=True)
class Magnitude(Saliency):
    """Score ``|W_ij|``."""

    name = "magnitude"
    summary = "keep the largest weights"

    def score(self, problem: MaskProblem) -> Tensor:
        return problem.weight.abs()


@register
@dataclass(frozen=True)
class Wanda(Saliency):
    """Score ``|W_ij| * ||X_j||``: the root of what removing that weight alone costs.

    Wanda (Sun et al., arXiv 2306.11695), equation 1, with the norm read off the Gram matrix.
    """

    name = "wanda"
    summary = "keep the weights whose single removal costs most"

    def score(self, problem: MaskProblem) -> Tensor:
        magnitude, norms = _magnitudes(problem)
        return magnitude * norms


@register
@dataclass(frozen=True)
class RIA(Saliency):
    """Score ``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||^power``.

    Relative importance and activations (Zhang et al., "Plug-and-play", ICLR 2024), whose
    activation power is 0.5.
    """

    power: float = option(0.5, least=0)

    name = "ria"
    summary = "keep the weights that matter most relative to their row and column"

    def score(self, problem: MaskProblem) -> Tensor:
        magnitude, norms = _magnitudes(problem)
        tiny = torch.finfo(magnitude.dtype).tiny
        column = magnitude.sum(dim=0, keepdim=True).clamp_min(tiny)
        row = magnitude.sum(dim=1, keepdim=True).clamp_min(tiny)
        return magnitude * (1 / column + 1 / row) * norms**self.power


def _magnitudes(problem: MaskProblem) -> tuple[Tensor, Tensor]:
    """``|W_ij|``, ``[rows, d]``, and ``||X_j|| / sqrt(tokens)``, ``[d]``, in the weight's dtype.

    In float64 where float32 might not hold what is made of them.
    """
    magnitude, norms = problem.weight.abs(), problem.gram.diagonal().sqrt()
    least, most = _MODERATE
    moderate = all(least < float(values.amax()) < most for values in (magnitude, norms))
    dtype = problem.weight.dtype if moderate else torch.float64
    return magnitude.to(dtype), norms.to(dtype)
