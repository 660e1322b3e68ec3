"""Branch and bound over the convex hull of a domain's integer points.

Boscia (Hendrych, Troppens, Besançon, Pokutta, arXiv 2208.11010): every node is solved by
Frank-Wolfe over the hull of the integer points inside its bounds, through the domain's oracle.
Any Frank-Wolfe iterate bounds its node by value minus gap, so that nodes need not be solved
accurately; every oracle answer is feasible; and children start from their parent's points.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..arrays import floats
from ..clock import Clock
from ..errors import InvalidInput
from ..highs import TimeUp, within
from ..solution import Evidence, Status, TracePoint
from .active_set import ActiveSet
from .branching import Chooser, Rule, chooser
from .domain import Domain, Floats, checked_bounds
from .heuristics import Heuristic, Heuristics
from .incumbent import Incumbent
from .node import Branching, End, FrankWolfe, Inheritance, Node, Relaxed, Variant
from .objective import Function, Gradient, Objective
from .options import check_domain, check_options
from .oracle import Oracle
from .solution import HullProgress, HullSolution
from .table import Table
from .tightening import Cut, cut

Selection = Literal["best_first", "depth_first"]

ROUNDING: tuple[Heuristic, ...] = ("rounding",)

Watch: TypeAlias = Callable[[HullProgress], None]

_OUTSIDE = 1e-6
"""A relaxed point this far outside of tightened bounds has to be found anew."""

_REPEATS = 20
"""How often a node with a whole relaxed point is solved more accurately before it is split."""

_SHARPER = 0.01
"""Factor on the accuracy for every such repetition."""

_TRIAL_ITERATIONS = 10
"""Frank-Wolfe steps per child of a candidate of strong branching."""


@dataclass(frozen=True)
class Settings:
    """How the tree is searched; the options of `minimize`."""

    branching: Rule = "most_infeasible"
    node_selection: Selection = "best_first"
    tightening: bool = True
    strong_convexity: float = 0.0
    node_gap: float = 0.1
    node_gap_decay: float = 0.8
    node_gap_floor: float = 1e-6
    node_iterations: int = 1000
    store: int = 200


def minimize(
    f: Function,
    grad: Gradient | None,
    domain: Domain,
    *,
    start: npt.ArrayLike | None = None,
    rel_gap: float = 1e-2,
    abs_gap: float = 1e-6,
    time_limit: float | None = None,
    node_limit: int | None = None,
    branching: Rule = "most_infeasible",
    node_selection: Selection = "best_first",
    variant: Variant = "corrective",
    lazy: bool = True,
    lazy_tolerance: float = 2.0,
    strong_convexity: float = 0.0,
    tightening: bool = True,
    heuristics: Collection[Heuristic] = ROUNDING,
    hull: bool = True,
    node_gap: float = 0.1,
    node_gap_decay: float = 0.8,
    node_gap_floor: float = 1e-6,
    node_iterations: int = 1000,
    store: int = 200,
    callback: Watch | None = None,
    verbose: bool = False,
) -> HullSolution:
    """Minimise a convex function over a bounded set with integer variables.

    Parameters
    ----------
    f
        ``f(x) -> float``, convex and differentiable on the convex hull of ``domain``. If it has a
        method ``curvature(d)``, it is taken to be quadratic (`Quadratic`), and steps are exact.
        If it has a method ``error(x) -> float``, this must bound what rounding may have changed:
        with F the function that is meant, in exact arithmetic, ``|f(x) - F(x)| <= error(x)`` and
        ``F(y) >= f(x) + <grad(x), y - x> - error(x)`` for all y of the domain. Bounds are less
        it, and GUARDED; `Quadratic` derives its own. Otherwise a share of 1e-14 is guessed.
    grad
        ``grad(x) -> [n]``; None if ``f`` has a method ``grad``.
    domain
        The set: `Box`, `Simplex`, `MixedInteger`, or anything with their oracle.
    start
        A feasible point ``[n]``, never made worse.
    rel_gap, abs_gap
        Stop when objective minus bound is at most ``abs_gap``, or ``rel_gap * |objective|``.
    time_limit, node_limit
        Seconds and nodes; None for no limit. Time is looked at between oracle calls, and by
        the oracles of `MixedInteger` and `solvers.Linear` themselves.
    branching
        "most_infeasible", "strong" (tries both children of up to ten variables) or "pseudocost".
    node_selection
        "best_first" or "depth_first".
    variant
        Frank-Wolfe with "blended_pairwise" or "away" steps.
    lazy, lazy_tolerance
        Use known points, without the oracle, while they promise the last gap divided by this.
    strong_convexity
        ``mu > 0`` if ``f - mu |x|^2 / 2`` is known to be convex: raises bounds, tightens more. A
        value that is too large gives wrong answers, and bounds are CLAIMED unless it is at most
        `Quadratic.strong_convexity`.
    tightening
        Whether to tighten bounds by reduced costs: in each node for its children, and from the
        root's whenever the best value improves. Needs a domain with ``lagrangian``.
    heuristics
        Out of "rounding", "nearest" and "gradient" (`Heuristics`).
    hull
        False to relax integrality (``domain.lmo_relaxed``) instead of using the hull.
    node_gap, node_gap_decay, node_gap_floor
        A node is solved until its Frank-Wolfe gap is ``max(node_gap * node_gap_decay ** depth,
        node_gap_floor)`` of the distance from its bound to the best value, if it cannot be given
        up before.
    node_iterations
        Frank-Wolfe steps per node at most.
    store
        Unused points that children inherit at most.
    callback
        Called with `HullProgress` after each node; an exception it raises ends the search.
    verbose
        Print a table of the progress.

    Returns
    -------
    HullSolution
        With status OPTIMAL, TIME_LIMIT, ITERATION_LIMIT (of nodes), or FEASIBLE if rounding
        errors keep bound and objective apart. No feasible point has a smaller value than its
        bound, in exact arithmetic, if its evidence is GUARDED.

    Raises
    ------
    InvalidInput
        If an option is wrong, the domain empty, the start not in it, ``f`` or ``grad`` not
        finite or seen not to be convex, or time up before any feasible point is known.

    Examples
    --------
    >>> import numpy as np
    >>> from solvers.hull import Hypersimplex, Quadratic, minimize
    >>> f = Quadratic(np.eye(3), -np.array([0.9, 0.2, 0.6]))
    >>> minimize(f, None, Hypersimplex(3, 2)).x
    array([1., 0., 1.])
    """
    check_options(
        {
            "rel_gap": rel_gap,
            "abs_gap": abs_gap,
            "node_limit": node_limit,
            "branching": branching,
            "node_selection": node_selection,
            "variant": variant,
            "lazy": lazy,
            "lazy_tolerance": lazy_tolerance,
            "strong_convexity": strong_convexity,
            "tightening": tightening,
            "heuristics": heuristics,
            "hull": hull,
            "node_gap": node_gap,
            "node_gap_decay": node_gap_decay,
            "node_gap_floor": node_gap_floor,
            "node_iterations": node_iterations,
            "store": store,
            "callback": callback,
            "verbose": verbose,
        }
    )
    check_domain(domain)
    settings = Settings(
        branching=branching,
        node_selection=node_selection,
        tightening=tightening,
        strong_convexity=strong_convexity,
        node_gap=node_gap,
        node_gap_decay=node_gap_decay,
        node_gap_floor=node_gap_floor,
        node_iterations=node_iterations,
        store=store,
    )
    clock = Clock(time_limit)
    objective = Objective(f, grad, domain.n)
    incumbent = Incumbent(rel_gap, abs_gap)
    oracle = Oracle(domain, hull)
    frank_wolfe = FrankWolfe(
        objective,
        oracle,
        incumbent,
        clock,
        variant=variant,
        lazy=lazy,
        lazy_tolerance=lazy_tolerance,
        strong_convexity=strong_convexity,
    )
    tree = Tree(
        domain,
        oracle,
        incumbent,
        clock,
        frank_wolfe,
        Heuristics(heuristics, objective, oracle, frank_wolfe),
        settings,
        Table() if verbose else None,
        callback,
    )
    proven = strong_convexity <= objective.proven_convexity() if strong_convexity else True
    evidence = Evidence.weakest(
        objective.evidence, oracle.evidence, Evidence.GUARDED if proven else Evidence.CLAIMED
    )
    root = _start(domain, objective, oracle, frank_wolfe, start)
    with within(clock):
        _complete(root, objective, oracle, frank_wolfe, incumbent)
        solution = tree.search(root, math.inf if node_limit is None else node_limit)
    return replace(solution, evidence=evidence)


class Tree:
    """The open nodes, and what is known about the closed ones.

    Parameters
    ----------
    domain, oracle, incumbent, clock, frank_wolfe, heuristics
        What nodes are solved with.
    settings
        How to search.
    table, callback
        Told about progress; None for silence.
    """

    def __init__(
        self,
        domain: Domain,
        oracle: Oracle,
        incumbent: Incumbent,
        clock: Clock,
        frank_wolfe: FrankWolfe,
        heuristics: Heuristics,
        settings: Settings,
        table: Table | None,
        callback: Watch | None,
    ) -> None:
        self._domain, self._oracle, self._incumbent = domain, oracle, incumbent
        self._clock, self._frank_wolfe, self._heuristics = clock, frank_wolfe, heuristics
        self._settings, self._table, self._callback = settings, table, callback
        self._chooser: Chooser = chooser(settings.branching, domain.n)
        self._open: list[tuple[float, int, Node]] = []
        self._order = itertools.count()
        self._closed = math.inf
        self._bound = -math.inf
        self._nodes = self._depth = 0
        self._tightened_local = self._tightened_global = 0
        self._root_cut: Cut | None = None
        self._global_for = math.inf
        self._global: tuple[Floats, Floats] = (domain.lower, domain.upper)
        self._root_bound = self._root_objective = math.nan
        self._trace: list[TracePoint] = []

    def search(self, root: Node, node_limit: float) -> HullSolution:
        """Explore from ``root`` until the gap is closed or a limit is reached."""
        self._push(root)
        self._record(None)
        stopped = None
        while self._open:
            if self._nodes > 0 and self._clock.expired:
                stopped = Status.TIME_LIMIT
                break
            if self._nodes >= node_limit:
                stopped = Status.ITERATION_LIMIT
                break
            node = self._pop()
            if node.bound >= self._incumbent.cutoff:
                self._close(node.bound)
                continue
            self._nodes += 1
            self._depth = max(self._depth, node.depth)
            try:
                unfinished = self._process(node)
            except TimeUp:
                unfinished = True
                stopped = Status.TIME_LIMIT
            if node.depth == 0:
                self._root_objective = self._incumbent.value
                self._root_bound = min(node.bound, self._root_objective)
            if unfinished:
                self._push(node)
            self._record(self._callback)
            if stopped is not None:
                break
        return self._solution(stopped)

    def _process(self, node: Node) -> bool:
        """Solve a node, and close or split it; True if time ran out before."""
        self._tighten_globally(node)
        if (node.lower > node.upper).any():
            return False
        active = self._frank_wolfe.begin(node.inherited, node.lower, node.upper)
        if active is None:
            return False
        if (node.lower == node.upper).all():
            value = self._frank_wolfe.harvest(node.lower)
            node.bound = max(node.bound, self._frank_wolfe.below(value, node.lower))
            self._close(node.bound)
            return False
        relaxed = self._solve(node, active)
        node.bound = relaxed.bound
        if relaxed.end is End.TIME:
            node.inherited = self._inheritance(active, relaxed)
            return True
        if relaxed.end is not End.PRUNED:
            self._heuristics.run(relaxed.x, relaxed.gradient, node.lower, node.upper)
        self._learn(node)
        if node.bound >= self._incumbent.cutoff:
            self._close(node.bound)
            return False
        node.inherited = self._inheritance(active, relaxed)
        self._tighten(node, relaxed)
        self._split(node, relaxed)
        return False

    def _solve(self, node: Node, active: ActiveSet) -> Relaxed:
        """Frank-Wolfe to the accuracy of the node's depth, sharper while its point is whole."""
        settings = self._settings
        accuracy = settings.node_gap * settings.node_gap_decay**node.depth
        accuracy = max(accuracy, settings.node_gap_floor)
        bound = node.bound
        for _ in range(_REPEATS):
            relaxed = self._frank_wolfe.solve(
                active,
                node.lower,
                node.upper,
                bound,
                accuracy=accuracy,
                max_iterations=settings.node_iterations,
            )
            bound = relaxed.bound
            over = relaxed.end in (End.PRUNED, End.TIME)
            if over or self._oracle.fractional(relaxed.x).any():
                break
            self._offer_whole(active, relaxed, node)
            if relaxed.end is End.EXHAUSTED or bound >= self._incumbent.cutoff:
                break
            accuracy *= _SHARPER
        return relaxed

    def _offer_whole(self, active: ActiveSet, relaxed: Relaxed, node: Node) -> None:
        """Offer a relaxed point that is whole already."""
        if self._oracle.pure:
            self._heuristics.round(relaxed.x, relaxed.gradient, node.lower, node.upper)
            return
        low, up = self._oracle.fixed(relaxed.x, node.lower, node.upper)
        whole = self._frank_wolfe.begin(
            Inheritance(active.points, active.weights, relaxed.gradient), low, up
        )
        if whole is not None:
            self._frank_wolfe.harvest(np.where(low == up, low, whole.x))

    def _inheritance(self, active: ActiveSet, relaxed: Relaxed) -> Inheritance:
        points, weights = active.kept(self._settings.store)
        return Inheritance(points, weights, relaxed.gradient)

    def _learn(self, node: Node) -> None:
        """Tell the branching rule what the split that made this node was worth."""
        split = node.branching
        if split is not None and math.isfinite(node.bound):
            gain = node.bound - split.parent_bound
            self._chooser.learn(split.variable, split.up, split.distance, max(gain, 0.0))

    def _tighten_globally(self, node: Node) -> None:
        """Apply what the root's reduced costs say under the best value."""
        if self._root_cut is None:
            return
        if self._incumbent.value < self._global_for:
            self._global_for = self._incumbent.value
            before = self._global
            lower, upper = self._root_cut.apply(self._global_for, self._domain.integer)
            self._global = np.maximum(lower, before[0]), np.minimum(upper, before[1])
            self._tightened_global += _changed(before, self._global)
        node.lower = np.maximum(node.lower, self._global[0])
        node.upper = np.minimum(node.upper, self._global[1])

    def _tighten(self, node: Node, relaxed: Relaxed) -> None:
        """Tighten the bounds that the node's children will have."""
        if not self._settings.tightening:
            return
        error = self._frank_wolfe.tangent_error(relaxed, node.lower, node.upper)
        mu = self._settings.strong_convexity
        found = cut(self._domain, relaxed, node.lower, node.upper, mu, error)
        if found is None:
            return
        if node.depth == 0:
            self._root_cut = found
        before = node.lower, node.upper
        node.lower, node.upper = found.apply(self._incumbent.value, self._domain.integer)
        self._tightened_local += _changed(before, (node.lower, node.upper))

    def _split(self, node: Node, relaxed: Relaxed) -> None:
        """Push the children of a node, or close it if there is nothing left to split."""
        if (node.lower > node.upper).any():
            return  # tightening has shown that nothing is better than the best value known
        x = relaxed.x
        if (x < node.lower - _OUTSIDE).any() or (x > node.upper + _OUTSIDE).any():
            self._push(self._child(node, node.lower, node.upper, None))  # tightening cut it off
            return
        loose = self._domain.integer & (node.lower < node.upper)
        fraction = np.where(loose, self._oracle.fractional(x), 0.0)
        if fraction.any():
            variable = self._chooser.choose(
                x, fraction, node.bound, lambda j: self._trial(node, x, j)
            )
            at = float(np.floor(x[variable]))
        elif loose.any():  # whole, but no accuracy has closed the gap
            variable = int(np.where(loose, node.upper - node.lower, 0.0).argmax())
            at = float(np.rint(x[variable]).clip(node.lower[variable], node.upper[variable] - 1))
        else:
            self._close(node.bound)  # as accurate as rounding errors allow
            return
        children = self._children(node, variable, at, float(x[variable]))
        if x[variable] - at > 0.5:
            children.reverse()
        # Depth first takes the newest node: the one nearer to the relaxed point comes last.
        for child in reversed(children):
            self._push(child)

    def _children(self, node: Node, variable: int, at: float, x: float) -> list[Node]:
        """The halves ``x_j <= at`` and ``x_j >= at + 1`` that are not empty."""
        children = []
        if node.lower[variable] <= at:
            upper = node.upper.copy()
            upper[variable] = min(at, upper[variable])
            split = Branching(variable, False, max(x - at, 1e-6), node.bound)
            children.append(self._child(node, node.lower, upper, split))
        if node.upper[variable] >= at + 1:
            lower = node.lower.copy()
            lower[variable] = max(at + 1, lower[variable])
            split = Branching(variable, True, max(at + 1 - x, 1e-6), node.bound)
            children.append(self._child(node, lower, node.upper, split))
        return children

    def _child(self, node: Node, lower: Floats, upper: Floats, split: Branching | None) -> Node:
        return Node(lower, upper, node.bound, node.depth + 1, node.inherited, split)

    def _trial(self, node: Node, x: Floats, variable: int) -> tuple[float, float]:
        """Bounds of both children of a variable after a few steps."""
        bounds = [self._incumbent.value, self._incumbent.value]
        for child in self._children(node, variable, float(np.floor(x[variable])), x[variable]):
            active = self._frank_wolfe.begin(child.inherited, child.lower, child.upper)
            if active is None or child.branching is None:
                continue
            bounds[int(child.branching.up)] = self._frank_wolfe.solve(
                active,
                child.lower,
                child.upper,
                node.bound,
                accuracy=self._settings.node_gap,
                max_iterations=_TRIAL_ITERATIONS,
            ).bound
        return bounds[0], bounds[1]

    def _push(self, node: Node) -> None:
        number = next(self._order)
        if self._settings.node_selection == "best_first":
            heapq.heappush(self._open, (node.bound, number, node))
        else:
            self._open.append((node.bound, number, node))

    def _pop(self) -> Node:
        if self._settings.node_selection == "best_first":
            return heapq.heappop(self._open)[2]
        return self._open.pop()[2]

    def _close(self, bound: float) -> None:
        """Give up a node; what it may still hold limits the final bound."""
        self._closed = min(self._closed, bound)

    def _record(self, callback: Watch | None) -> None:
        """Update the bound, and tell whoever wants to know."""
        if self._settings.node_selection == "best_first":
            least = self._open[0][0] if self._open else math.inf
        else:
            least = min((bound for bound, _, _ in self._open), default=math.inf)
        best = self._incumbent.value
        self._bound = max(self._bound, min(least, self._closed, best))
        self._bound = min(self._bound, best)
        point = TracePoint(self._clock.seconds, best, self._bound)
        last = self._trace[-1] if self._trace else None
        improved = last is None or last.objective != best
        if improved or (last is not None and last.bound != self._bound):
            self._trace.append(point)
        progress = HullProgress(self._nodes, len(self._open), best, self._bound, point.time)
        if self._table is not None:
            self._table.show(progress, self._oracle, improved)
        if callback is not None:
            callback(progress)

    def _solution(self, stopped: Status | None) -> HullSolution:
        incumbent, oracle = self._incumbent, self._oracle
        if incumbent.x is None:
            raise AssertionError("the root finds a feasible point or raises")
        self._record(None)
        gap = incumbent.value - self._bound
        if stopped is None or gap <= incumbent.tolerance:
            enough = gap <= incumbent.tolerance * (1 + 1e-9)
            stopped = Status.OPTIMAL if enough else Status.FEASIBLE
        return HullSolution(
            x=incumbent.x,
            objective=incumbent.value,
            bound=self._bound,
            status=stopped,
            stats={
                "nodes": self._nodes,
                "open": len(self._open),
                "depth": self._depth,
                "lmo_calls": oracle.calls,
                "heuristic_lmo_calls": oracle.heuristic_calls,
                "relaxed_lmo_calls": oracle.relaxed_calls,
                "iterations": self._frank_wolfe.iterations,
                "lazy": self._frank_wolfe.lazy_iterations,
                "tightened_local": self._tightened_local,
                "tightened_global": self._tightened_global,
                "root_bound": self._root_bound,
                "root_objective": self._root_objective,
                "time": self._clock.seconds,
            },
            trace=tuple(self._trace),
        )


def _start(
    domain: Domain,
    objective: Objective,
    oracle: Oracle,
    frank_wolfe: FrankWolfe,
    start: npt.ArrayLike | None,
) -> Node:
    """The first node, with the start if there is one."""
    lower, upper, _ = checked_bounds(domain.lower, domain.upper, domain.integer)
    empty = Inheritance([], np.zeros(0), np.zeros(domain.n))
    root = Node(lower, upper, -math.inf, 0, empty)
    if start is None:
        return root
    try:
        first = floats(start, "The start")
    except InvalidInput:
        raise InvalidInput(f"The start must be {domain.n} finite numbers.") from None
    if first.shape != lower.shape or not np.isfinite(first).all():
        raise InvalidInput(f"The start must be {domain.n} finite numbers.")
    if not oracle.contains(first):
        raise InvalidInput("The start is not in the domain.")
    frank_wolfe.harvest(first)
    gradient = objective.gradient(first)
    root.bound = frank_wolfe.bound_over_box(first, lower, upper)
    root.inherited = Inheritance([first], np.ones(1), gradient)
    return root


def _complete(
    root: Node,
    objective: Objective,
    oracle: Oracle,
    frank_wolfe: FrankWolfe,
    incumbent: Incumbent,
) -> None:
    """Give the first node three feasible points, as far as time allows, and a bound from them."""
    lower, upper = root.lower, root.upper
    try:
        if not root.inherited.points:
            first = oracle.feasible(np.zeros(len(lower)), lower, upper)
            if first is None:
                raise InvalidInput("The domain has no feasible point; loosen its constraints.")
            frank_wolfe.harvest(first)
            root.bound = frank_wolfe.bound_over_box(first, lower, upper)
            root.inherited = Inheritance([first], np.ones(1), objective.gradient(first))
        if objective.everywhere:
            corner = np.zeros(len(lower)).clip(lower, upper)
            root.bound = max(root.bound, frank_wolfe.bound_over_box(corner, lower, upper))
        first, gradient = root.inherited.points[0], root.inherited.gradient
        value = frank_wolfe.harvest(first)
        points = [first]
        for direction in (gradient, -gradient):  # the second for the check alone
            other = oracle.feasible(direction, lower, upper)
            if other is None:
                raise InvalidInput("The domain's oracle answers None for bounds that hold a point.")
            objective.check_tangent(first, value, gradient, other, frank_wolfe.harvest(other))
            points.append(other)
        root.inherited = Inheritance(points, np.array([1.0, 0.0, 0.0]), gradient)
    except TimeUp:
        if incumbent.x is None:
            raise InvalidInput(
                "Time was up before a feasible point was found; give more of it, or a start."
            ) from None


def _changed(before: tuple[Floats, Floats], after: tuple[Floats, Floats]) -> int:
    return int((before[0] != after[0]).sum() + (before[1] != after[1]).sum())
