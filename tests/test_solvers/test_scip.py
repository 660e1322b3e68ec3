import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, problems, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import draw

from solvers import NM, Evidence, InvalidInput, Linear, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.clock import Clock
from solvers.scip import Scip, _factor
from solvers.trivial import trivial_bound

PATTERNS = [PerRow(sparsity=0.6), PerRow(keep=0), PerRow(keep=8), NM(keep=2, group=4)]


def size_of(problem):
    """What SCIP's tolerances are measured against, at most."""
    everything = (problem.weight.double() ** 2 * problem.gram.diagonal().double()).sum()
    return float(everything + (0 if problem.linear is None else problem.linear.abs().sum()))


def check(problem, solution, rel_gap=1e-4):
    """Optimal as enumerated, and a bound that is valid and close."""
    least, size = optimum(problem), size_of(problem)
    loss, bound = float(solution.objective.sum()), float(solution.bound.sum())
    slack = rel_gap * abs(least) + 2e-6 * size
    # What is taken off SCIP's claim keeps a gap of 0 open.
    assert solution.status is (Status.OPTIMAL if rel_gap else solution.status)
    assert (solution.status is Status.OPTIMAL) == bool((solution.gap <= rel_gap).all())
    assert problem.pattern.is_feasible(solution.mask)
    assert least - 1e-12 * size <= loss <= least + slack
    assert least - slack <= bound <= least + 1e-12 * size


@settings(max_examples=40)
@given(problem=problems(max_rows=2, max_inputs=6), reformulation=st.booleans())
def test_agrees_with_enumeration(problem, reformulation):
    check(problem, solve(problem, "scip", reformulation=reformulation))


@pytest.mark.parametrize("reformulation", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [*PATTERNS, PerLayer(sparsity=0.6)], ids=str)
def test_every_kind_agrees_with_enumeration(pattern, kind, reformulation):
    rows, d = (2, 6) if pattern.coupled else (2, 8)
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(rows, d, pattern, kind, seed=1, dtype=dtype)
        solution = solve(problem, "scip", rel_gap=0.0, reformulation=reformulation)
        check(problem, solution, rel_gap=0.0)


@pytest.mark.parametrize(
    "pattern", [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)], ids=str
)
def test_the_reformulated_program_has_the_values_of_the_loss(pattern):
    """Every allowed mask costs the same in both, and the relaxation is far better."""
    part = make_problem(2 if pattern.coupled else 1, 8, pattern, "linear", seed=3)
    start = random_mask(part)
    scip = Scip(reformulation=True)
    middle = np.full(part.weight.numel(), 0.5)
    program, better, proven = scip._reformulated(part, start, middle, Clock())
    assert float(part.objective(better).sum()) <= float(part.objective(start).sum())
    assert proven <= optimum(part) + 1e-12 * size_of(part)
    assert proven > float(trivial_bound(part).sum())
    (block,) = program.blocks
    for seed in range(50):
        mask = random_mask(part, seed)
        x = 1.0 - mask.flatten().double().numpy()
        value = np.square(block.factor @ (x - block.centre)).sum()
        value += program.linear @ x + program.constant
        expected = float(part.objective(mask).sum()) / program.unit
        assert value == pytest.approx(expected, abs=1e-7)
        assert value - program.missing <= expected + 1e-9


def test_reformulation_raises_the_root_bound_and_may_save_the_tree():
    problem = make_problem(1, 24, PerRow(sparsity=0.5), seed=5)
    alone = solve(problem, "scip", reformulation=False, node_limit=1)
    root = solve(problem, "scip", reformulation=True, node_limit=1)
    best = float(solve(problem, "branch_and_bound").objective)
    assert float(alone.bound) < float(root.bound) <= best
    loose = solve(problem, "scip", rel_gap=0.3, reformulation=True)
    assert loose.status is Status.OPTIMAL
    assert loose.stats["nodes"] == 0
    assert float(loose.gap) <= 0.3


@pytest.mark.parametrize("pattern", [PerRow(keep=3), PerLayer(keep=5)], ids=str)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_losses_of_any_size(scale, pattern):
    problem = make_problem(2, 6, pattern, "linear", seed=2)
    scaled = MaskProblem(problem.weight, problem.gram * scale, pattern, problem.linear * scale)
    solution = solve(scaled, "scip")
    check(scaled, solution)
    assert torch.equal(solution.mask, solve(problem, "scip").mask)


def test_inequalities_over_the_layer():
    generator = np.random.default_rng(0)
    problem = make_problem(2, 5, PerRow(keep=2), seed=3)
    costs = generator.integers(1, 9, size=10)
    pattern = Linear(
        np.stack([costs, np.ones(10), 1e-6 * np.eye(10)[3] - 1e-6 * np.eye(10)[7]]),
        [-np.inf, 3, 0],
        [20, 6, np.inf],
    )
    problem = MaskProblem(problem.weight, problem.gram, pattern)
    check(problem, solve(problem, "scip"))


def test_a_row_that_costs_nothing_keeps_its_start():
    problem = make_problem(2, 8, PerRow(keep=3), "zero rows")
    start = random_mask(problem)
    solution = solve(problem, "scip", start=start)
    assert torch.equal(solution.mask[0], start[0])
    assert solution.objective[0] == solution.bound[0] == 0


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.6), PerLayer(sparsity=0.6)], ids=str)
def test_limits_leave_a_valid_answer(pattern):
    problem = make_problem(2, 24, pattern, "plain", seed=4)
    start = solve(problem, "swap").mask
    few = solve(problem, "scip", node_limit=1, reformulation=False)
    assert few.status is Status.ITERATION_LIMIT
    hurried = solve(problem, "scip", time_limit=1e-6)
    assert hurried.status is Status.TIME_LIMIT
    assert hurried.stats["nodes"] == 0
    assert torch.equal(hurried.mask, solve(problem, "wanda").mask)
    kept = solve(problem, "scip", start=start, time_limit=1e-6)
    assert torch.equal(kept.mask, start)
    best = float(solve(problem, "swap").objective.sum())
    for solution in (few, hurried, kept):
        assert solution.bound.isfinite().all()
        assert float(solution.bound.sum()) <= best
        assert bool((solution.bound <= like_bound(solution)).all())


def test_rows_in_parallel_are_the_same():
    problem = make_problem(5, 12, PerRow(sparsity=0.5), seed=5)
    told = []
    one = solve(problem, "scip")
    two = solve(problem, "scip", threads=2, callback=told.append)
    assert torch.equal(one.mask, two.mask)
    assert torch.equal(one.bound, two.bound)
    assert [progress.done for progress in told] == [1, 2, 3, 4, 5]
    assert len(two.stats["program_times"]) == 5
    assert two.stats["program_nodes"] == one.stats["program_nodes"]
    assert two.stats["program_status"] == ["OPTIMAL"] * 5


@pytest.mark.parametrize("threads", [1, 2])
def test_a_callback_may_end_the_search(threads):
    problem = make_problem(6, 8, PerRow(sparsity=0.5))

    def stop(progress):
        raise RuntimeError(f"enough after {progress.done}")

    with pytest.raises(RuntimeError, match="enough after 1"):
        solve(problem, "scip", threads=threads, callback=stop)


def test_trace_runs_from_the_start_to_the_optimum():
    problem = make_problem(3, 10, PerRow(sparsity=0.5), seed=6)
    start = random_mask(problem)
    solution = solve(problem, "scip", start=start)
    first, last = solution.trace[0], solution.trace[-1]
    assert first.objective == float(problem.objective(start).sum())
    assert last.objective == pytest.approx(float(solution.objective.sum()))
    assert last.bound == pytest.approx(float(solution.bound.sum()))


@given(st.integers(1, 6), st.integers(0, 2**16))
def test_what_the_factor_lacks_is_accounted_for(d, seed):
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(d, d))
    matrix = (matrix + matrix.T) / 2  # indefinite, far beyond rounding
    factor, missing = _factor(matrix)
    for bits in itertools.product([0.0, 1.0], repeat=d):
        x = np.array(bits)
        assert x @ matrix @ x >= np.square(factor @ x).sum() - missing - 1e-12
    matrix = matrix @ matrix
    factor, missing = _factor(matrix)
    assert missing <= 1e-7 * max(1.0, matrix.trace())
    np.testing.assert_allclose(factor.T @ factor, matrix, atol=1e-8 * max(1.0, matrix.trace()))


class _Contradictory(PerRow):
    def constraints(self, shape):
        spelled = super().constraints(shape)
        return type(spelled)(spelled.matrix, spelled.lower + 9, spelled.upper + 9)


def test_that_nothing_is_feasible_is_not_believed_against_a_mask():
    problem = make_problem(1, 6, _Contradictory(keep=3))
    solution = solve(problem, "scip")
    assert problem.pattern.is_feasible(solution.mask)
    assert solution.status is Status.FEASIBLE
    assert solution.evidence is Evidence.GUARDED
    assert float(solution.bound) <= optimum(problem)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rel_gap": -1.0}, "rel_gap=-1.0 must be"),
        ({"node_limit": 0}, "node_limit=0 must be"),
        ({"threads": 0}, "threads=0 must be"),
    ],
)
def test_senseless_options_are_refused(option, message):
    with pytest.raises(InvalidInput, match=message):
        solve(make_problem(1, 4, PerRow(keep=2)), "scip", **option)


def test_an_optimum_of_zero_closes_whatever_the_start_costs():
    weight = torch.tensor([[1.0, -1.0, 3.0, 1.0]])
    gram = torch.ones(4, 4) + torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    pattern = Linear([[1.0, 1.0, 1.0, 1.0]], 2.0, 2.0)
    start = torch.tensor([[True, True, False, False]])
    linear = torch.tensor([[1e-3, -1e-3, 0.0, 0.0]])
    solution = solve(MaskProblem(weight, gram, pattern, linear), "scip", start=start)
    assert solution.mask.tolist() == [[False, False, True, True]]
    assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("solver", ["scip", "branch_and_bound"])
def test_a_gram_matrix_rounded_to_float32_is_convex_enough(solver):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, 1, generator=generator)
    weight = torch.randn(1, 6, generator=generator)
    problem = MaskProblem(weight, inputs @ inputs.T, Linear(torch.ones(1, 6), 3.0, 3.0))
    assert float(torch.linalg.eigvalsh(problem.gram.double())[0]) < -1e-9
    solution = solve(problem, solver)
    assert solution.status is Status.OPTIMAL
    assert float(solution.objective.sum()) == pytest.approx(optimum(problem), abs=1e-9)


def test_what_makes_a_rounded_gram_matrix_convex_is_paid_for():
    problem = draw(196).problem  # of rank 1, in float32, under two mixed constraints
    solution = solve(problem, "scip")
    assert solution.status is Status.OPTIMAL
    assert float(solution.gap) <= 1e-4


def test_a_start_that_prunes_nothing_is_no_endless_reason_to_solve_again():
    problem = draw(98).problem
    assert solve(problem, "scip").status in (Status.OPTIMAL, Status.FEASIBLE)
