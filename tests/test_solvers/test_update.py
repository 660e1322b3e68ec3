import numpy as np
import pytest
import torch
from helpers import make_problem, random_mask

from solvers import NM, InvalidInput, PerLayer, PerRow
from solvers.update import LeastSquares, unbiased_gain, updated_loss

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]


def samples(d, tokens, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(d, d)) @ random.normal(size=(d, tokens)) + 0.3


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_gain_makes_the_output_unbiased(pattern):
    problem = make_problem(6, 16, pattern)
    mask = random_mask(problem)
    inputs = samples(16, 200)
    gram = torch.tensor(inputs @ inputs.T / 200)
    updated = unbiased_gain(problem.weight, gram, mask)
    dense, pruned = problem.weight.numpy() @ inputs, updated.numpy() @ inputs
    energy = (dense * dense).mean(axis=1)
    assert (dense * pruned).mean(axis=1) == pytest.approx(energy)
    ratio = (updated / problem.weight)[mask].numpy()
    assert np.all((updated == 0).numpy() == ~mask.numpy())
    assert len({round(r, 9) for r in ratio}) <= 6


def test_a_row_without_a_gain_stays():
    weight, gram = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -2.0], [-2.0, 5.0]])
    mask = torch.tensor([[True, False]])  # w^T G (m w) = 1 - 2 < 0
    assert torch.equal(unbiased_gain(weight, gram, mask), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_least_squares_agrees_with_a_regression_on_the_samples(pattern, method):
    problem = make_problem(6, 16, pattern)
    mask = random_mask(problem)
    inputs = samples(16, 300)
    gram = torch.tensor(inputs @ inputs.T / 300)
    updated = LeastSquares(damping=0.0, method=method)(problem.weight, gram, mask)
    for row, keep, found in zip(problem.weight.numpy(), mask.numpy(), updated, strict=True):
        expected = np.zeros(16)
        expected[keep] = np.linalg.lstsq(inputs[keep].T, inputs.T @ row, rcond=None)[0]
        assert found.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_dense_targets_with_pruned_inputs(method):
    weight = torch.tensor(np.random.default_rng(3).normal(size=(4, 12)))
    dense, pruned = samples(12, 200, 1), samples(12, 200, 1) + 0.3 * samples(12, 200, 2)
    gram, cross = torch.tensor(pruned @ pruned.T / 200), torch.tensor(dense @ pruned.T / 200)
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    updated = LeastSquares(damping=0.0, method=method)(weight, gram, mask, cross)
    for row, keep, found in zip(weight.numpy(), mask.numpy(), updated, strict=True):
        expected = np.zeros(12)
        expected[keep] = np.linalg.lstsq(pruned[keep].T, dense.T @ row, rcond=None)[0]
        assert found.numpy() == pytest.approx(expected, abs=1e-6)


def test_damping_is_a_pull_towards_the_old_weights_in_units_of_the_mean_diagonal():
    problem = make_problem(3, 12, PerRow(sparsity=0.5))
    mask, gram = random_mask(problem), problem.gram
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    plain = LeastSquares(damping=0.0)(problem.weight, damped, mask)
    assert torch.allclose(LeastSquares(damping=0.1)(problem.weight, gram, mask), plain)
    much = LeastSquares(damping=1e9)(problem.weight, gram, mask)
    assert torch.allclose(much, problem.weight.masked_fill(~mask, 0.0), atol=1e-6)


@pytest.mark.parametrize("kind", ["rank deficient", "zero columns", "tiny", "huge"])
def test_difficult_gram_matrices(kind):
    problem = make_problem(5, 24, PerRow(sparsity=0.5), kind)
    mask = random_mask(problem)
    before = updated_loss(problem.weight, problem.gram, problem.weight.masked_fill(~mask, 0.0))
    found = {}
    for method in ("cholesky", "cg"):
        updated = LeastSquares(damping=1e-2, method=method)(problem.weight, problem.gram, mask)
        found[method] = updated_loss(problem.weight, problem.gram, updated)
        assert bool((found[method] <= before).all())
        assert not bool(updated[~mask].any())
    assert torch.allclose(found["cholesky"], found["cg"], rtol=1e-5)
    assert torch.allclose(before, problem.objective(mask))


def test_what_cannot_be_solved_is_said():
    problem = make_problem(2, 24, PerRow(keep=20), "zero columns")
    mask = random_mask(problem)
    with pytest.raises(InvalidInput, match="is singular with damping 0; give more damping"):
        LeastSquares(damping=0.0)(problem.weight, problem.gram, mask)
    with pytest.raises(InvalidInput, match="did not converge in 1 iterations"):
        LeastSquares(iterations=1, method="cg")(problem.weight, problem.gram, mask)
    with pytest.raises(InvalidInput, match="damping=-1 must be a finite number of at least 0"):
        LeastSquares(damping=-1)
    with pytest.raises(InvalidInput, match="must be one of auto, cholesky, cg"):
        LeastSquares(method="magic")


def test_nothing_kept_and_everything_kept():
    problem = make_problem(3, 8, PerRow(keep=0))
    none = torch.zeros(3, 8, dtype=torch.bool)
    assert not bool(LeastSquares()(problem.weight, problem.gram, none).any())
    assert torch.allclose(LeastSquares()(problem.weight, problem.gram, ~none), problem.weight)


def test_of_dead_inputs_alone_the_kept_weights_stay():
    weight, mask = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[True, False, True]])
    for method in ("cholesky", "cg"):
        updated = LeastSquares(method=method)(weight, torch.zeros(3, 3), mask)
        assert updated.tolist() == [[1.0, 0.0, 3.0]]
