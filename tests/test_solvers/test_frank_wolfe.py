import itertools
import math

import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, problems, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, Linear, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.frank_wolfe.batch import Product
from solvers.rounding import negative_part
from solvers.trivial import trivial_bound

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]
EDGES = [PerRow(keep=0), PerRow(keep=8), PerRow(keep=1), PerLayer(keep=0), PerLayer(keep=16)]
DTYPES = ["float64", "float32", "tfloat32", "bfloat16"]
STEPS = ["open_loop", "line_search", "pairwise", "sliding"]


def size_of(problem):
    """What rounding errors of an objective are measured against."""
    everything = (problem.weight.double() ** 2 * problem.gram.diagonal().double()).sum()
    return float(everything + (0 if problem.linear is None else problem.linear.abs().sum()))


def least_relaxed(problem):
    """Summed relaxed objective of all rows, by CVXPY."""
    cvxpy = pytest.importorskip("cvxpy")
    scale = size_of(problem)
    values, vectors = torch.linalg.eigh(problem.gram.double())
    factor = (vectors * values.clamp_min(0).sqrt()).numpy()
    weight = problem.weight.double().numpy()
    z = cvxpy.Variable(problem.shape)
    pruned = 1 - z
    loss = cvxpy.sum_squares(cvxpy.multiply(pruned, weight / math.sqrt(scale)) @ factor)
    if problem.linear is not None:
        loss += cvxpy.sum(cvxpy.multiply(pruned, problem.linear.numpy() / scale))
    spelled = problem.pattern.constraints(problem.shape)
    sums = spelled.matrix @ cvxpy.vec(z, order="C")
    program = cvxpy.Problem(
        cvxpy.Minimize(loss), [z >= 0, z <= 1, sums >= spelled.lower, sums <= spelled.upper]
    )
    program.solve(solver="CLARABEL")
    return float(program.value) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_relaxed_loss_is_that_of_the_quadratic_program(pattern, kind):
    problem = make_problem(3, 16, pattern, kind, seed=8)
    least = least_relaxed(problem)
    for step in ("sliding", "pairwise"):
        solution = solve(problem, "frank_wolfe", step=step, tolerance=1e-7, iterations=20000)
        assert abs(sum(solution.stats["relaxed"]) - least) <= 1e-6 * size_of(problem)
        assert sum(solution.stats["fw_gap"]) <= 1e-6 * size_of(problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [*PATTERNS, *EDGES], ids=str)
def test_bound_is_below_the_enumerated_optimum(pattern, kind):
    problem = make_problem(2, 8, pattern, kind, seed=1)
    least, size = optimum(problem), size_of(problem)
    for step, iterations in [*itertools.product(STEPS, [4]), ("sliding", 2000)]:
        solution = solve(problem, "frank_wolfe", step=step, iterations=iterations)
        assert float(solution.bound.sum()) <= least + 1e-14 * size
        assert bool((solution.bound <= like_bound(solution)).all())
        if solution.status is Status.FEASIBLE:
            relaxed = sum(solution.stats["relaxed"])
            assert float(solution.bound.sum()) >= relaxed - 2e-4 * abs(relaxed) - 1e-11 * size


@settings(max_examples=60)
@given(
    problem=problems(max_rows=3, max_inputs=6),
    step=st.sampled_from(STEPS),
    iterations=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    fixed=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_bounds_and_patterns_hold_whatever_the_options(problem, step, iterations, dtype, fixed):
    options = {"step": step, "iterations": iterations, "dtype": dtype, "fixed": fixed}
    solution = solve(problem, "frank_wolfe", **options)
    assert problem.pattern.violation(solution.mask) is None
    assert (solution.bound is None) == (fixed > 0)
    if solution.bound is not None:
        size = size_of(problem)
        assert float(solution.bound.sum()) <= optimum(problem) + 1e-14 * size
        proven = sum(solution.stats["relaxed"]) - sum(solution.stats["fw_gap"])
        trivial = float(trivial_bound(problem).sum())
        assert float(solution.bound.sum()) >= max(proven - 1e-9 * size, trivial)
    assert (solution.status is Status.FEASIBLE) == (solution.stats["converged"] == problem.shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_steps_agree(pattern, dtype):
    problem = make_problem(3, 16, pattern, seed=2, dtype=torch.float32)
    shares = {"sliding": 1e-4, "pairwise": 1e-3, "line_search": 0.1, "open_loop": 0.1}
    solutions = {
        step: solve(problem, "frank_wolfe", step=step, dtype=dtype, tolerance=share)
        for step, share in shares.items()
    }
    bound = float(solutions["sliding"].bound.sum())
    for step, solution in solutions.items():
        assert solution.status is Status.FEASIBLE
        assert bound <= sum(solution.stats["relaxed"]) <= bound * (1 + 2 * shares[step])
    assert solutions["sliding"].stats["iterations"] < 300


@pytest.mark.parametrize(("dtype", "bits"), [*zip(DTYPES, [53, 24, 11, 8], strict=True)])
def test_products_are_as_exact_as_their_dtype(dtype, bits):
    problem = make_problem(5, 32, PerRow(sparsity=0.5), seed=7)
    product = Product(problem.gram, dtype)
    error = (product(problem.weight) - problem.weight @ problem.gram).abs()
    size = problem.weight.abs() @ problem.gram.abs()
    assert 2.0 ** -(bits + 8) < float((error / size).max()) or dtype == "float64"
    assert float((error / size).max()) <= 4 * 2.0**-bits
    assert torch.get_float32_matmul_precision() == "highest"  # as it was


@pytest.mark.parametrize("fixed", [0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("pattern", [*PATTERNS, NM(keep=5, group=8), PerRow(keep=0)], ids=str)
def test_fixed_weights_are_kept_and_counts_are_exact(pattern, fixed):
    problem = make_problem(4, 24, pattern, seed=3)
    score = problem.pattern.cells(problem.weight.abs() * problem.gram.diagonal().sqrt())
    count = math.floor(pattern.kept_per_cell(problem.shape) * fixed)
    best = score.argsort(dim=1, descending=True)[:, :count]
    wanda = solve(problem, "wanda")
    for step, start in itertools.product(STEPS[1:], [None, random_mask(problem)]):
        options = {"step": step, "fixed": fixed, "iterations": 10}
        solution = solve(problem, "frank_wolfe", start=start, **options)
        assert pattern.violation(solution.mask) is None
        if start is None:
            assert bool(pattern.cells(solution.mask).gather(1, best).all())
        assert (solution.bound is None) == (fixed > 0)
        if fixed == 1 and start is None:
            assert torch.equal(solution.mask, wanda.mask)


def test_fixed_weights_raise_the_relaxed_loss():
    problem = make_problem(6, 32, PerRow(sparsity=0.6), seed=4)
    relaxed = [
        sum(solve(problem, "frank_wolfe", fixed=fixed).stats["relaxed"])
        for fixed in (0, 0.25, 0.5, 0.9, 1)
    ]
    assert relaxed == sorted(relaxed)


def knapsack(rows, d, seed=0):
    """A count, and a budget whose relaxation has fractional vertices."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(3, 20, (rows * d,), generator=generator).double()
    matrix = torch.stack([torch.ones(rows * d, dtype=torch.float64), cost])
    return Linear(matrix, [0, 0], [rows * d // 2, int(cost.sum() * 0.4)])


@pytest.mark.parametrize("step", ["auto", "line_search"])
def test_a_pattern_known_by_its_oracle_alone(step):
    cvxpy = pytest.importorskip("cvxpy")
    problem = make_problem(2, 4, knapsack(2, 4))
    masks = torch.tensor(list(itertools.product([False, True], repeat=8))).view(-1, 2, 4)
    masks = masks[[problem.pattern.is_feasible(mask) for mask in masks]]
    factor = torch.linalg.cholesky(problem.gram)
    outputs = torch.stack([((~m).double() * problem.weight) @ factor for m in masks]).flatten(1)
    share = cvxpy.Variable(len(masks), nonneg=True)
    program = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum_squares(outputs.numpy().T @ share)), [cvxpy.sum(share) == 1]
    )
    program.solve(solver="CLARABEL")

    tolerance = 1e-8 if step == "auto" else 1e-3
    options = {"tolerance": tolerance, "iterations": 300, "step": step}
    solution = solve(problem, "frank_wolfe", **options)
    assert solution.status is Status.FEASIBLE
    assert sum(solution.stats["relaxed"]) == pytest.approx(program.value, rel=max(1e-6, tolerance))
    assert problem.pattern.is_feasible(solution.mask)
    assert float(solution.bound.sum()) <= optimum(problem)
    assert solution.stats["lmo_calls"] <= solution.stats["iterations"] + 8


def test_what_a_pattern_without_cells_cannot_have_is_said():
    problem = make_problem(2, 4, knapsack(2, 4))
    with pytest.raises(InvalidInput, match=r"fixed=0\.5 needs a count per cell"):
        solve(problem, "frank_wolfe", fixed=0.5)
    with pytest.raises(InvalidInput, match="'sliding' needs cells"):
        solve(problem, "frank_wolfe", step="sliding")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_gram_matrix_that_is_a_little_indefinite_keeps_the_bound_valid(pattern):
    plain = make_problem(2, 8, pattern, "rank deficient", seed=5)
    gram = plain.gram - 4e-7 * plain.gram.diagonal().diag()
    problem = MaskProblem(plain.weight, gram, pattern)
    assert float(torch.linalg.eigvalsh(gram)[0]) < 0
    solution = solve(problem, "frank_wolfe", tolerance=1e-12)
    assert float(solution.bound.sum()) <= optimum(problem)


@given(st.integers(1, 12), st.integers(0, 2**16), st.floats(-1e-3, 0.1))
def test_shift_makes_a_matrix_semidefinite(d, seed, least):
    random = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors = torch.linalg.qr(random).Q
    values = torch.linspace(least, 1, d, dtype=torch.float64)
    gram = (vectors * values) @ vectors.T
    gram = (gram + gram.T) / 2
    if bool((gram.diagonal() <= 0).any()):
        return
    scale = gram.diagonal().rsqrt()
    lowest = float(torch.linalg.eigvalsh(gram * scale * scale[:, None])[0])
    shift = negative_part(gram)
    assert lowest + shift >= 0
    assert shift <= 20 * max(-lowest, 1e-12)


def test_a_shared_budget_has_a_bound_on_the_sum():
    problem = make_problem(3, 5, PerLayer(sparsity=0.5), "linear", seed=7)
    solution = solve(problem, "frank_wolfe", start=random_mask(problem))
    assert float(solution.bound.sum()) <= optimum(problem)
    assert bool((solution.bound <= like_bound(solution)).all())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_limits_are_said(pattern, step):
    problem = make_problem(8, 64, pattern, seed=6)
    solution = solve(problem, "frank_wolfe", step=step, iterations=3)
    assert solution.status is Status.ITERATION_LIMIT
    assert solution.stats["iterations"] == 3
    start = solve(problem, "wanda")
    solution = solve(problem, "frank_wolfe", step=step, start=start.mask, time_limit=1e-9)
    assert solution.status is Status.TIME_LIMIT
    assert torch.equal(solution.mask, start.mask)


def test_rows_that_are_done_leave():
    problem = make_problem(12, 48, PerRow(sparsity=0.5), seed=9)
    told = []
    solution = solve(problem, "frank_wolfe", callback=told.append)
    stats = solution.stats
    assert stats["mean_iterations"] < stats["iterations"]
    assert stats["converged"] == 12 == told[-1].done
    for r in (0, 5):
        alone = solve(problem.rows([r]), "frank_wolfe")
        assert alone.stats["relaxed"][0] == pytest.approx(stats["relaxed"][r], rel=2e-4)
    gaps = [gap for _, gap in stats["history"]]
    assert gaps[-1] <= 2e-4 < gaps[0]


def test_better_than_wanda_on_most_rows():
    problem = make_problem(30, 64, PerRow(sparsity=0.6), seed=12)
    wanda, solution = solve(problem, "wanda"), solve(problem, "frank_wolfe")
    assert float(solution.objective.sum()) < 0.9 * float(wanda.objective.sum())
    assert solution.trace[-1].bound == pytest.approx(float(solution.bound.sum()))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("step", "magic"),
        ("iterations", 0),
        ("tolerance", -1.0),
        ("tolerance", math.nan),
        ("fixed", 1.5),
        ("dtype", "float16"),
    ],
)
def test_wrong_options_are_refused(option, value):
    with pytest.raises(InvalidInput, match=option):
        solve(make_problem(2, 4, PerRow(sparsity=0.5)), "frank_wolfe", **{option: value})
