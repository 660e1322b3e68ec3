"""What every solver owes, on every pattern that it claims."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, problems, random_mask
from hypothesis import given

from solvers import (
    NM,
    CellPattern,
    Evidence,
    InvalidInput,
    MaskProblem,
    Outcome,
    PerLayer,
    PerRow,
    Solver,
    Status,
    available,
    get_solver,
    prepare,
    solve,
)
from solvers.certificate import check

NEEDS_MORE = {"dsnot"}
"""Solvers that a problem alone is not enough for; tested with the statistics they need."""
SOLVERS = [
    info.name for info in available() if info.unavailable is None and info.name not in NEEDS_MORE
]
PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6), PerRow(keep=1)]
QUICK = {
    "scip": {"node_limit": 1},
    "semidefinite": {"rounds": 2},
    "branch_and_bound": {"root_rounds": 2, "max_nodes": 40},
}
"""Options that end exact searches soon, and always at the same place, on the larger problems."""
SHORT = {
    "joint": {"initial": "wanda", "max_swaps": 4},
    "best_of": {"members": ["ria", "swap"]},
    "restarts": {"restarts": 2},
    "sparsefw": {"iterations": 20},
    "tabu": {"iterations": 60, "stall": 20},
}
"""Options for tests that solve many problems."""
QUICK.update(SHORT)


@pytest.mark.parametrize("solver", SOLVERS)
@given(problem=problems(max_rows=3, max_inputs=9))
def test_answers_are_allowed_and_honest(solver, problem):
    start = random_mask(problem)
    solution = solve(problem, solver, start=start, **SHORT.get(solver, {}))
    assert problem.pattern.violation(solution.mask) is None
    assert torch.equal(solution.objective, problem.objective(solution.mask))
    before = problem.objective(start)
    if problem.pattern.coupled:
        assert float(solution.objective.sum()) <= float(before.sum())
    else:
        assert bool((solution.objective <= before).all())
    if solution.bound is not None:
        assert bool((solution.bound <= like_bound(solution)).all())
        assert solution.evidence in Evidence
        assert len(solution.bound) == (1 if problem.pattern.coupled else len(solution.mask))
    assert solution.status in Status
    assert solution.status.message.endswith(".")


@pytest.mark.parametrize("solver", SOLVERS)
@given(problem=problems(max_rows=2, max_inputs=6))
def test_nothing_beats_the_enumerated_optimum(solver, problem):
    least = optimum(problem)
    size = float(problem.objective(torch.zeros(problem.shape, dtype=torch.bool)).abs().sum())
    solution = solve(problem, solver, **SHORT.get(solver, {}))
    assert float(solution.objective.sum()) >= least - 1e-9 * size
    if solution.bound is not None:
        assert float(solution.bound.sum()) <= least + 1e-9 * size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_seed_gives_the_same_mask(solver, pattern, kind):
    problem = make_problem(5, 16, pattern, kind, seed=3)
    first, second = (solve(problem, solver, seed=7, **QUICK.get(solver, {})) for _ in range(2))
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scale_of_the_loss_does_not_matter(solver, pattern):
    problem = make_problem(4, 16, pattern, seed=5)
    masks = [
        solve(
            MaskProblem(problem.weight * 2.0**scale, problem.gram * 2.0**scale, pattern),
            solver,
            **QUICK.get(solver, {}),
        ).mask
        for scale in (-13, 0, 13)  # losses times 2^-39 .. 2^39
    ]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_linear_term_counts_unless_it_is_ignored(solver):
    plain, options = make_problem(3, 8, PerRow(keep=4), seed=5), QUICK.get(solver, {})
    term = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(4))] * 3)
    size = float(plain.gram.diagonal().max() * plain.weight.square().sum())
    problem = MaskProblem(plain.weight, plain.gram, plain.pattern, 100.0 * size * term)
    found = solve(problem, solver, **options).mask
    ignores = type(get_solver(solver)).ignores_linear
    without = solve(plain, solver, **options).mask
    if ignores:
        assert torch.equal(found, without)
    else:
        assert bool((problem.objective(found) < problem.objective(without)).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_and_trace_never_rise(solver):
    problem = make_problem(40, 32, PerRow(sparsity=0.5))
    told = []
    solution = solve(problem, solver, callback=told.append, **QUICK.get(solver, {}))
    values = [point.objective for point in solution.trace]
    assert values == sorted(values, reverse=True)
    times = [point.time for point in solution.trace]
    assert times == sorted(times)
    assert all(progress.done <= progress.total == 40 for progress in told)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_with_wrong_counts_is_refused(solver):
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    start = random_mask(problem)
    start[1, :] = True
    with pytest.raises(InvalidInput, match="does not follow the pattern: row 1 keeps 8"):
        solve(problem, solver, start=start)
    with pytest.raises(InvalidInput, match="boolean"):
        solve(problem, solver, start=start.float())
    with pytest.raises(InvalidInput, match="shape"):
        solve(problem, solver, start=start[:1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_wrong_names_options_and_limits_are_refused(solver):
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match=r"no solver 'nonsense'; the solvers are .*magnitude"):
        solve(problem, "nonsense")
    with pytest.raises(InvalidInput, match="no solver 'nonsense'"):
        solve(problem, solver, start="nonsense")
    with pytest.raises(InvalidInput, match=f"'{solver}' has no option 'nonsense'"):
        solve(problem, solver, nonsense=1)
    with pytest.raises(InvalidInput, match="leaves no time"):
        solve(problem, solver, time_limit=0)


def test_available_states_abilities():
    infos = {info.name: info for info in available()}
    assert {"magnitude", "wanda", "ria", "swap"} <= infos.keys()
    assert infos["swap"].needs_start
    assert "candidates" in infos["swap"].options
    assert infos["wanda"].unavailable is None


class _Worse(Solver):
    """Answers with the mask of the smallest weights."""

    name, summary, patterns = "worse", "for tests", (CellPattern,)

    def _search(self, search):
        problem = search.problem
        return Outcome(problem.pattern.round(-problem.weight.abs()), Status.FEASIBLE)


class _Unable(_Worse):
    name, patterns, requires = "unable", (NM,), ("no_such_module",)


class _OnlyNM(_Worse):
    name, patterns = "only", (NM,)


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.5), PerLayer(sparsity=0.5)], ids=str)
def test_a_worse_answer_is_replaced_by_the_start(pattern):
    problem = make_problem(6, 8, pattern)
    start = solve(problem, "wanda")
    assert float(_Worse().solve(problem).objective.sum()) > float(start.objective.sum())
    solution = _Worse().solve(problem, start=start.mask)
    assert float(solution.objective.sum()) <= float(start.objective.sum())
    assert torch.equal(solution.objective, problem.objective(solution.mask))


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.6), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", [name for name in SOLVERS if get_solver(name).rowwise])
def test_rows_apart_get_the_masks_of_rows_together(name, pattern):
    problem = make_problem(5, 12, pattern, seed=4)
    start = solve(problem, "wanda").mask
    together = solve(problem, name, start=start).mask
    for rows in ([0, 1], [2, 3, 4]):
        apart = solve(problem.rows(rows), name, start=start[rows]).mask
        assert torch.equal(apart, together[rows])


class _Boasts(_Worse):
    """Gives a bound twice as high as its own mask's loss."""

    name, gives_bound, rel_gap, evidence = "boasts", True, 1e-4, Evidence.CLAIMED

    def _search(self, search):
        found = super()._search(search)
        found.bound, found.evidence = 2 * search.problem.objective(found.mask), self.evidence
        found.status = Status.OPTIMAL
        return found


def test_a_claim_that_its_own_mask_refutes_is_worth_nothing():
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    solution = _Boasts().solve(problem)
    assert solution.bound.tolist() == [0.0, 0.0]
    assert solution.status is Status.FEASIBLE


class _Wrong(_Boasts):
    name, evidence = "wrong", Evidence.GUARDED


def test_a_derived_bound_that_a_mask_refutes_is_a_fault():
    with pytest.raises(AssertionError, match="its own mask refutes"):
        _Wrong().solve(make_problem(2, 8, PerRow(sparsity=0.5)))


def test_what_a_solver_cannot_do_is_said():
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match="needs no_such_module: pip install no_such_module"):
        _Unable().solve(problem)
    with pytest.raises(InvalidInput, match=r"sparsity per row; these can: .*magnitude"):
        _OnlyNM().solve(problem)


def test_importing_is_light():
    slow = ("numba", "pyscipopt", "cvxpy", "highspy", "scipy.optimize", "threadpoolctl", "flint")
    program = f"import sys, torch, solvers; print([m for m in {slow} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "[]\n", found.stderr


def test_prepare_leaves_nothing_to_compile(monkeypatch):
    ready = prepare()
    assert set(ready) == {info.name for info in available() if info.unavailable is None}

    def fail(self, search):
        raise AssertionError("a solver warms up again")

    for kind in {type(get_solver(name)) for name in ready}:
        monkeypatch.setattr(kind, "_search", fail)
    assert prepare("cpu") == ready


@pytest.mark.parametrize("seed", [8, 14])
@pytest.mark.parametrize("solver", ["branch_and_bound", "scip", "semidefinite"])
def test_an_outlier_among_the_inputs_makes_nothing_equal(solver, seed):
    g = np.random.default_rng(seed)
    inputs = np.sign(g.standard_normal((14, 20)))
    inputs[0] *= 1e5  # its square is all of the Gram matrix's trace
    weight = np.sign(g.standard_normal((1, 14)))
    problem = MaskProblem(weight, inputs @ inputs.T / 20, PerRow(keep=7))
    solution = solve(problem, solver)
    least = optimum(problem)
    if solution.status is Status.OPTIMAL:
        assert float(solution.objective) == pytest.approx(least, rel=1e-4)
        assert float(solution.gap) <= 1e-4
    assert float(solution.bound) <= least
    assert (float(solution.bound) == 0) == (float(solution.gap) == 1)


def test_what_no_witness_proves_is_not_called_certified():
    problem = MaskProblem([[0.0, 1.0]], np.eye(2), PerRow(keep=1))
    solution = solve(problem, "semidefinite")
    assert solution.bound.tolist() == [0.0]
    assert solution.evidence is Evidence.GUARDED  # the witness proves a little less
    (proven,) = check(problem, solution.certificates)
    assert -1e-9 < proven.bound < 0


def test_a_search_cut_short_at_no_loss_has_an_answer():
    problem = MaskProblem([[1.0]], [[1.0]], PerLayer(keep=1))
    assert solve(problem, "swap", time_limit=1e-9).status is Status.TIME_LIMIT


def test_losses_that_underflow_are_refused():
    with pytest.raises(InvalidInput, match="float64 cannot resolve it; scale its weights up"):
        MaskProblem(np.full((1, 3), 1e-158), np.eye(3), PerRow(keep=2))


def test_a_bound_is_not_above_the_exact_loss_of_its_mask():
    g = np.random.default_rng(11)
    x, weight = g.standard_normal((4, g.choice([1, 2, 6]))), g.standard_normal((2, 4))
    problem = MaskProblem(weight, x @ x.T, PerLayer(keep=5))
    options = {"subtree_nodes": 2, "batch": 1, "root_rounds": 1, "subtree_rounds": 1}
    solution = solve(problem, "branch_and_bound", rel_gap=0, **options)
    w, gram = (
        [[Fraction(float(v)) for v in row] for row in part]
        for part in (problem.weight, problem.gram)
    )
    pruned = [[i for i in range(4) if not row[i]] for row in solution.mask.tolist()]
    exact = sum(
        w[r][i] * gram[i][j] * w[r][j] for r, gone in enumerate(pruned) for i in gone for j in gone
    )
    assert Fraction(float(solution.bound)) <= exact
