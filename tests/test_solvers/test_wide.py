import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, PerRow, solve
from solvers.certificate import check
from solvers.clock import Clock
from solvers.semidefinite.ascent import Effort
from solvers.semidefinite.barrier import feasible_lengths
from solvers.semidefinite.cuts import Cuts
from solvers.semidefinite.lowrank import ActiveCuts, LowRank, Rows
from solvers.semidefinite.wide import strengthen_batch

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerRow(keep=0), PerRow(keep=8)]


def wide(problem, **options):
    """The semidefinite solver, small rows forced through the wide path."""
    options = {"wide_from": 1, "rounds": 4, **options}
    return solve(problem, "semidefinite", **options)


def searched(problem, rounds=12, seed=0):
    """A low-rank search with cuts after some rounds."""
    pruned = ~random_mask(problem, seed)
    rows = Rows.of(problem)
    search = LowRank(rows, pruned, problem.objective(~pruned) / rows.size, 8, seed)
    for _ in range(rounds):
        search.round(30)
        search.separate(50)
    return rows, search


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_in_spins_are_the_loss(pattern):
    problem = make_problem(2, 8, pattern, "linear", seed=4)
    rows = Rows.of(problem)
    mask = random_mask(problem)
    loss = problem.objective(mask) / rows.size
    for row in range(2):
        form, constant = rows.form(row)
        z = torch.cat([torch.ones(1), 1 - 2 * mask[row].double()]).double()
        assert float(z @ form @ z) + constant == pytest.approx(float(loss[row]))
        assert float((rows.normals().T @ z).abs().max()) < 1e-12


def test_cuts_as_sparse_products_are_the_cuts():
    random = np.random.default_rng(0)
    d, count, z = 7, 40, torch.randn(2, 7, 5)
    z /= z.norm(dim=2, keepdim=True)
    family = torch.tensor(random.integers(0, 5, count))
    index = torch.tensor(np.array([random.choice(d, 3, replace=False) for _ in range(count)]))
    index[family < 3, 2] = index[family < 3, 1]
    row = torch.arange(count) % 2
    cuts = ActiveCuts((2, d), row, family, index, torch.full((count,), 10.0))
    values = (10 - cuts.penalised(z, torch.ones(2), 0.0)).double()
    for at in range(2):
        lifted = torch.cat([torch.eye(5)[:1], z[at]])
        x = (1 + lifted[1:, 0]) / 2
        halves = (lifted[:1] + z[at]) / 2
        mine = (row == at).numpy()
        expected = Cuts(family.numpy()[mine], index.numpy()[mine]).value(
            x.numpy(), (halves @ halves.T).numpy()
        )
        np.testing.assert_allclose(values[row == at].numpy(), expected, atol=1e-5)
    z.requires_grad_()
    multiplier = torch.rand(count)
    lagrangian = -(multiplier * (10 - cuts.penalised(z, torch.ones(2), 0.0))).sum()
    (gradient,) = torch.autograd.grad(lagrangian, z)
    half = torch.zeros(2, d, 5)
    cuts.add_gradient(multiplier, z.detach(), half)
    torch.testing.assert_close(2 * half, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_multipliers_state_the_loss_exactly(pattern):
    problem = make_problem(2, 12, pattern, "linear", seed=2)
    rows, search = searched(problem, rounds=4)
    assert len(search.cuts) > 0
    for row, seed in itertools.product(range(2), range(3)):
        form, lengths, constant, cuts, multiplier = search.multipliers(row)
        x = (~random_mask(problem, seed)[row]).double()
        z = torch.cat([torch.ones(1).double(), 2 * x - 1])
        stated = constant + float(lengths.sum()) + float(z @ (form - torch.diag(lengths)) @ z)
        stated += float(multiplier @ cuts.value(x.numpy(), np.outer(x, x)))
        loss = float(problem.objective(random_mask(problem, seed))[row] / rows.size[row])
        assert stated == pytest.approx(loss, abs=1e-9)


def test_newton_steps_stay_feasible_and_raise_the_sum():
    problem = make_problem(1, 16, NM(keep=2, group=4), seed=6)
    rows, search = searched(problem, rounds=2)
    form, lengths, _, _, _ = search.multipliers(0)
    normals = rows.normals()
    sums = []
    for steps in (0, 3, 12):
        feasible, made = feasible_lengths(
            form, lengths, normals, tolerance=1e-9, steps=steps, expired=lambda: False
        )
        assert made <= steps
        beside = torch.eye(17) - normals @ normals.T
        residual = beside @ (form - torch.diag(feasible)) @ beside + normals @ normals.T
        assert float(torch.linalg.eigvalsh(residual)[0]) > 0
        sums.append(float(feasible.sum()))
    assert sums[0] < sums[1] < sums[2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_wide_bounds_are_proven_and_below_the_optimum(kind, pattern):
    problem = make_problem(2, 8, pattern, kind, seed=8)
    solution = wide(problem)
    size = float((problem.weight**2 * problem.gram.diagonal()).sum())
    if problem.linear is not None:
        size += float(problem.linear.abs().sum())
    assert float(solution.bound.sum()) <= optimum(problem) + 1e-12 * size
    assert bool((solution.bound <= like_bound(solution)).all())
    assert bool(torch.isfinite(solution.bound).all())
    verified = check(problem, solution.certificates)
    for one, bound in zip(verified, solution.bound.tolist(), strict=True):
        assert one.bound >= bound - 1e-8 * size - 1e-300


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    d=st.sampled_from([4, 8, 12]),
    keep=st.integers(0, 3),
    grouped=st.booleans(),
    rounds=st.integers(1, 5),
)
def test_no_wide_bound_exceeds_an_optimum(seed, kind, d, keep, grouped, rounds):
    pattern = NM(max(1, keep), 4) if grouped else PerRow(keep=keep)
    problem = make_problem(1, d, pattern, kind, seed=seed)
    solution = wide(problem, rounds=rounds)
    size = float((problem.weight**2 * problem.gram.diagonal()).sum())
    if problem.linear is not None:
        size += float(problem.linear.abs().sum())
    (verified,) = check(problem, solution.certificates)
    assert max(verified.bound, float(solution.bound)) <= optimum(problem) + 1e-12 * size


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_wide_bounds_are_tight(pattern):
    problem = make_problem(3, 16, pattern, seed=3)
    solution = wide(problem, rounds=40)
    plain = solve(problem, "semidefinite", wide_from=10**6, rounds=40)
    assert bool((solution.gap <= plain.gap + 0.05).all())


def test_rows_bound_alike_alone_and_together():
    problem = make_problem(3, 24, PerRow(sparsity=0.5), seed=5)
    together = wide(problem, rounds=20)
    single = wide(problem, rounds=20, batch=1)
    torch.testing.assert_close(together.bound, single.bound, rtol=0.02, atol=0.0)


def test_without_time_nothing_is_bounded():
    problem = make_problem(2, 40, PerRow(sparsity=0.5), seed=7)
    pruned = ~random_mask(problem)
    batch = strengthen_batch(
        problem,
        pruned,
        problem.objective(~pruned),
        Effort(50, Clock(1e-9), least_gain=0.02, triangles_above=0.0),
        Clock(1e-9),
        rel_gap=1e-4,
    )
    assert batch.bounded == [None, None]


def test_single_precision_problems():
    problem = make_problem(2, 16, PerRow(sparsity=0.5), seed=9, dtype=torch.float32)
    solution = wide(problem)
    assert isinstance(problem, MaskProblem)
    check(problem, solution.certificates)


def test_bad_options():
    problem = make_problem(1, 8, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match="batch=0 must be"):
        solve(problem, "semidefinite", batch=0)


def test_without_time_a_bound_is_that_of_the_convex_loss():
    problem = make_problem(3, 64, PerRow(sparsity=0.6), "rank deficient", seed=3)
    solution = solve(problem, "semidefinite", wide_from=1, rounds=1, row_seconds=1e-6)
    assert solution.bound is not None
    assert (solution.bound > -1e-6 * solution.objective).all()
    for verified in check(problem, solution.certificates):
        assert verified.bound <= float(verified.objective)
