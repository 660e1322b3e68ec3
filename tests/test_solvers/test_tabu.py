import numpy as np
import pytest
import torch
from helpers import make_problem, optimum, random_mask

from solvers import NM, InvalidInput, PerLayer, PerRow, Status, solve
from solvers.swap.rows import ScaledRows
from solvers.tabu.kernel import search_row

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
@pytest.mark.parametrize("kind", ["plain", "linear", "rank deficient"])
def test_small_rows_are_solved_to_optimality(pattern, kind):
    problem = make_problem(5, 12, pattern, kind, seed=2)
    found = solve(problem, "tabu", start=random_mask(problem), iterations=2000)
    assert float(found.objective.sum()) == pytest.approx(optimum(problem))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_goes_beyond_the_first_local_optimum(pattern):
    problem = make_problem(6, 48, pattern, seed=1)
    swap, tabu = solve(problem, "swap"), solve(problem, "tabu", iterations=4000)
    assert tabu.status is Status.LOCAL_OPTIMUM
    assert tabu.stats["swap_loss"] == float(swap.objective.sum())
    assert tabu.stats["iterations"] == 6 * 4000
    assert float(tabu.objective.sum()) < float(swap.objective.sum())
    assert bool((tabu.objective <= swap.objective).all()) or pattern.coupled


@pytest.mark.parametrize("width", [4, 24])
def test_the_incremental_loss_is_the_loss_of_the_best_mask(width):
    pattern = NM(keep=2, group=4) if width == 4 else PerRow(sparsity=0.5)
    problem = make_problem(1, 24, pattern, "linear")
    rows = ScaledRows.of(problem)
    keep = random_mask(problem).numpy()[0].copy()
    best, elite = keep.copy(), keep.copy()
    value = search_row(
        rows.weight[0].numpy(), rows.linear[0].numpy(), rows.gram.numpy(), 0.0, keep, best, elite,
        np.zeros(24, np.int64), np.zeros(3, np.int64), np.array([7], np.uint64),
        width, 4, 2, 50, 1000,
    )  # fmt: skip
    mask = torch.from_numpy(best)[None]
    assert pattern.is_feasible(mask)
    assert pattern.is_feasible(torch.from_numpy(keep)[None])
    assert value * float(rows.unit) == pytest.approx(float(problem.objective(mask)))


def test_more_iterations_are_never_worse_and_another_seed_is_another_search():
    problem = make_problem(4, 40, PerRow(sparsity=0.5), seed=6)
    losses = [
        solve(problem, "tabu", iterations=n).objective for n in (2000, 4000, 8000)
    ]  # whole calls of the kernel, so that each search continues the one before
    assert bool((losses[1] <= losses[0]).all())
    assert bool((losses[2] <= losses[1]).all())
    masks = [solve(problem, "tabu", iterations=40, seed=seed, stall=5).mask for seed in range(6)]
    assert any(not torch.equal(masks[0], mask) for mask in masks)


def test_wrong_options_are_refused():
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    for name in ("iterations", "candidates", "tenure", "stall"):
        with pytest.raises(InvalidInput, match=f"{name}=0"):
            solve(problem, "tabu", **{name: 0})
