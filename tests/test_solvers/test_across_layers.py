import itertools
import math

import numpy as np
import pytest
import torch

from solvers import InvalidInput
from solvers.across_layers import cheapest_counts, flap_standardised, lowest
from solvers.structured import elimination_curve


def statistics(inputs):
    inputs = np.array(inputs, dtype=float)
    return inputs @ inputs.T / inputs.shape[1], inputs.mean(axis=1)


def test_flap_over_layers_by_hand():
    """Two layers with three neurons, of which four go, and a layer with two heads of two inputs."""
    # variances 1, 0, 4, squared norms 1, 8, 10: saliencies 1, 0, 40
    first = np.array([[1.0, -2.0, 1.0], [0.0, 2.0, -3.0]])
    of_first = flap_standardised(first, *statistics([[1, 3], [2, 2], [0, 4]]))
    # mean 41/3; squared differences from it, times 9: 38^2, 41^2, 79^2; divisor 3 - 1
    deviation = math.sqrt((38**2 + 41**2 + 79**2) / 9 / 2)
    expected = torch.tensor([-38 / 3, -41 / 3, 79 / 3], dtype=torch.float64) / deviation
    assert torch.allclose(of_first, expected)
    # variances 1, 1, 1, squared norms 1, 2, 3: saliencies 1, 2, 3, in deviations -1, 0, 1
    second = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    of_second = flap_standardised(second, *statistics([[0, 2], [1, 3], [5, 7]]))
    assert torch.allclose(of_second, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    # in order: -1 (second), -0.60, -0.56 (first), 0 (second), 1 (second), 1.15 (first)
    masks = lowest([of_first, of_second], 4)
    assert [one.tolist() for one in masks] == [[[False, False, True]], [[False, False, True]]]
    assert [int(one.sum()) for one in lowest([of_first, of_second], 2)] == [2, 2]
    assert [int(one.sum()) for one in lowest([of_first, of_second], 1)] == [3, 2]
    # squares of saliencies 1, 1, 3, 1 are 1, 1, 9, 1: mean 3, variance 48 / 3
    heads = np.array([[1.0, 1.0, math.sqrt(3.0), 1.0]])
    of_heads = flap_standardised(heads, *statistics([[0, 2], [1, 3], [5, 7], [0, 2]]), 2)
    assert torch.allclose(of_heads, torch.tensor([-0.5, 0.5], dtype=torch.float64))
    # a head is 10 neurons in size: sums of 1, 11, 12, 22 and 23, of which the nearest is taken
    sizes = [1, 10]
    kept = [
        [int(one.sum()) for one in lowest([of_second, of_heads], removed, sizes)]
        for removed in (0, 1, 5, 7, 11, 12, 40)
    ]
    assert kept == [[3, 2], [2, 2], [2, 2], [2, 1], [2, 1], [1, 1], [0, 0]]


def test_scores_that_are_all_equal():
    weight, inputs = np.ones((2, 3)), statistics([[0, 2], [1, 3], [5, 7]])
    assert not flap_standardised(weight, *inputs).any()
    with pytest.raises(InvalidInput, match="one size"):
        flap_standardised(weight, *inputs, [0, 0, 1])


@pytest.mark.parametrize("removed", [0, 3, 7, 9])
def test_counts_are_the_cheapest(removed):
    """Against all choices; layers differ in size and curves are those of elimination."""
    random = np.random.default_rng(removed)
    curves = []
    for d in (3, 4, 5):
        inputs = random.normal(size=(d, d)) @ random.normal(size=(d, 40))
        gram = inputs @ inputs.T / 40
        curves.append(elimination_curve(random.normal(size=(2, d)), gram, 1)[0] * d)
    counts = cheapest_counts(curves, removed)
    assert sum(len(one) - 1 for one in curves) - sum(counts) == removed
    cost = sum(float(one[count]) for one, count in zip(curves, counts, strict=True))
    best = min(
        sum(float(one[count]) for one, count in zip(curves, tried, strict=True))
        for tried in itertools.product(*(range(1, len(one)) for one in curves))
        if sum(tried) == sum(counts)
    )
    assert cost == pytest.approx(best, rel=1e-9, abs=1e-12)
    with pytest.raises(InvalidInput, match="0 to 9 groups can go"):
        cheapest_counts(curves, 10)
