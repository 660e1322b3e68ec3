"""Branching on a few inputs, with multipliers improved anew for every subtree.

A tree whose nodes share the root's multipliers bounds thousands of nodes a second, but grows
exponentially with the gap at its root. Semidefinite codes improve the multipliers at every node
(Rendl, Rinaldi and Wiegele 2010; Krislock, Malick and Roupin 2014), which costs seconds and
closes a tenth of the gap at each level. So a subtree is first given to `Tree`, for a limited
number of nodes; if they were not enough, it is split in two, and each half's multipliers are
improved from its parent's.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..clock import Clock
from ..semidefinite.ascent import Bounded, Effort, ascend
from ..semidefinite.cuts import Array
from ..semidefinite.program import BinaryProgram
from ..semidefinite.witness import ConvexForm
from .state import FREE, ONE
from .tree import Tree, TreeLimits, TreeResult

_LEAST_GAIN = 0.02


@dataclass(order=True)
class _Subtree:
    """What is left of the row when some inputs are fixed, and its bound.

    ``free`` and ``ones`` say which of the row's inputs are free and which are fixed at one.
    """

    bound: float
    count: int
    free: Array = field(compare=False)
    ones: Array = field(compare=False)
    program: BinaryProgram = field(compare=False)
    root: Bounded = field(compare=False)

    def lifted(self, x: Array) -> Array:
        """The row's x from that of the free inputs."""
        whole = self.ones.astype(np.float64)
        whole[self.free] = x
        return whole


class Subtrees:
    """Search of one row, in units where its losses are of the order of 1.

    Parameters
    ----------
    program
        The row.
    limits
        Options of each tree; ``max_nodes`` holds for all together.
    tree_nodes
        Nodes of a tree after which its subtree is split.
    rounds
        Most rounds of improving a subtree's multipliers.
    incumbent
        Least loss known.
    improve
        Given a relaxed x, a primal heuristic that returns the least loss known.
    """

    def __init__(
        self,
        program: BinaryProgram,
        limits: TreeLimits,
        tree_nodes: int,
        rounds: int,
        incumbent: float,
        improve: Callable[[Array], float],
    ) -> None:
        self._program, self._limits = program, limits
        self._tree_nodes, self._rounds = tree_nodes, rounds
        self._incumbent, self._improve = incumbent, improve
        self._least_closed = math.inf
        self._queue: list[_Subtree] = []
        self.result = TreeResult(bound=-math.inf, finished=False, trees=0)

    def search(self, root: Bounded, clock: Clock) -> TreeResult:
        """Search until the gap is closed or a limit is hit.

        Parameters
        ----------
        root
            The row's bound.
        clock
            Time left.
        """
        limits, result, queue = self._limits, self.result, self._queue
        every, none = np.ones(self._program.inputs, bool), np.zeros(self._program.inputs, bool)
        queue.append(_Subtree(root.bound, 0, every, none, self._program, root))
        with ThreadPoolExecutor(limits.threads) as pool:
            while queue:
                self._record(clock)
                if clock.expired or (limits.max_nodes and result.nodes >= limits.max_nodes):
                    break
                subtree = heapq.heappop(queue)
                if subtree.bound >= self._cutoff:
                    self._least_closed = min(self._least_closed, subtree.bound)
                    continue
                grown = self._grow(subtree, clock)
                if grown.finished:
                    self._least_closed = min(self._least_closed, grown.bound)
                    continue
                subtree.bound = max(subtree.bound, grown.bound)
                if clock.expired or (limits.max_nodes and result.nodes >= limits.max_nodes):
                    heapq.heappush(queue, subtree)
                    continue
                jobs = [
                    pool.submit(self._strengthened, subtree, free, ones, clock)
                    for free, ones in self._split(subtree, grown.root)
                ]
                for job in jobs:
                    heapq.heappush(queue, job.result())
        self._record(clock)
        result.finished = not queue
        return result

    @property
    def _cutoff(self) -> float:
        return self._incumbent - self._limits.rel_gap * abs(self._incumbent)

    def _record(self, clock: Clock) -> None:
        least = min((subtree.bound for subtree in self._queue), default=math.inf)
        bound = min(least, self._least_closed, self._incumbent)
        self.result.bound = max(self.result.bound, bound)
        self.result.bounds.append((clock.seconds, self.result.bound, self._incumbent))

    def _grow(self, subtree: _Subtree, clock: Clock) -> TreeResult:
        """A tree below the subtree's root."""
        most = self._tree_nodes
        if self._limits.max_nodes is not None:
            most = min(most, self._limits.max_nodes - self.result.nodes)
        tree = Tree(
            subtree.program,
            ConvexForm.of(subtree.program, subtree.root.witness.multipliers),
            self._limits.with_nodes(most),
            self._incumbent,
            lambda x: self._improve(subtree.lifted(x)),
        )
        began = clock.seconds
        grown = tree.search(subtree.bound, subtree.root.relaxed, clock.part(1.0))
        self._incumbent = min(self._incumbent, grown.incumbent)
        self.result.nodes += grown.nodes
        self.result.steps += grown.steps
        self.result.fixed += grown.fixed
        self.result.trees += 1
        if not self._queue:  # nothing else is open: its bound is the row's
            known, closed = self.result.bound, self._least_closed
            self.result.bounds += [
                (began + t, max(known, min(low, closed)), value) for t, low, value in grown.bounds
            ]
        return grown

    def _split(self, subtree: _Subtree, root: Array) -> list[tuple[Array, Array]]:
        """Free inputs and inputs at one of both halves.

        What the tree fixed at its root stays fixed: the rest costs no less than the cutoff.
        """
        if (root != FREE).any():
            self._least_closed = min(self._least_closed, self._cutoff)
        inside = np.flatnonzero(subtree.free)
        free, ones = subtree.free.copy(), subtree.ones.copy()
        free[inside[root != FREE]] = False
        ones[inside[root == ONE]] = True
        free, ones = self._settled(free, ones)
        x = subtree.lifted(np.clip(subtree.root.relaxed, 0, 1))
        at = int(np.where(free, np.minimum(x, 1 - x), -1.0).argmax())
        halves = []
        for value in (False, True):
            half_free, half_ones = free.copy(), ones.copy()
            half_free[at], half_ones[at] = False, value
            half_free, half_ones = self._settled(half_free, half_ones)
            if half_free.any():
                halves.append((half_free, half_ones))
            else:
                self._incumbent = min(self._incumbent, self._improve(half_ones.astype(np.float64)))
        return halves

    def _settled(self, free: Array, ones: Array) -> tuple[Array, Array]:
        """With the inputs fixed of which their cell leaves no choice."""
        cell, cells = self._program.cell, len(self._program.pruned)
        left = self._program.pruned - np.bincount(cell[ones], minlength=cells)
        room = np.bincount(cell[free], minlength=cells)
        all_ones, all_zero = free & (left == room)[cell], free & (left == 0)[cell]
        return free & ~all_ones & ~all_zero, ones | all_ones

    def _strengthened(self, parent: _Subtree, free: Array, ones: Array, clock: Clock) -> _Subtree:
        """A half, with multipliers improved from its parent's."""
        program = self._program.restricted(free, ones)
        root = ascend(
            program,
            self._incumbent,
            Effort(
                max_rounds=self._rounds,
                clock=clock,
                least_gain=_LEAST_GAIN,
                triangles_above=0.0,
            ),
            rel_gap=self._limits.rel_gap,
            start=parent.root.last.restricted(free[parent.free]),
        )
        return _Subtree(
            bound=max(parent.bound, root.bound),
            count=int(free.sum()),
            free=free,
            ones=ones,
            program=program,
            root=root,
        )
