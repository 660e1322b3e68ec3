"""Published methods that are a choice of options here, under their papers' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .frank_wolfe import FrankWolfe
from .options import option
from .pattern import CellPattern
from .registry import register
from .swap import Swap


@register
@dataclass(frozen=True)
class SparseFW(FrankWolfe):
    """SparseFW as published (arXiv 2510.13713): `FrankWolfe` with 2000 open-loop steps.

    Nine tenths of the kept weights are Wanda's (the paper's alpha), so that it gives no bound.
    """

    step: Literal["auto", "open_loop", "line_search", "pairwise", "sliding"] = "open_loop"
    tolerance: float = option(0.0, least=0)
    fixed: float = option(0.9, least=0, most=1)

    name = "sparsefw"
    summary = "SparseFW as published: open loop, nine tenths fixed by Wanda"
    patterns = (CellPattern,)
    gives_bound = False


@register
@dataclass(frozen=True)
class SparseSwaps(Swap):
    """SparseSwaps as published (arXiv 2512.10922): `Swap` with the best swap per row and pass."""

    candidates: int = option(1, least=1)

    name = "sparseswaps"
    summary = "SparseSwaps as published: the best swap per row and pass"
