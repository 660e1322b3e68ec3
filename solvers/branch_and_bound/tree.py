"""Best-first or depth-first search over the fixings of one row, nodes bounded in batches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..clock import Clock
from ..rounding import gamma
from ..semidefinite.cuts import Array
from ..semidefinite.program import BinaryProgram
from ..semidefinite.witness import ConvexForm
from .branching import Brancher, Branching
from .state import FREE, ONE, ZERO

NodeSelection = Literal["best_first", "depth_first"]

_TRIAL_STEPS = 48


@dataclass(frozen=True)
class TreeLimits:
    """When a tree stops, and how its nodes are treated."""

    rel_gap: float
    max_nodes: int | None
    max_steps: int
    batch: int
    threads: int
    branching: Branching
    node_selection: NodeSelection
    tighten: bool

    def with_nodes(self, max_nodes: int | None) -> TreeLimits:
        """The same with another limit on the nodes."""
        return replace(self, max_nodes=max_nodes)


@dataclass
class TreeResult:
    """Bound of the row, and what was counted.

    Attributes
    ----------
    bound
        No allowed x costs less.
    finished
        Whether no open node is left.
    incumbent
        Least loss known at the end.
    root
        State of every input after the root was bounded, ``[d]``.
    nodes, steps, fixed, trees
        Nodes bounded, Frank-Wolfe steps, inputs fixed by tightening, trees grown.
    bounds
        (seconds, bound, incumbent) over time.
    """

    bound: float
    finished: bool
    incumbent: float = math.inf
    root: Array = field(default_factory=lambda: np.zeros(0, np.int8))
    nodes: int = 0
    steps: int = 0
    fixed: int = 0
    trees: int = 1
    bounds: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(order=True)
class _Node:
    priority: tuple[float, int]
    bound: float = field(compare=False)
    depth: int = field(compare=False)
    state: Array = field(compare=False)
    x: Array = field(compare=False)


class Tree:
    """Branch and bound on one row, in units where its losses are of the order of 1.

    Parameters
    ----------
    program
        The row; it alone evaluates complete fixings.
    form
        Convex under-estimator that bounds the nodes.
    limits
        Options.
    incumbent
        Least loss known.
    improve
        Given a relaxed x, a primal heuristic that returns the least loss known.
    """

    def __init__(
        self,
        program: BinaryProgram,
        form: ConvexForm,
        limits: TreeLimits,
        incumbent: float,
        improve: Callable[[Array], float],
    ) -> None:
        from .nodes import solve_nodes  # compiles: numba is imported on first use

        self._solve_nodes = solve_nodes
        self._program, self._form, self._limits = program, form, limits
        self._incumbent, self._improve = incumbent, improve
        self._cells = np.concatenate([[0], np.bincount(program.cell).cumsum()])
        self._pruned = program.pruned.astype(np.int64)
        self._magnitude = float(
            np.abs(form.linear).sum() + 2 * np.abs(form.quadratic).sum() + abs(form.constant)
        )
        # Of evaluating a complete fixing.
        self._noise = gamma(2 * program.inputs + 4) * program.magnitude
        self._brancher = Brancher(limits.branching, form.quadratic.diagonal())
        self._least_closed = math.inf
        self._count = 0
        self.result = TreeResult(bound=-math.inf, finished=False)

    def search(self, root_bound: float, root_x: Array, clock: Clock) -> TreeResult:
        """Search until the gap is closed or a limit is hit."""
        limits, result = self._limits, self.result
        d = self._program.inputs
        with ThreadPoolExecutor(limits.threads) as pool:
            self._pool = pool
            state = np.zeros((1, d), np.int8)
            open_nodes: list[_Node] = []
            self._bound_and_push(
                open_nodes, state, root_x[None].copy(), np.array([root_bound]), np.array([0])
            )
            result.root = state[0].copy()
            while open_nodes:
                self._record(open_nodes, clock)
                if clock.expired or (limits.max_nodes and result.nodes >= limits.max_nodes):
                    break
                size = min(len(open_nodes), limits.batch)
                batch = [heapq.heappop(open_nodes) for _ in range(size)]
                batch = [node for node in batch if not self._close_if_done(node.bound)]
                if not batch:
                    continue
                self._incumbent = min(self._incumbent, self._improve(batch[0].x))
                self._split(open_nodes, batch)
        self._record(open_nodes, clock)
        result.finished = not open_nodes
        result.incumbent = self._incumbent
        return result

    @property
    def _cutoff(self) -> float:
        return self._incumbent - self._limits.rel_gap * abs(self._incumbent)

    def _close_if_done(self, bound: float) -> bool:
        if bound < self._cutoff:
            return False
        self._least_closed = min(self._least_closed, bound)
        return True

    def _record(self, open_nodes: list[_Node], clock: Clock) -> None:
        least = min((node.bound for node in open_nodes), default=math.inf)
        bound = min(least, self._least_closed, self._incumbent)
        self.result.bound = max(self.result.bound, bound)
        self.result.bounds.append((clock.seconds, self.result.bound, self._incumbent))

    def _split(self, open_nodes: list[_Node], batch: list[_Node]) -> None:
        """Bound and push both children of every node."""
        state = np.stack([node.state for node in batch])
        x = np.stack([node.x for node in batch])
        bound = np.array([node.bound for node in batch])
        at = self._brancher.choose(state, x, bound, self._cutoff, self._trial)
        state, x, bound, at = (np.repeat(part, 2, axis=0) for part in (state, x, bound, at))
        every = np.arange(len(state))
        one = every % 2 == 1
        state[every, at] = np.where(one, ONE, ZERO)
        depth = np.repeat([node.depth + 1 for node in batch], 2)
        distance = np.abs(one - x[every, at])
        before = bound.copy()
        self._bound_and_push(open_nodes, state, x, bound, depth)
        gain = np.minimum(bound, self._cutoff) - before
        self._brancher.learn(at, one, distance, np.maximum(gain, 0.0))

    def _trial(self, state: Array, x: Array, bound: Array) -> None:
        self._run(state, x, bound, _TRIAL_STEPS, tighten=False)

    def _bound_and_push(
        self, open_nodes: list[_Node], state: Array, x: Array, bound: Array, depth: Array
    ) -> None:
        self._run(state, x, bound, self._limits.max_steps, self._limits.tighten)
        self.result.nodes += len(state)
        complete = self._fill_determined(state, x)
        for k in range(len(state)):
            if math.isinf(bound[k]):
                continue
            if complete[k]:
                loss = self._program.objective(x[k])
                if loss < self._incumbent:
                    self._incumbent = min(loss, self._improve(x[k]))
                self._least_closed = min(self._least_closed, loss - self._noise)
                continue
            if self._close_if_done(bound[k]):
                continue
            self._count += 1
            first = float(bound[k]) if self._limits.node_selection == "best_first" else -depth[k]
            node = _Node((first, self._count), float(bound[k]), int(depth[k]), state[k], x[k])
            heapq.heappush(open_nodes, node)

    def _fill_determined(self, state: Array, x: Array) -> Array:
        """Nodes with one x left: fix it, and say which they are."""
        complete = np.ones(len(state), dtype=bool)
        for g, ones in enumerate(self._pruned):
            part = state[:, self._cells[g] : self._cells[g + 1]]
            values = x[:, self._cells[g] : self._cells[g + 1]]
            left = ones - (part == ONE).sum(axis=1)
            free = (part == FREE).sum(axis=1)
            for rest, fixed in ((left == 0, ZERO), (left == free, ONE)):
                where = rest[:, None] & (part == FREE)
                part[where] = fixed
                values[where] = float(fixed == ONE)
            complete &= (part != FREE).all(axis=1)
        x[complete] = x[complete].round()
        return complete

    def _run(self, state: Array, x: Array, bound: Array, max_steps: int, tighten: bool) -> None:
        """Bound nodes in threads, in place."""
        fixed = np.zeros(len(state), np.int64)
        tolerance = np.full(len(state), 0.1 * self._limits.rel_gap * abs(self._incumbent))
        parts = np.array_split(np.arange(len(state)), min(self._limits.threads, len(state)))
        form = self._form
        jobs = [
            self._pool.submit(
                self._solve_nodes,
                form.quadratic,
                form.linear,
                form.constant,
                self._cells,
                self._pruned,
                state[part[0] : part[-1] + 1],
                x[part[0] : part[-1] + 1],
                bound[part[0] : part[-1] + 1],
                self._cutoff,
                tolerance[part[0] : part[-1] + 1],
                self._magnitude,
                max_steps,
                tighten,
                fixed[part[0] : part[-1] + 1],
            )
            for part in parts
        ]
        self.result.steps += sum(job.result() for job in jobs)
        if fixed.any():  # what was cut off costs no less than the cutoff, and maybe no more
            self.result.fixed += int(fixed.sum())
            self._least_closed = min(self._least_closed, self._cutoff)
