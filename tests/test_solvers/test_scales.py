"""Losses of any size: weights, Gram matrix and linear term as large or small as they like."""

import importlib.util

import pytest
import torch
from helpers import make_problem, optimum, random_mask, single_swaps
from hypothesis import example, given, settings
from hypothesis import strategies as st

from solvers import NM, MaskProblem, PerLayer, PerRow, solve

KERNELS = ["numba", "torch"]
if importlib.util.find_spec("triton") is not None:
    KERNELS.append("triton")
PATTERNS = [PerRow(keep=3), PerRow(sparsity=0.7), NM(2, 4), PerLayer(keep=7)]


def scaled(problem, weight, gram, linear):
    return MaskProblem(
        problem.weight * weight,
        problem.gram * gram,
        problem.pattern,
        None if problem.linear is None else problem.linear * linear,
    )


@st.composite
def cases(draw):
    pattern = draw(st.sampled_from(PATTERNS))
    kind = draw(st.sampled_from(["plain", "linear", "ties", "zero columns", "rank deficient"]))
    return make_problem(2, 8, pattern, kind, draw(st.integers(0, 2**16)))


@settings(max_examples=60)
@given(cases(), st.integers(-66, 40), st.integers(-40, 40), st.sampled_from(KERNELS))
@example(make_problem(2, 8, PerRow(keep=3), "linear"), -66, 0, "numba")
@example(make_problem(2, 8, PerLayer(keep=7), "linear"), 40, -40, "triton")
def test_a_mask_scales_along(problem, weight, gram, kernel):
    if kernel not in KERNELS:
        return
    start = random_mask(problem)
    other = scaled(problem, 2.0**weight, 2.0**gram, 2.0 ** (2 * weight + gram))
    plain = solve(problem, "swap", start=start, kernel=kernel)
    moved = solve(other, "swap", start=start, kernel=kernel)
    assert torch.equal(plain.mask, moved.mask)
    assert torch.equal(plain.objective * 2.0 ** (2 * weight + gram), moved.objective)


@settings(max_examples=60)
@given(
    cases(),
    st.floats(-20, 12),
    st.floats(-12, 12),
    st.floats(-12, 12),
    st.sampled_from(KERNELS),
)
@example(make_problem(2, 8, PerRow(keep=3), "linear"), -20, 0, 0, "numba")
@example(make_problem(2, 8, NM(2, 4), "linear"), -20, 0, 0, "torch")
@example(make_problem(2, 8, PerLayer(keep=7), "linear"), -20, 12, 12, "numba")
@example(make_problem(2, 8, PerRow(keep=3), "linear"), 12, 12, -12, "numba")
def test_no_swap_improves_whatever_outweighs_the_rest(problem, weight, gram, linear, kernel):
    problem = scaled(problem, 10.0**weight, 10.0**gram, 10.0**linear)
    found = solve(problem, "swap", start=random_mask(problem), kernel=kernel)
    least = float(single_swaps(problem, found.mask).min())
    loss, noise = float(found.objective.sum()), 1e-9 * float(problem.scale().sum())
    assert found.status.name == "LOCAL_OPTIMUM"
    assert least >= loss - noise


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weight", [1e-4, 1e-8, 1e-12, 1e-20])
def test_a_linear_term_that_outweighs_all_else_decides(pattern, weight):
    problem = scaled(make_problem(2, 8, pattern, "linear", seed=3), weight, 1.0, 1.0)
    best = optimum(problem)
    searches = [("swap", {"kernel": kernel}) for kernel in KERNELS]
    searches += [("frank_wolfe", {"step": step}) for step in ("sliding", "pairwise", "open_loop")]
    searches += [(name, {}) for name in ("restarts", "best_of", "chain", "semidefinite")]
    searches.append(("tabu", {"iterations": 100}))
    for name, options in searches:
        found = solve(problem, name, **options)
        assert float(found.objective.sum()) == pytest.approx(best, rel=1e-6)
        if found.bound is not None:
            assert float(found.bound.sum()) == pytest.approx(best, rel=1e-3)
            assert float(found.bound.sum()) <= best + 1e-12 * abs(best)


def test_a_row_without_weights_and_one_without_a_linear_term():
    problem = make_problem(3, 8, PerRow(keep=3), "linear", seed=1)
    weight, linear = problem.weight.clone(), problem.linear.clone()
    weight[0], linear[1] = 0.0, 0.0
    weight[2] *= 1e-200
    for gram in (problem.gram, 0.0 * problem.gram, 1e-260 * torch.eye(8, dtype=torch.float64)):
        odd = MaskProblem(weight, gram, problem.pattern, linear)
        for name in ("swap", "frank_wolfe", "tabu"):
            found = solve(odd, name)
            assert bool(found.objective.isfinite().all())
            if gram is not problem.gram:
                best = linear.sort(dim=1).values[:, :5].sum(dim=1)
                assert torch.allclose(found.objective, best, rtol=1e-9)
