"""Branch and bound as a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..clock import Clock
from ..options import option
from ..pattern import CellPattern, Pattern
from ..problem import MaskProblem
from ..registry import register
from ..semidefinite.ascent import Effort, ascend
from ..semidefinite.cuts import Array
from ..semidefinite.dual import Multipliers
from ..semidefinite.program import BinaryProgram
from ..semidefinite.solver import Semidefinite, too_large
from ..semidefinite.witness import ConvexForm
from ..solution import Evidence, Status, TracePoint
from ..solver import Outcome, Search, Solver, warm_up
from ..standing import Incumbent, Standing, least_seconds
from .branching import Branching
from .hull import solve_over_hull
from .subtrees import Subtrees
from .tree import NodeSelection, Tree, TreeLimits, TreeResult

_STRICTER = 0.99
"""Share of the gap asked for at which the tree stops, so that rounding does not reopen it."""


@register
@dataclass(frozen=True)
class BranchAndBound(Solver):
    """Branch and bound whose nodes are Frank-Wolfe over the hull (Boscia, arXiv 2208.11010).

    Row by row, or the whole layer where rows share a budget (small layers). For the patterns
    here hull and continuous relaxation coincide, so the strength comes from the objective:
    before the tree is grown, the row is reformulated by semidefinite duality
    (`solvers.semidefinite`), and often that alone closes the gap. Nodes are bounded in batches;
    inputs that the dual gap decides are fixed in whole subtrees.

    Parameters
    ----------
    rel_gap
        Relative gap at which a row counts as optimal.
    reformulation
        Whether to bound the nodes by the reformulated row; otherwise by the plain relaxation.
    root_share
        Share of a row's time for the reformulation.
    root_rounds, root_gain
        Most rounds of it, and the share of the gap that six rounds must close to go on.
    root_triangles_above
        Relative gap above which triangle inequalities are added before giving up.
    subtree_nodes, subtree_rounds
        Nodes after which a tree is split in two, and most rounds of improving each half's
        multipliers.
    max_nodes
        Limit on the nodes of a row.
    branching
        "most_infeasible", "curvature", "pseudocost" or "strong", see `Brancher`.
    node_selection
        "best_first" or "depth_first".
    tighten
        Whether to fix inputs by the dual gap.
    batch
        Nodes expanded at once.
    hull
        For a `Linear` pattern, whose nodes have no cells: whether the oracle is the mixed-integer
        one (the hull) or that of the continuous relaxation. The options above that shape the
        tree of cells do not matter there, and bounds hold for the sum over rows.

    Notes
    -----
    ``stats``: per row ``nodes``, ``trees``, ``root_gap`` and ``seconds``; ``steps`` and ``fixed``
    in total.
    """

    rel_gap: float = option(1e-4, least=0)
    reformulation: bool = True
    root_share: float = option(0.3, above=0, most=1)
    root_rounds: int = option(120, least=1)
    root_gain: float = option(0.15, least=0, most=1)
    root_triangles_above: float = option(0.02, least=0, infinite=True)
    subtree_nodes: int = option(25_000, least=1)
    subtree_rounds: int = option(12, least=1)
    max_nodes: int | None = option(None, least=1)
    max_steps: int = option(2000, least=1)
    branching: Branching = "pseudocost"
    node_selection: NodeSelection = "best_first"
    tighten: bool = True
    batch: int = option(64, least=1)
    hull: bool = True

    name = "branch_and_bound"
    summary = "proven optima: branch and bound over reformulated Frank-Wolfe relaxations"
    patterns = (Pattern,)
    exact = True
    rowwise = True
    gives_bound = True
    needs_start = True

    def prepare(self, device: torch.device) -> None:
        Semidefinite().prepare(device)
        warm_up(BranchAndBound(reformulation=False), device)

    def refuse(self, problem: MaskProblem) -> str | None:
        if not isinstance(problem.pattern, CellPattern) or not problem.pattern.coupled:
            return None
        return too_large(self.name, problem, "take fewer rows, or the solver 'semidefinite'")

    def _search(self, search: Search) -> Outcome:
        if not isinstance(search.problem.pattern, CellPattern):
            assert search.start is not None
            return self._search_hull(search.problem, search.start, search.clock)
        standing = Standing(search)
        units, clock = standing.units, search.clock
        closed = standing.closed(self.rel_gap).tolist()
        columns = ("nodes", "trees", "root_gap", "seconds")
        stats: dict[str, list[float]] = {column: [0.0] * len(units) for column in columns}
        steps = fixed = 0
        finished = True
        for unit, rows in enumerate(units):
            if closed[unit] or clock.expired:
                finished = finished and closed[unit]
                continue
            began, still = clock.seconds, closed[unit:].count(False)
            part = clock.part(1 / still, least=least_seconds(len(rows) * search.problem.shape[1]))
            incumbent = Incumbent(search.problem.rows(rows), standing.mask[rows], part)
            x = standing.relaxed[rows].flatten().cpu().numpy()
            root_gap, result = self._solve_part(incumbent, x, part)
            standing.offer(rows, incumbent.mask)
            standing.raise_bound(unit, result.bound, Evidence.GUARDED)
            finished = finished and result.finished
            numbers = result.nodes, result.trees, root_gap, clock.seconds - began
            for column, value in zip(columns, numbers, strict=True):
                stats[column][unit] = value
            steps, fixed = steps + result.steps, fixed + result.fixed
            if len(units) == 1:
                standing.trace += [TracePoint(began + t, v, low) for t, low, v in result.bounds]
            standing.note(rows[-1] + 1)
        status = Status.FEASIBLE if finished else Status.ITERATION_LIMIT
        return standing.outcome(status, {**stats, "steps": steps, "fixed": fixed})

    def _search_hull(self, problem: MaskProblem, start: Tensor, clock: Clock) -> Outcome:
        """The tree for a pattern that is known by its oracle alone."""
        mask, solution, unit = solve_over_hull(
            problem,
            start,
            rel_gap=self.rel_gap,
            hull=self.hull,
            max_nodes=self.max_nodes,
            time_limit=clock.limit,
        )
        return Outcome(
            mask=mask,
            status=solution.status,
            bound=torch.tensor([solution.bound * unit], dtype=torch.float64, device=mask.device),
            evidence=solution.evidence,
            stats={"nodes": [solution.stats["nodes"]], "lmo_calls": solution.stats["lmo_calls"]},
            trace=[
                TracePoint(
                    point.time,
                    point.objective * unit,
                    None if point.bound is None else point.bound * unit,
                )
                for point in solution.trace
            ],
        )

    def _solve_part(self, incumbent: Incumbent, x: Array, clock: Clock) -> tuple[float, TreeResult]:
        """Gap at the root, and the tree's result in the problem's own units.

        ``x`` ``[weights]`` is where the plain relaxation is about least.
        """
        program = BinaryProgram.of(incumbent.problem)
        size = program.size
        if size == 0:
            return 0.0, TreeResult(bound=0.0, finished=True)

        def improve(x: Array) -> float:
            return incumbent.improve(x) / size

        scaled = program.scaled(1 / size)
        limits = TreeLimits(
            rel_gap=_STRICTER * self.rel_gap,
            max_nodes=self.max_nodes,
            max_steps=self.max_steps,
            batch=self.batch,
            threads=torch.get_num_threads(),
            branching=self.branching,
            node_selection=self.node_selection,
            tighten=self.tighten,
        )
        least = incumbent.total / size
        if self.reformulation:
            result = self._search_reformulated(scaled, limits, least, improve, x, clock)
        else:
            form = ConvexForm.of(scaled, Multipliers.zero(program.inputs))
            result = Tree(scaled, form, limits, least, improve).search(-np.inf, x, clock)
        result.bound *= size
        result.bounds = [(t, low * size, value * size) for t, low, value in result.bounds]
        first = result.bounds[0][1]
        return (incumbent.total - first) / max(abs(incumbent.total), 1e-300), result

    def _search_reformulated(
        self,
        program: BinaryProgram,
        limits: TreeLimits,
        least: float,
        improve: Callable[[Array], float],
        relaxed: Array,
        clock: Clock,
    ) -> TreeResult:
        root = ascend(
            program,
            least,
            Effort(
                max_rounds=self.root_rounds,
                clock=clock.part(self.root_share),
                least_gain=self.root_gain,
                triangles_above=self.root_triangles_above,
            ),
            rel_gap=_STRICTER * self.rel_gap,
            relaxed=relaxed,
            improved=improve,
        )
        least = improve(root.relaxed)
        subtrees = Subtrees(
            program, limits, self.subtree_nodes, self.subtree_rounds, least, improve
        )
        return subtrees.search(root, clock)
