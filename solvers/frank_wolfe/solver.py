"""Frank-Wolfe over the convex hull of a pattern's masks, then rounding (SparseFW).

A relaxed mask ``z`` in ``[0, 1]`` loses, with ``q = (1 - z) * w`` and ``c = G q``,

    f(z) = q^T G q + linear^T (1 - z),    grad f(z) = -(2 w c + linear)

which is convex, so that for every allowed mask ``m``

    f(m) >= f(z) - max_s <grad f(z), z - s> = f(z) - gap(z):

the Frank-Wolfe gap, found by one call of the pattern's oracle, is a bound as well as the
criterion to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..clock import Clock
from ..errors import InvalidInput
from ..options import option
from ..pattern import CellPattern, Pattern
from ..problem import MaskProblem
from ..registry import register
from ..solver import Outcome, Search, Solver
from .run import Run


@register
@dataclass(frozen=True)
class FrankWolfe(Solver):
    """Frank-Wolfe on the relaxation, then the nearest mask (SparseFW, arXiv 2510.13713).

    Parameters
    ----------
    step
        How an iteration moves; see the notes. "auto" is "sliding" where cells have a fixed
        count, and "pairwise" for other patterns.
    iterations
        Most iterations.
    tolerance
        A row stops when its gap is at most this share of its relaxed loss. Rows that share a
        budget stop together, on their sums.
    fixed
        Share of each cell's kept weights that Wanda chooses beforehand (the paper's alpha), as
        ``removed_count(kept, fixed)`` weights; the rest is optimised. 0 is the default, since only
        then is the whole problem relaxed and bounded. More raises the relaxed loss but leaves less
        to round: measured at 60 % per row, 0.5 gives the best masks (benchmarks/frank_wolfe.py).
        The paper's default is 0.9, chosen for perplexity.
    dtype
        Of the matrix products: "float64", "float32", "tfloat32" (10 bits of mantissa; tensor
        cores on CUDA, the same rounding elsewhere) or "bfloat16" (7 bits). Everything else is
        float64, as is the bound, and a row only stops on a gap evaluated in float64; so this
        changes the path and its length, measured in benchmarks/frank_wolfe_time.py.

    Notes
    -----
    Step rules, each with one matrix product an iteration:

    - "open_loop": towards the oracle's vertex by ``2 / (t + 2)``, as in SparseFW.
    - "line_search": the same way, to the exact minimum.
    - "pairwise": from an away vertex to the oracle's vertex, to the exact minimum. With cells the
      away vertex is the worst one of the smallest face that holds ``z``, so that no vertices
      need be stored (Garber & Meshi, NeurIPS 2016), and a step that the face cut short is
      followed by one of "line_search"; other hulls are not described by their bounds, so that
      there it is the worst of the vertices that make up ``z``.
    - "sliding": conditional gradient sliding (Lan & Zhou, SIAM J. Optim. 2016), an accelerated
      gradient step whose quadratic model is minimised over the hull. Here the model has the
      diagonal metric ``w_j^2 G_jj``, whose minimiser over a cell is ``clip(y - (g - t) / h)`` for
      the one ``t`` that meets the count. The metric's factor follows the curvature seen, and
      momentum restarts when it points uphill (O'Donoghue & Candes, 2015). Cells only.

    Where rows share a budget, all of them make one step together.

    The bound of a row is ``f(z) - gap(z)`` from a fresh float64 evaluation at the last ``z``, less
    what rounding and an indefinite Gram matrix could add. With a shared budget there is one bound
    for all rows. For `Linear` it rests on HiGHS's word (`Evidence.CLAIMED`). With ``fixed`` there
    is none: the restricted problem's bound says nothing about the problem's.

    ``stats``: ``iterations`` (of the slowest row), ``mean_iterations`` (over rows), ``lmo_calls``
    (batched), ``converged`` (rows), ``relaxed`` and ``fw_gap`` (of each row, at the last ``z``),
    ``rounding_residual`` (mean ``|z - mask|``), ``history`` (pairs of an iteration and the
    summed gap relative to the summed loss), ``step``. The trace holds the start, if one was
    given, and the answer, with the bound: a relaxed loss belongs to no mask.
    """

    step: Literal["auto", "open_loop", "line_search", "pairwise", "sliding"] = "auto"
    iterations: int = option(2000, least=1)
    tolerance: float = option(1e-4, least=0)
    fixed: float = option(0.0, least=0, most=1)
    dtype: Literal["float64", "float32", "tfloat32", "bfloat16"] = "float64"

    name = "frank_wolfe"
    summary = "Frank-Wolfe on the relaxation, then rounding; with a bound"
    patterns = (Pattern,)
    gives_bound = True
    rowwise = True

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        cells = isinstance(problem.pattern, CellPattern)
        if self.fixed and not cells:
            raise InvalidInput(
                f"fixed={self.fixed} needs a count per cell, which {problem.pattern} has not; "
                "use fixed=0."
            )
        if self.step == "sliding" and not cells:
            raise InvalidInput(
                f"step 'sliding' needs cells of a fixed count, which {problem.pattern} has not; "
                "use 'pairwise'."
            )
        return Run(self, problem, start, clock, search.callback).outcome()


def relax(problem: MaskProblem, start: Tensor | None, clock: Clock) -> tuple[Outcome, Tensor]:
    """What `FrankWolfe` answers with its default options, and the relaxed mask it ended at."""
    run = Run(FrankWolfe(), problem, start, clock, None)
    outcome = run.outcome()
    return outcome, run.z


def relaxed_mask(problem: MaskProblem, options: FrankWolfe, clock: Clock) -> Tensor:
    """The relaxed mask that Frank-Wolfe ends at, before rounding, float64 ``[rows, d]``."""
    return Run(options, problem, None, clock, None).relaxed()
