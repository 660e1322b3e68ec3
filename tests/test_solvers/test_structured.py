import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, make_problem, optimum
from hypothesis import given
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, PerRow, Status, available, solve
from solvers.structured import (
    attention_heads,
    eliminate,
    elimination_curve,
    expand,
    flap,
    input_channels,
    input_groups,
    most_salient,
    neurons,
    parameter_budget,
    refitted,
    wanda_sp,
)

ANY = PerRow(keep=1)


def layer(rows, tokens, d, seed=0):
    """A weight, correlated inputs and their Gram matrix."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(d, d)) @ random.normal(size=(d, tokens)) + 0.3
    return random.normal(size=(rows, d)), inputs, inputs @ inputs.T / tokens


def all_masks(count):
    return [torch.tensor([bits]) for bits in itertools.product([False, True], repeat=count)]


@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "linear"]),
    rows=st.integers(1, 5),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_objective_is_the_loss_of_the_layer(kind, rows, labels, seed, dtype):
    _, groups = np.unique(labels, return_inverse=True)
    dense = make_problem(rows, len(groups), ANY, kind, seed, dtype)
    problem = input_groups(dense.weight, dense.gram, groups, ANY)
    assert problem.weight.dtype == torch.float64
    size = float(dense.weight.double().square().sum() * dense.gram.double().trace())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for mask in all_masks(problem.shape[1]):
        loss = float(dense.objective(expand(mask, groups, rows)).sum())
        assert float(problem.objective(mask)) == pytest.approx(
            loss, rel=1e-10, abs=tolerance * size
        )


def test_the_objective_is_the_change_of_the_output():
    weight, inputs, gram = layer(rows=4, tokens=200, d=12)
    groups = [0, 1, 2, 0, 1, 2, 3, 3, 3, 4, 4, 0]
    problem = input_groups(weight, gram, groups, ANY)
    for mask in all_masks(5):
        kept = expand(mask, groups, 4).numpy()
        change = weight @ inputs - (kept * weight) @ inputs
        expected = (change**2).sum() / 200
        assert float(problem.objective(mask)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_channels_neurons_and_heads_are_groups():
    weight, _, gram = layer(rows=4, tokens=50, d=12)
    channels = input_channels(weight, gram, NM(2, 4))
    assert channels.shape == (1, 12)
    assert torch.equal(channels.gram, neurons(weight, gram, NM(2, 4)).gram)
    assert torch.equal(channels.gram, input_groups(weight, gram, np.arange(12), NM(2, 4)).gram)
    heads = attention_heads(weight, gram, 3, PerRow(sparsity=0.5))
    assert heads.shape == (1, 4)
    groups = torch.arange(12) // 3
    assert torch.equal(heads.gram, input_groups(weight, gram, groups, ANY).gram)
    mask = torch.tensor([[True, False, False, True]])
    assert torch.equal(expand(mask, 3, rows=4), expand(mask, groups, rows=4))
    assert expand(mask, 3).tolist() == [[True] * 3 + [False] * 6 + [True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(10))
def test_a_group_that_cancels_costs_nothing(dtype, seed):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(5, 40))
    inputs[1] = inputs[0] * np.pi
    weight = random.normal(size=(3, 5))
    weight[:, 1] = -weight[:, 0] / np.pi
    weight, inputs = torch.tensor(weight).to(dtype), torch.tensor(inputs).to(dtype)
    problem = input_groups(weight, inputs @ inputs.T / 40, [0, 0, 1, 1, 2], ANY)
    cost = [float(problem.objective(torch.arange(3)[None] != k)) for k in range(3)]
    assert cost[0] == 0
    assert min(cost[1:]) > 0
    assert solve(problem, "wanda").status is Status.FEASIBLE


def test_heads_under_a_parameter_budget():
    """Two blocks of three heads, the second with heads twice as dear; one must stay in each."""
    head_dim, hidden = 4, 8
    weight, inputs, gram = layer(hidden, tokens=300, d=6 * head_dim, seed=1)
    costs = [128.0, 128.0, 128.0, 256.0, 256.0, 256.0]
    pattern = parameter_budget(
        costs, 640, at_least={"block 0": ([0, 1, 2], 1), "block 1": ([3, 4, 5], 1)}
    )
    problem = attention_heads(weight, gram, head_dim, pattern)

    def loss(mask):
        kept = expand(mask, head_dim, hidden).numpy()
        return float((((weight - kept * weight) @ inputs) ** 2).sum() / 300)

    def allowed(mask):
        counts = mask.view(2, 3).sum(dim=1)
        return int(counts.min()) >= 1 and float((mask * torch.tensor(costs)).sum()) <= 640

    masks = [mask for mask in all_masks(6) if allowed(mask)]
    assert len(masks) == 3 * (3 + 3 + 1) + 3 * 3  # one dear head and any cheap ones, or two and one
    best = min(map(loss, masks))
    assert optimum(problem) == pytest.approx(best, rel=1e-9)

    start = pattern.lmo(-problem.gram.diagonal()[None])
    assert allowed(start)
    assert best <= loss(start)
    for info in available():
        if "Linear" not in info.patterns or info.unavailable is not None:
            continue
        solution = solve(problem, info.name, start=start)
        assert allowed(solution.mask)
        assert float(solution.objective) >= best * (1 - 1e-9)
        if solution.status is Status.OPTIMAL:
            assert float(solution.objective) == pytest.approx(best, rel=1e-4)


def test_a_budget_names_what_is_violated():
    pattern = parameter_budget([4, 3, 2], 5, at_least={"block 0": ([0, 1], 1)})
    assert pattern.violation(torch.tensor([[True, True, False]])) == (
        "the budget sums to 7 where at most 5 is allowed"
    )
    assert pattern.violation(torch.tensor([[False, False, True]])) == (
        "block 0 sums to 0 where at least 1 is allowed"
    )
    assert pattern.violation(torch.tensor([[False, True, True]])) is None


@pytest.mark.parametrize(
    ("costs", "budget", "at_least", "message"),
    [
        ([1, -1], 1, None, "non-negative"),
        ([[1, 1]], 1, None, "one per group"),
        ([], 1, None, "one per group"),
        ([1, float("nan")], 1, None, "non-negative"),
        ([1, 1], -1, None, r"No mask satisfies the constraints \(the budget\)"),
        ([1, 2], 1, {"block 0": ([1], 1)}, r"No mask .*\(the budget, block 0\)"),
        ([1, 2], 3, {"block 0": ([2], 1)}, r"block 0 names groups outside 0\.\.1"),
        ([1, 2], 3, {"block 0": ([[0]], 1)}, "block 0 names groups"),
        ([1, 2], 3, {"block 0": ([0, 0], 2)}, "No mask"),
    ],
)
def test_wrong_budgets_are_refused(costs, budget, at_least, message):
    with pytest.raises(InvalidInput, match=message):
        parameter_budget(costs, budget, at_least=at_least)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (5, "Groups of 5 inputs do not divide a layer of 12"),
        (0, "Groups of 0 inputs"),
        ([0] * 11, "one integer for each of 12 inputs"),
        (np.zeros(12), "one integer for each"),
        (np.zeros(12, dtype=bool), "one integer for each"),
        ([-1] + [0] * 11, "Group -1 is negative"),
        ([0, 2] * 6, "Group 1 has no input"),
        ([10**12] * 12, "Group 0 has no input"),
    ],
)
def test_wrong_groups_are_refused(groups, message):
    weight, _, gram = layer(rows=2, tokens=50, d=12)
    with pytest.raises(InvalidInput, match=message):
        input_groups(weight, gram, groups, ANY)


def test_wrong_layers_patterns_and_masks_are_refused():
    weight, _, gram = layer(rows=2, tokens=50, d=12)
    with pytest.raises(InvalidInput, match="symmetric"):
        input_groups(weight, np.triu(gram), 3, ANY)
    with pytest.raises(InvalidInput, match="constraints are on 5 weights"):
        input_groups(weight, gram, 3, parameter_budget([1] * 5, 3))
    with pytest.raises(InvalidInput, match="A mask over groups must be boolean"):
        expand(torch.ones(1, 4), 3)
    with pytest.raises(InvalidInput, match="A mask over groups must be boolean"):
        expand(torch.ones(2, 4).bool(), 3)
    with pytest.raises(InvalidInput, match="4 groups where 3 are named"):
        expand(torch.ones(1, 4).bool(), [0, 1, 2, 1])
    assert isinstance(input_groups(weight, gram, 3, ANY), MaskProblem)


def test_published_saliencies_by_hand():
    """Two tokens (1, 2, 0), (3, 2, 4) and rows (1, -2, 1), (0, 2, -3)."""
    inputs = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 4.0]])
    weight = np.array([[1.0, -2.0, 1.0], [0.0, 2.0, -3.0]])
    gram, mean = inputs @ inputs.T / 2, inputs.mean(axis=1)
    # norms per token: sqrt(5), 2, sqrt(8); sums of |w|: 1, 4, 4
    expected = torch.tensor([5**0.5, 8.0, 4 * 8**0.5], dtype=torch.float64)
    assert torch.allclose(wanda_sp(weight, gram), expected)
    # variances 1, 0, 4; squared norms 1, 8, 10
    assert torch.allclose(flap(weight, gram, mean), torch.tensor([1.0, 0.0, 40.0]).double())
    assert most_salient(flap(weight, gram, mean), 2).tolist() == [[True, False, True]]
    grouped = flap(weight, gram, mean, [0, 1, 1])
    assert torch.allclose(grouped, torch.tensor([1.0, 1600.0]).double())
    both = wanda_sp(weight, gram, [0, 1, 1])
    assert torch.allclose(both, torch.stack([expected[0], expected[1] + expected[2]]))


def fitted(weight, inputs, kept):
    """Loss of the best weights on kept inputs, by least squares on the inputs themselves."""
    dense = weight @ inputs
    best = np.linalg.lstsq(inputs[kept].T, dense.T, rcond=None)[0]
    return np.square(dense - best.T @ inputs[kept]).sum() / inputs.shape[1], best.T


def test_refitted_weights_are_the_best_ones():
    weight, inputs, gram = layer(rows=3, tokens=60, d=8)
    kept = torch.tensor([True, False, True, True, False, True, True, False])
    loss, best = fitted(weight, inputs, kept.numpy())
    new = refitted(torch.tensor(weight), torch.tensor(gram), kept, damping=0.0)
    assert np.allclose(new[:, kept], best)
    assert not new[:, ~kept].any()
    change = new.numpy() - weight
    assert np.trace(change @ gram @ change.T) == pytest.approx(loss)
    target = torch.tensor(2 * weight @ gram)
    twice = refitted(torch.tensor(weight), torch.tensor(gram), kept, 0.0, target)
    assert torch.allclose(twice, 2 * new)
    with pytest.raises(InvalidInput, match="singular"):
        refitted(torch.tensor(weight), torch.zeros(8, 8), kept, 0.0)


@pytest.mark.parametrize("size", [1, 2])
def test_elimination_finds_the_best_fit(size):
    """One group less than all is exact; more are no worse than the greedy choice."""
    found = []
    for seed in range(6):
        weight, inputs, gram = layer(rows=3, tokens=60, d=6 * size, seed=seed)
        losses = {
            bits: fitted(weight, inputs, np.repeat(bits, size))[0]
            for bits in itertools.product([False, True], repeat=6)
            if sum(bits) in (3, 5)
        }
        for keep in (5, 3):
            mask = eliminate(weight, gram, size, keep, damping=0.0)
            assert mask.shape == (1, 6)
            assert int(mask.sum()) == keep
            best = min(loss for bits, loss in losses.items() if sum(bits) == keep)
            ratio = losses[tuple(mask[0].tolist())] / best
            if keep == 5:
                assert ratio == pytest.approx(1.0, rel=1e-6)
            found.append(ratio)
            greedy = eliminate(weight, gram, size, keep, damping=0.0, exchanges=0)
            assert losses[tuple(mask[0].tolist())] <= losses[tuple(greedy[0].tolist())] * 1.000001
    assert min(found) > 1 - 1e-6
    assert max(found) < 1.5


def test_elimination_keeps_all_none_and_refuses():
    weight, _, gram = layer(rows=3, tokens=60, d=6)
    assert eliminate(weight, gram, 1, 6).all()
    assert not eliminate(weight, gram, 1, 0).any()
    with pytest.raises(InvalidInput, match="one size"):
        eliminate(weight, gram, [0, 0, 0, 1, 1, 2], 2)
    with pytest.raises(InvalidInput, match="singular"):
        eliminate(weight, np.zeros((6, 6)), 1, 2, damping=0.0)


@pytest.mark.parametrize("size", [1, 3])
def test_the_curve_is_what_elimination_loses(size):
    weight, inputs, gram = layer(rows=3, tokens=60, d=5 * size)
    losses, order = elimination_curve(weight, gram, size, damping=0.0)
    assert sorted(order.tolist()) == list(range(5))
    for left in range(1, 6):
        kept = np.ones(5, dtype=bool)
        kept[order[: 5 - left]] = False
        assert float(losses[left]) == pytest.approx(
            fitted(weight, inputs, np.repeat(kept, size))[0], rel=1e-6, abs=1e-9
        )
        greedy = eliminate(weight, gram, size, left, damping=0.0, exchanges=0)
        assert greedy[0].tolist() == kept.tolist()
    assert float(losses[0]) == pytest.approx(np.trace(weight @ gram @ weight.T))
