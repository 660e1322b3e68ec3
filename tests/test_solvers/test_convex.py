import numpy as np
import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, problems, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, Linear, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.convex import _bound, _Minorant, _Multipliers, _Polytope, _quadratics

PATTERNS = [PerRow(sparsity=0.6), PerRow(keep=0), PerRow(keep=8), NM(keep=2, group=4)]
RELAXATIONS = [{}, {"relaxation": "sdp"}, {"relaxation": "sdp", "cuts": True}]


def check(problem, solution):
    """Between a valid bound and the enumerated optimum; the size of what was given away."""
    least, size = optimum(problem), _quadratics(problem)[1]
    assert problem.pattern.is_feasible(solution.mask)
    assert float(solution.objective.sum()) >= least - 1e-12 * size
    assert float(solution.bound.sum()) <= least + 1e-12 * size
    assert bool((solution.bound <= like_bound(solution)).all())
    return (least - float(solution.bound.sum())) / size


@pytest.mark.parametrize("options", RELAXATIONS, ids=str)
@settings(max_examples=25)
@given(problem=problems(max_rows=2, max_inputs=6))
def test_bounds_are_below_the_enumerated_optimum(options, problem):
    if problem.pattern.coupled and problem.shape[0] > 1:
        options = {}
    check(problem, solve(problem, "cvxpy", **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_stronger_relaxations_give_better_bounds(pattern, kind):
    problem = make_problem(1, 8, pattern, kind, seed=1, dtype=torch.float32)
    plain, semidefinite, cut = (
        check(problem, solve(problem, "cvxpy", **options)) for options in RELAXATIONS
    )
    assert semidefinite <= plain + 1e-9
    assert cut <= semidefinite + 1e-5
    assert cut <= 1e-4  # exact on rows this small
    if pattern in (PerRow(keep=0), PerRow(keep=8)):
        assert plain <= 1e-6  # one mask


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_for_the_layer(kind):
    problem = make_problem(2, 6, PerLayer(sparsity=0.6), kind, seed=2)
    assert check(problem, solve(problem, "cvxpy")) < 0.5
    row = make_problem(1, 8, PerLayer(sparsity=0.6), kind, seed=2)
    same = make_problem(1, 8, PerRow(sparsity=0.6), kind, seed=2)
    one, other = (solve(p, "cvxpy", relaxation="sdp", cuts=True) for p in (row, same))
    assert torch.equal(one.bound, other.bound)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("options", RELAXATIONS, ids=str)
def test_losses_of_any_size(options, scale):
    problem = make_problem(2, 6, PerRow(keep=3), "linear", seed=2)
    scaled = MaskProblem(
        problem.weight, problem.gram * scale, problem.pattern, problem.linear * scale
    )
    check(scaled, solve(scaled, "cvxpy", **options))
    bounds = [solve(p, "cvxpy", **options).bound for p in (problem, scaled)]
    torch.testing.assert_close(bounds[0] * scale, bounds[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", RELAXATIONS, ids=str)
def test_linear_constraints(options, rows):
    problem = make_problem(rows, 5, PerRow(keep=2), seed=3)
    costs = np.random.default_rng(0).integers(1, 9, size=5 * rows)
    pattern = Linear(
        np.stack([costs, np.ones(5 * rows), np.eye(5 * rows)[2], np.zeros(5 * rows)]),
        [-np.inf, 2, 1, 0],
        [10 * rows, 2, np.inf, 0],
    )
    problem = MaskProblem(problem.weight, problem.gram, pattern)
    check(problem, solve(problem, "cvxpy", **({} if rows > 1 else options)))


def test_the_bound_is_the_minimum_of_the_relaxation():
    problem = make_problem(1, 12, PerRow(keep=5), seed=7)
    losses, unit = _quadratics(problem)
    polytope = _Polytope.of(problem.pattern.constraints(problem.shape))
    x = np.full(12, 7 / 12)
    for _ in range(20_000):  # Frank-Wolfe
        gradient, _ = losses[0].tangent(x)
        vertex = (~problem.pattern.lmo(torch.from_numpy(-gradient)[None])[0]).double().numpy()
        step = vertex - x
        curvature = 2 * step @ losses[0].matrix @ step
        if curvature == 0 or gradient @ step > -1e-9:
            break
        x = x + min(1.0, -(gradient @ step) / curvature) * step
    reference = float(x @ losses[0].matrix @ x)
    assert _bound(problem, losses, polytope, x) == pytest.approx(reference, rel=1e-3)
    bound = float(solve(problem, "cvxpy").bound) / unit
    assert bound == pytest.approx(reference, rel=1e-3)


@settings(max_examples=60)
@given(problem=problems(max_rows=1, max_inputs=6), seed=st.integers(0, 2**16))
def test_any_point_and_multipliers_give_a_valid_bound(problem, seed):
    generator = np.random.default_rng(seed)
    d = problem.shape[1]
    losses, unit = _quadratics(problem)
    polytope = _Polytope.of(problem.pattern.constraints(problem.shape))

    class Multiplier:
        def __init__(self, count):
            self.shape = (count,)
            self.dual_value = generator.normal(size=count) * 10.0 ** generator.integers(-4, 2)

    i, j = np.triu_indices(d, 1)
    cuts = tuple(Multiplier(len(i)) for _ in range(4))
    least = optimum(problem) / unit
    for chosen in ((), cuts):
        minorant = _Multipliers(Multiplier(d), (i, j), chosen).minorant(losses[0])
        for point in (generator.uniform(size=d), 10 * generator.normal(size=d)):
            assert _bound(problem, [minorant], polytope, point) <= least + 1e-12
            assert _bound(problem, losses, polytope, point) <= least + 1e-12


def test_an_indefinite_matrix_is_made_convex_without_changing_masks():
    generator = np.random.default_rng(1)
    matrix = generator.normal(size=(6, 6))
    minorant = _Minorant(matrix + matrix.T, generator.normal(size=6))
    convex = minorant.convex(None)
    assert np.linalg.eigvalsh(minorant.matrix)[0] < -1
    assert np.linalg.eigvalsh(convex.matrix)[0] >= 0
    for x in generator.integers(0, 2, size=(20, 6)).astype(float):
        values = [x @ m.matrix @ x + m.linear @ x + m.constant for m in (minorant, convex)]
        assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize("name", ["OSQP", "SCS", "CLARABEL"])
def test_the_bound_holds_for_every_conic_solver(name):
    problem = make_problem(2, 8, PerRow(keep=3), "rank deficient", seed=8)
    given_away = check(problem, solve(problem, "cvxpy", cvxpy_solver=name))
    assert given_away == pytest.approx(check(problem, solve(problem, "cvxpy")), abs=1e-3)


def test_no_time_leaves_the_start():
    problem = make_problem(3, 10, PerRow(keep=4), seed=9)
    start = random_mask(problem)
    solution = solve(problem, "cvxpy", start=start, time_limit=1e-9)
    assert solution.status is Status.TIME_LIMIT
    assert solution.stats["program_status"] == ["user_limit"] * 3
    assert bool((solution.objective <= problem.objective(start)).all())
    check(problem, solution)
    hurried = solve(problem, "cvxpy", relaxation="sdp", time_limit=1e-9)
    assert torch.equal(hurried.mask, solve(problem, "wanda").mask)
    check(problem, hurried)
    assert hurried.bound.isfinite().all()


def test_what_it_cannot_do_is_said():
    layer = make_problem(2, 6, PerLayer(sparsity=0.5))
    row = make_problem(1, 6, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match=r"cannot do 0\.5 sparsity per layer over 2 rows; take"):
        solve(layer, "cvxpy", relaxation="sdp")
    with pytest.raises(InvalidInput, match="'lp' must be"):
        solve(row, "cvxpy", relaxation="lp")
    with pytest.raises(InvalidInput, match="cuts belong to relaxation 'sdp'"):
        solve(row, "cvxpy", cuts=True)
    with pytest.raises(InvalidInput, match="no solver 'nonsense' here, only"):
        solve(row, "cvxpy", cvxpy_solver="nonsense")
    with pytest.raises(InvalidInput, match="OSQP cannot do relaxation 'sdp'"):
        solve(row, "cvxpy", relaxation="sdp", cvxpy_solver="OSQP")


@pytest.mark.parametrize("options", RELAXATIONS, ids=str)
@pytest.mark.parametrize("pattern", [PerRow(keep=0), PerRow(keep=1), PerLayer(keep=0)], ids=str)
def test_rows_of_one_input_are_solved(pattern, options):
    solution = solve(MaskProblem([[3.0]], [[2.0]], pattern), "cvxpy", **options)
    loss = 18.0 * (pattern.constraints((1, 1)).upper[0] == 0)
    assert solution.objective.tolist() == [loss]
    assert float(solution.bound.sum()) == pytest.approx(loss, abs=1e-9)
