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
from ..semidefinite.program import BinaryProgram, independent_parts
from ..semidefinite.solver import Incumbent
from ..semidefinite.witness import ConvexForm
from ..solution import Status, TracePoint, shared_out
from ..solver import Outcome, Progress, Search, Solver
from ..swap import Swap
from .branching import Branching
from .hull import solve_over_hull
from .subtrees import Subtrees
from .tree import NodeSelection, Tree, TreeLimits, TreeResult


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

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        assert start is not None
        if not isinstance(problem.pattern, CellPattern):
            return self._search_hull(problem, start, clock)
        parts = independent_parts(problem)
        best = Swap().solve(problem, start=start)
        mask, objective = best.mask.clone(), best.objective.clone()
        bound = torch.full_like(objective, -torch.inf)
        trace = [TracePoint(clock.seconds, float(objective.sum()))]
        stats: dict[str, list[float]] = {
            "nodes": [], "trees": [], "root_gap": [], "seconds": [],
        }  # fmt: skip
        steps = fixed = 0
        finished = True
        for done, rows in enumerate(parts):
            began = clock.seconds
            incumbent = Incumbent(problem.rows(rows), mask[rows], objective[rows])
            root_gap, result = self._solve_part(incumbent, clock.part(1 / (len(parts) - done)))
            mask[rows], objective[rows] = incumbent.mask, incumbent.objective
            bound[rows] = incumbent.spread(result.bound)
            finished = finished and result.finished
            stats["nodes"].append(result.nodes)
            stats["trees"].append(result.trees)
            stats["root_gap"].append(root_gap)
            stats["seconds"].append(clock.seconds - began)
            steps, fixed = steps + result.steps, fixed + result.fixed
            if len(parts) == 1:
                trace += [TracePoint(began + t, value, low) for t, low, value in result.bounds]
            else:
                trace.append(TracePoint(clock.seconds, float(objective.sum())))
            if search.callback is not None:
                search.callback(Progress(rows[-1] + 1, len(mask), clock.seconds))
        trace.append(TracePoint(clock.seconds, float(objective.sum()), float(bound.sum())))
        limit = Status.TIME_LIMIT if clock.expired else Status.ITERATION_LIMIT
        return Outcome(
            mask=mask,
            status=Status.OPTIMAL if finished else limit,
            bound=bound,
            stats={**stats, "steps": steps, "fixed": fixed},
            trace=trace,
        )

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
        bound = shared_out(solution.bound * unit, problem.objective(mask))
        return Outcome(
            mask=mask,
            status=solution.status,
            bound=bound,
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

    def _solve_part(self, incumbent: Incumbent, clock: Clock) -> tuple[float, TreeResult]:
        """Gap at the root, and the tree's result in the problem's own units."""
        program = BinaryProgram.of(incumbent.problem)
        size = program.size
        if size == 0:
            return 0.0, TreeResult(bound=0.0, finished=True)

        def improve(x: Array) -> float:
            return incumbent.improve(x) / size

        scaled = program.scaled(1 / size)
        limits = TreeLimits(
            rel_gap=self.rel_gap,
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
            result = self._search_reformulated(scaled, limits, least, improve, clock)
        else:
            relaxed = program.pruned[program.cell] / np.bincount(program.cell)[program.cell]
            form = ConvexForm.of(scaled, Multipliers.zero(program.inputs))
            result = Tree(scaled, form, limits, least, improve).search(-np.inf, relaxed, clock)
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
        clock: Clock,
    ) -> TreeResult:
        root = ascend(
            program,
            least,
            Effort(
                max_rounds=self.root_rounds,
                seconds=self.root_share * clock.remaining,
                least_gain=self.root_gain,
                triangles_above=self.root_triangles_above,
            ),
            rel_gap=self.rel_gap,
            improved=improve,
        )
        least = improve(root.relaxed)
        subtrees = Subtrees(
            program, limits, self.subtree_nodes, self.subtree_rounds, least, improve
        )
        return subtrees.search(root, clock)
