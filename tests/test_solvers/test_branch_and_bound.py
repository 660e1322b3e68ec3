import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, make_problem, optimum

from solvers import NM, InvalidInput, Linear, PerLayer, PerRow, Status, solve
from solvers.branch_and_bound.branching import BRANCHINGS, Brancher
from solvers.branch_and_bound.nodes import solve_nodes
from solvers.branch_and_bound.state import FREE, ONE, ZERO
from solvers.semidefinite.program import BinaryProgram

PATTERNS = [PerRow(sparsity=0.6), NM(2, 4), PerRow(keep=0), PerRow(keep=12)]


def size_of(problem):
    size = float((problem.weight.double() ** 2 * problem.gram.diagonal().double()).sum())
    return size + (0.0 if problem.linear is None else float(problem.linear.abs().sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("reformulation", [True, False])
def test_the_optimum_is_found_and_proven(reformulation, pattern, kind):
    problem = make_problem(2, 12, pattern, kind, seed=13)
    solution = solve(problem, "branch_and_bound", rel_gap=1e-6, reformulation=reformulation)
    least = optimum(problem)
    assert solution.status is Status.OPTIMAL
    assert float(solution.objective.sum()) <= least + 2e-6 * abs(least) + 1e-11 * size_of(problem)
    assert float(solution.bound.sum()) <= least + 1e-12 * size_of(problem)


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.6), NM(2, 4), NM(1, 5)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_subtrees_with_multipliers_of_their_own(pattern, seed):
    problem = make_problem(1, 20, pattern, seed=seed)
    whole = solve(problem, "branch_and_bound", rel_gap=1e-6, reformulation=False)
    split = solve(
        problem, "branch_and_bound", rel_gap=1e-6, batch=1,
        root_rounds=1, subtree_nodes=2, subtree_rounds=2,
    )  # fmt: skip
    assert split.status is Status.OPTIMAL
    assert split.stats["trees"][0] > 1
    assert float(split.objective) == pytest.approx(float(whole.objective), rel=2e-6)
    assert float(split.bound) <= float(whole.objective) * (1 + 1e-12)


@pytest.mark.parametrize("reformulation", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_a_coarse_gap_still_gives_a_bound(seed, reformulation):
    problem = make_problem(2, 12, PerRow(sparsity=0.5), seed=seed)
    options = {"root_rounds": 1, "subtree_nodes": 2, "batch": 1, "reformulation": reformulation}
    solution = solve(problem, "branch_and_bound", rel_gap=0.2, **options)
    assert float(solution.gap.max()) <= 0.2 + 1e-12
    assert float(solution.bound.sum()) <= optimum(problem) * (1 + 1e-12)


def test_a_small_layer_with_a_shared_budget():
    problem = make_problem(3, 5, PerLayer(sparsity=0.6), seed=3)
    solution = solve(problem, "branch_and_bound", rel_gap=1e-6)
    least = optimum(problem)
    assert solution.status is Status.OPTIMAL
    assert float(solution.objective.sum()) == pytest.approx(least, rel=2e-6)
    assert float(solution.bound.sum()) <= least * (1 + 1e-12)


@pytest.mark.parametrize("branching", BRANCHINGS)
@pytest.mark.parametrize("selection", ["best_first", "depth_first"])
@pytest.mark.parametrize("tighten", [True, False])
def test_every_rule_reaches_the_same_optimum(branching, selection, tighten):
    problem = make_problem(1, 16, PerRow(sparsity=0.5), seed=21)
    solution = solve(
        problem,
        "branch_and_bound",
        rel_gap=1e-6,
        reformulation=False,
        branching=branching,
        node_selection=selection,
        tighten=tighten,
        batch=3,
    )
    assert float(solution.objective) == pytest.approx(optimum(problem), rel=2e-6)
    assert solution.status is Status.OPTIMAL
    assert solution.stats["nodes"][0] > 1


def test_bounds_rise_and_limits_are_said():
    problem = make_problem(1, 40, PerRow(sparsity=0.5), seed=5)
    full = solve(problem, "branch_and_bound", reformulation=False)
    limited = solve(problem, "branch_and_bound", reformulation=False, max_nodes=20, batch=2)
    assert limited.status is Status.ITERATION_LIMIT
    assert float(limited.bound) < float(full.bound)
    bounds = [point.bound for point in limited.trace if point.bound is not None]
    assert bounds == sorted(bounds)
    assert max(bounds) <= float(full.objective)
    hurried = solve(problem, "branch_and_bound", time_limit=1e-6)
    assert hurried.status is Status.TIME_LIMIT
    assert float(hurried.bound) <= float(full.objective)


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.5), NM(2, 4)], ids=str)
def test_node_bounds_and_fixings_hold_for_every_mask_within(pattern):
    program = BinaryProgram.of(make_problem(1, 8, pattern, seed=17))
    program = program.scaled(1 / program.size)
    every = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    sums = np.array([every[:, program.cell == g].sum(axis=1) for g in range(len(program.pruned))])
    points = every[(sums == program.pruned[:, None]).all(axis=0)]
    losses = np.array([program.objective(x) for x in points])
    random = np.random.default_rng(0)
    state = random.choice([FREE, FREE, FREE, ZERO, ONE], size=(60, 8)).astype(np.int8)
    before = state.copy()
    x = random.random((60, 8))
    bound = np.full(60, -np.inf)
    cutoff = float(np.quantile(losses, 0.3))
    fixed = np.zeros(60, np.int64)
    cells = np.concatenate([[0], np.bincount(program.cell).cumsum()])
    solve_nodes(
        program.quadratic, program.linear, 0.0, cells, program.pruned.astype(np.int64),
        state, x, bound, cutoff, np.full(60, 1e-9), program.magnitude * 2, 500, True, fixed,
    )  # fmt: skip
    assert fixed.sum() == ((state != FREE) & (before == FREE)).sum() > 0
    for node in range(60):
        inside = ((before[node] != ZERO) | (points == 0)) & ((before[node] != ONE) | (points == 1))
        inside = inside.all(axis=1)
        if not inside.any():
            assert bound[node] == np.inf
            continue
        assert bound[node] <= losses[inside].min() + 1e-12
        better = points[inside & (losses < cutoff)]
        assert ((state[node] != ZERO) | (better == 0)).all()
        assert ((state[node] != ONE) | (better == 1)).all()


def test_pseudocosts_choose_what_gained_most():
    brancher = Brancher("pseudocost", np.array([1.0, 2.0, 1.0]))
    state, x, bound = np.zeros((2, 3), np.int8), np.full((2, 3), 0.5), np.zeros(2)
    state[1, 1] = ZERO

    def choose():
        return brancher.choose(state, x, bound, 1.0, trial=None).tolist()

    assert choose() == [1, 0]  # no experience: the curvature decides
    sides, half = np.array([False, True]), np.full(2, 0.5)
    for _ in range(20):
        brancher.learn(np.array([1, 1]), sides, half, np.full(2, 0.1))
        brancher.learn(np.array([2, 2]), sides, half, np.full(2, 0.3))
    assert choose() == [2, 2]
    x[:, 2] = 0.999  # hardly moves up
    assert choose() == [0, 0]


@pytest.mark.parametrize(
    "option",
    [
        {"rel_gap": -1.0},
        {"root_share": 0.0},
        {"batch": 0},
        {"subtree_nodes": 0},
        {"branching": "random"},
        {"node_selection": "worst"},
    ],
)
def test_wrong_options_are_refused(option):
    with pytest.raises(InvalidInput):
        solve(make_problem(1, 4, PerRow(sparsity=0.5)), "branch_and_bound", **option)


@pytest.mark.parametrize("hull", [True, False])
def test_linear_constraints_are_solved_over_the_hull(hull):
    random = np.random.default_rng(4)
    costs = random.integers(1, 9, 10)
    pattern = Linear(costs[None], [0], [int(costs.sum() * 0.5)])
    problem = make_problem(1, 10, pattern, seed=12)
    solution = solve(problem, "branch_and_bound", rel_gap=1e-6, hull=hull)
    every = torch.tensor(list(itertools.product([False, True], repeat=10)))
    allowed = every[(every.numpy() @ costs <= costs.sum() * 0.5)]
    least = min(float(problem.objective(mask[None])) for mask in allowed)
    assert solution.status is Status.OPTIMAL
    assert float(solution.objective) == pytest.approx(least, rel=2e-6)
    assert float(solution.bound) <= least * (1 + 1e-9)
