from dataclasses import replace

import numpy as np
import pytest
import torch

from mipprune.layer_step import LayerStep
from mipprune.surrogate import (
    Inputs,
    Surrogate,
    bias_correction,
    centred,
    missing,
    retargeted,
    shrunk,
)
from solvers import InvalidInput, MaskProblem, PerRow, solve, updated_loss

PATTERN = PerRow(sparsity=0.5)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def layer():
    weight, x = draw(5, 10), draw(10, 400, seed=1) + 0.7
    x[3] += x[4]
    return weight, x


def statistics(x, dense=None):
    tokens = x.shape[1]
    cross = None if dense is None else dense @ x.T / tokens
    return Inputs(x @ x.T / tokens, x.mean(dim=1), cross)


def test_the_default_is_the_plain_loss(layer):
    weight, x = layer
    assert Surrogate().plain
    assert not Surrogate(shrink=0.1).plain
    problem = Surrogate().problem(weight, statistics(x), PATTERN)
    mask = PATTERN.round(draw(5, 10, seed=2))
    change = weight.masked_fill(mask, 0.0) @ x
    assert problem.objective(mask).numpy() == pytest.approx((change**2).mean(dim=1).numpy())
    assert problem.linear is None


def test_shrinkage_leads_from_the_plain_loss_to_wanda(layer):
    weight, x = layer
    inputs = statistics(x)
    half = shrunk(inputs.gram, 0.5)
    assert torch.equal(half.diagonal(), inputs.gram.diagonal())
    off = ~torch.eye(10, dtype=torch.bool)
    assert torch.equal(half[off], inputs.gram[off] / 2)
    full = Surrogate(shrink=1.0).problem(weight, inputs, PATTERN)
    wanda = solve(MaskProblem(weight, inputs.gram, PATTERN), "wanda").mask
    assert torch.equal(solve(full, "swap", start="magnitude").mask, wanda)


def test_a_bias_makes_the_loss_the_centred_one(layer):
    weight, x = layer
    inputs = statistics(x)
    mask = PATTERN.round(draw(5, 10, seed=2))
    pruned = weight.masked_fill(~mask, 0.0)
    bias = bias_correction(weight, pruned, inputs.mean)
    change = weight @ x - (pruned @ x + bias[:, None])
    assert float(change.mean(dim=1).abs().max()) < 1e-12
    loss = Surrogate(centre=1.0).problem(weight, inputs, PATTERN).objective(mask)
    assert loss.numpy() == pytest.approx((change**2).mean(dim=1).numpy())


def test_a_constant_input_has_no_centred_part(layer):
    weight, x = layer
    x[2] = 0.1
    inputs = statistics(x)
    gram = centred(inputs.gram, inputs.mean)
    assert not bool(gram[2].any())
    Surrogate(centre=1.0).problem(weight, inputs, PATTERN)  # accepted as a Gram matrix


def test_dense_targets_with_pruned_inputs(layer):
    weight, dense = layer
    x = dense + 0.3 * draw(10, 400, seed=5)
    inputs = statistics(x, dense)
    problem = Surrogate(dense_targets=True).problem(weight, inputs, PATTERN)
    constant = ((weight @ (dense - x)) ** 2).mean(dim=1)
    for seed in range(3):
        mask = PATTERN.round(draw(5, 10, seed=seed))
        loss = ((weight @ dense - weight.masked_fill(~mask, 0.0) @ x) ** 2).mean(dim=1)
        found = problem.objective(mask) + constant
        assert found.numpy() == pytest.approx(loss.numpy())
    assert float(missing(weight, Inputs(inputs.gram, cross=inputs.gram)).abs().max()) == 0.0


def test_what_is_missing_or_wrong_is_said(layer):
    weight, x = layer
    inputs = Inputs(statistics(x).gram)
    with pytest.raises(InvalidInput, match="needs the mean"):
        Surrogate(centre=1.0).problem(weight, inputs, PATTERN)
    with pytest.raises(InvalidInput, match="Dense targets need"):
        Surrogate(dense_targets=True).problem(weight, inputs, PATTERN)
    with pytest.raises(InvalidInput, match=r"shrink=1\.5 is outside"):
        Surrogate(shrink=1.5)
    with pytest.raises(InvalidInput, match="damping=-1 is negative"):
        Surrogate(damping=-1)


def test_damping_is_in_units_of_the_mean_diagonal(layer):
    _, x = layer
    gram = statistics(x).gram
    expected = gram + 0.2 * gram.diagonal().mean() * torch.eye(10, dtype=torch.float64)
    assert torch.allclose(Surrogate(damping=0.2).gram(Inputs(gram)), expected)


def pair():
    """Of a dense and a pruned model: inputs ``[d, tokens]`` and the stream ``[rows, tokens]``."""
    dense, rest = draw(10, 400, seed=3) + 0.7, draw(5, 400, seed=7) + 0.4
    x = dense + 0.3 * draw(10, 10, seed=9) @ draw(10, 400, seed=4) + 0.1
    return dense, x, rest, rest + 0.2 * draw(5, 10, seed=8) @ x + 0.3


def paired(stream=True):
    dense, x, rest, other = pair()
    gap = (rest - other) if stream else torch.zeros(5, 400, dtype=torch.float64)
    inputs = statistics(x, dense)
    if stream:
        inputs = replace(inputs, gap=gap @ x.T / 400, gap_mean=gap.mean(dim=1))
    return replace(inputs, cross_mean=dense.mean(dim=1)), x, dense, gap


@pytest.mark.parametrize("stream", [False, True])
def test_a_retargeted_weight_carries_the_distance_to_the_targets(layer, stream):
    weight, _ = layer
    inputs, x, dense, gap = paired(stream)
    star = retargeted(weight, inputs, 1.0, 0.0)
    target = weight @ dense + gap
    constant = ((star @ x - target) ** 2).mean(dim=1)
    for seed in range(3):
        v = draw(5, 10, seed=seed)
        loss = ((v @ x - target) ** 2).mean(dim=1)
        found = updated_loss(star, inputs.gram, v) + constant
        assert found.numpy() == pytest.approx(loss.numpy())
    same = Inputs(inputs.gram, cross=inputs.gram)
    assert torch.allclose(retargeted(weight, same, 1.0, 0.0), weight)
    assert torch.allclose(retargeted(weight, inputs, 1.0, 1e6), weight, atol=1e-4)
    with pytest.raises(InvalidInput, match="more damping"):
        retargeted(weight, replace(inputs, gram=torch.zeros(10, 10)), 1.0, 0.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("bias", ["none", "existing"])
def test_weights_are_the_best_for_the_targets_on_the_support(layer, share, bias, stream):
    """Against least squares in numpy, on the inputs themselves."""
    weight, _ = layer
    inputs, x, dense, gap = paired()
    surrogate = Surrogate(dense_targets=share, stream=stream)
    step = LayerStep(surrogate, "least_squares", 0.0, bias)
    aim = step.aim(weight, inputs, has_bias=True)
    mask = PATTERN.round(draw(5, 10, seed=2))
    new, old_bias = aim.updated(mask), draw(5, seed=6)
    new_bias = aim.new_bias(new, old_bias)
    wanted = weight @ ((1 - share) * x + share * dense) + old_bias[:, None] + share * stream * gap
    for row in range(5):
        columns = [x[mask[row]].numpy().T]
        fixed = old_bias[row].numpy()
        if bias == "existing":
            columns, fixed = [*columns, np.ones((400, 1))], 0.0
        best = np.linalg.lstsq(np.hstack(columns), wanted[row].numpy() - fixed, rcond=None)[0]
        assert new[row][mask[row]].numpy() == pytest.approx(best[: int(mask[row].sum())])
        if bias == "existing":
            assert float(new_bias[row]) == pytest.approx(best[-1])
    assert (new_bias is None) == (bias == "none")
    assert not bool(new[~mask].any())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("update", ["none", "gain"])
def test_masks_alone_are_judged_by_the_linear_term(layer, update, stream):
    weight, _ = layer
    inputs, x, dense, gap = paired()
    share = 0.6
    target = weight @ ((1 - share) * x + share * dense) + share * stream * gap
    for bias in ("none", "existing"):
        step = LayerStep(Surrogate(dense_targets=share, stream=stream), update, bias=bias)
        problem = step.aim(weight, inputs, has_bias=True).problems(PATTERN)[0]
        losses = []
        for seed in range(4):
            mask = PATTERN.round(draw(5, 10, seed=seed))
            error = weight.masked_fill(~mask, 0.0) @ x - target
            if bias == "existing":
                error = error - error.mean(dim=1, keepdim=True)
            losses.append((error**2).mean(dim=1) - problem.objective(mask))
        for other in losses[1:]:  # but for a constant of each row
            assert other.numpy() == pytest.approx(losses[0].numpy())


def test_without_other_inputs_targets_are_the_layers_own(layer):
    weight, x = layer
    step = LayerStep(Surrogate(dense_targets=1.0), "least_squares")
    aim = step.aim(weight, statistics(x))
    assert aim.plain
    assert torch.equal(aim.weight, weight)
    assert aim.problems(PATTERN)[0].linear is None
