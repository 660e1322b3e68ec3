import itertools

import numpy as np
import pytest
import torch
from helpers import make_problem, random_mask

from solvers import (
    NM,
    InvalidInput,
    LeastSquares,
    MaskProblem,
    PerLayer,
    PerRow,
    Status,
    solve,
    updated_loss,
)
from solvers.joint.kernel import _sweep
from solvers.joint.search import _tableaux

PATTERNS = [PerRow(sparsity=0.5), NM(keep=2, group=4), PerLayer(sparsity=0.5)]


def loss_after_update(problem, mask, damping=1e-2):
    damped = problem.gram + damping * problem.gram.diagonal().mean() * torch.eye(
        len(problem.gram), dtype=torch.float64
    )
    updated = LeastSquares(damping=0.0)(problem.weight, damped, mask)
    return updated_loss(problem.weight, damped, updated)


def test_the_tableau_is_the_swept_gram_matrix():
    problem = make_problem(4, 10, PerLayer(sparsity=0.5))
    mask = random_mask(problem)
    for rows, tableaux in _tableaux(problem.gram, mask):
        for keep, found in zip(mask[rows].numpy(), tableaux.numpy(), strict=True):
            expected = problem.gram.numpy().copy()
            for k in np.flatnonzero(keep):
                _sweep(expected, k, 1.0)
            assert found == pytest.approx(expected, abs=1e-8)
            for k in np.flatnonzero(keep)[::-1]:
                _sweep(expected, k, -1.0)
            assert expected == pytest.approx(problem.gram.numpy(), abs=1e-8)


@pytest.mark.parametrize("candidates", [1, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_exchange_in_a_row_improves_the_weights_made_best(pattern, candidates):
    problem = make_problem(3, 12, pattern, seed=4)
    found = solve(problem, "joint", initial="magnitude", candidates=candidates)
    assert found.status is Status.LOCAL_OPTIMUM
    assert pattern.is_feasible(found.mask)
    loss = loss_after_update(problem, found.mask)
    assert found.stats["loss"] == pytest.approx(float(loss.sum()))
    before = loss_after_update(problem, solve(problem, "magnitude").mask)
    assert found.stats["initial_loss"] == pytest.approx(float(before.sum()))
    assert bool((loss <= before).all())
    for r, (u, p) in itertools.product(range(3), itertools.permutations(range(12), 2)):
        if found.mask[r, u] and not found.mask[r, p]:
            swapped = found.mask.clone()
            swapped[r, u], swapped[r, p] = False, True
            if pattern.is_feasible(swapped):
                after = loss_after_update(problem, swapped)[r]
                assert float(after) >= float(loss[r]) * (1 - 2e-6)


def test_it_is_often_the_best_mask_of_all_and_better_than_alps():
    hits, alps, joint = 0, 0.0, 0.0
    for seed in range(6):
        problem = make_problem(1, 10, PerRow(sparsity=0.5), seed=seed)
        masks = torch.zeros(252, 10, dtype=torch.bool)
        for row, support in enumerate(itertools.combinations(range(10), 5)):
            masks[row, list(support)] = True
        least = min(float(loss_after_update(problem, mask[None]).sum()) for mask in masks)
        found = solve(problem, "joint").stats
        assert found["loss"] >= least * (1 - 1e-9)
        hits += found["loss"] <= least * (1 + 1e-6)
        alps, joint = alps + found["initial_loss"], joint + found["loss"]
    assert hits >= 4
    assert joint < alps


@pytest.mark.parametrize("kind", ["rank deficient", "zero columns", "zero rows", "tiny", "huge"])
def test_difficult_rows(kind):
    problem = make_problem(4, 24, PerRow(sparsity=0.5), kind)
    found = solve(problem, "joint")
    assert found.stats["loss"] <= found.stats["initial_loss"]
    with pytest.raises(InvalidInput, match="damping=-1"):
        solve(problem, "joint", damping=-1)


def test_limits_are_kept_and_said():
    problem = make_problem(4, 24, PerRow(sparsity=0.5))
    found = solve(problem, "joint", initial="magnitude", max_swaps=1)
    assert found.status is Status.ITERATION_LIMIT
    assert found.stats["swaps"] <= 4
    with pytest.raises(InvalidInput, match="max_swaps=0"):
        solve(problem, "joint", max_swaps=0)


def test_of_dead_inputs_alone_any_mask_will_do():
    problem = MaskProblem(torch.ones(2, 4), torch.zeros(4, 4), PerRow(keep=4))
    assert bool(solve(problem, "joint").mask.all())


def test_a_start_that_is_given_back_is_no_local_optimum():
    problem = make_problem(2, 12, PerRow(sparsity=0.5), seed=4)
    start = solve(problem, "swap").mask  # best without an update of the weights
    found = solve(problem, "joint", start=start)
    assert torch.equal(found.mask, start)
    assert found.status is Status.FEASIBLE
