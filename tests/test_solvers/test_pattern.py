import itertools

import numpy as np
import pytest
import torch
from helpers import patterns
from hypothesis import given
from hypothesis import strategies as st

from solvers import NM, InvalidInput, PerLayer, PerRow


def masks_of(pattern, shape):
    every = itertools.product([False, True], repeat=shape[0] * shape[1])
    masks = (torch.tensor(bits).view(shape) for bits in every)
    return [mask for mask in masks if pattern.is_feasible(mask)]


@st.composite
def shaped(draw):
    rows, d = draw(st.sampled_from([(1, 2), (2, 3), (1, 6), (2, 4), (2, 6)]))
    direction = torch.tensor(
        draw(st.lists(st.integers(-3, 3), min_size=rows * d, max_size=rows * d)),
        dtype=torch.float64,
    )
    return draw(patterns(d)), direction.view(rows, d), draw(st.integers(0, 2**16))


@given(shaped())
def test_oracle_minimises_over_all_masks(case):
    pattern, direction, _ = case
    answer = pattern.lmo(direction)
    assert pattern.is_feasible(answer)
    best = min((direction * mask).sum() for mask in masks_of(pattern, direction.shape))
    assert (direction * answer).sum() == best


@given(shaped())
def test_bounded_oracle_minimises_over_the_masks_within_bounds(case):
    pattern, direction, seed = case
    draw = torch.rand(direction.shape, generator=torch.Generator().manual_seed(seed))
    lower, upper = draw < 0.2, draw < 0.8
    inside = [
        mask
        for mask in masks_of(pattern, direction.shape)
        if not (lower & ~mask).any() and not (mask & ~upper).any()
    ]
    if not inside:
        with pytest.raises(InvalidInput, match="leave no mask"):
            pattern.lmo(direction, lower, upper)
        return
    answer = pattern.lmo(direction, lower, upper)
    assert any(torch.equal(answer, mask) for mask in inside)
    assert (direction * answer).sum() == min((direction * mask).sum() for mask in inside)


@given(shaped())
def test_rounding_is_the_nearest_mask_even_with_ties(case):
    pattern, relaxed, _ = case
    rounded = pattern.round(relaxed)
    assert pattern.is_feasible(rounded)
    nearest = min(
        (relaxed - mask.double()).square().sum() for mask in masks_of(pattern, relaxed.shape)
    )
    assert torch.isclose((relaxed - rounded.double()).square().sum(), nearest)


@given(shaped())
def test_constraints_hold_for_the_masks_of_the_pattern_and_no_other(case):
    pattern, direction, _ = case
    spelled = pattern.constraints(direction.shape)
    for bits in itertools.product([0.0, 1.0], repeat=direction.numel()):
        values = spelled.matrix @ np.array(bits)
        inside = ((spelled.lower <= values) & (values <= spelled.upper)).all()
        assert inside == pattern.is_feasible(torch.tensor(bits).bool().view(direction.shape))


@pytest.mark.parametrize(
    ("d", "sparsity"), [(10, 0.6), (7, 0.5), (384, 0.6), (100, 0.29), (3, 0.1)]
)
def test_kept_counts_follow_the_convention(d, sparsity):
    mask = PerRow(sparsity=sparsity).round(torch.zeros(3, d))
    assert mask.sum(dim=1).tolist() == [d - int(d * sparsity)] * 3
    mask = PerLayer(sparsity=sparsity).round(torch.zeros(3, d))
    assert int(mask.sum()) == 3 * d - int(3 * d * sparsity)


def test_nm_keeps_the_first_number():
    mask = NM(keep=1, group=4).round(torch.arange(8.0)[None])
    assert mask.tolist() == [[False, False, False, True] * 2]
    assert NM.parse("1:4") == NM(keep=1, group=4)
    assert str(NM(1, 4)) == "1:4"


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("pattern", [PerRow, PerLayer])
def test_sparsity_outside_the_open_unit_interval_is_refused(pattern, sparsity):
    with pytest.raises(InvalidInput, match="fraction of weights removed"):
        pattern(sparsity=sparsity)


def test_a_budget_takes_one_of_sparsity_and_keep():
    for wrong in ({}, {"sparsity": 0.5, "keep": 3}):
        with pytest.raises(InvalidInput, match="either sparsity or keep"):
            PerRow(**wrong)
    with pytest.raises(InvalidInput, match="negative"):
        PerRow(keep=-1)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4"])
def test_nm_that_keeps_all_or_nothing_is_refused(text):
    with pytest.raises(InvalidInput, match="kept number must be in"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["2-4", "two:four", "2:4:8", ""])
def test_nm_of_another_form_is_refused(text):
    with pytest.raises(InvalidInput, match="keep:group"):
        NM.parse(text)


def test_violations_are_named():
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, :2] = False
    assert PerRow(keep=2).violation(mask) == "row 1 keeps 4 weights where keep 2 per row keeps 2"
    assert NM(1, 2).violation(mask) == "row 0, group 0 keeps 0 weights where 1:2 keeps 1"
    assert PerLayer(keep=5).violation(mask) == (
        "the layer keeps 6 weights where keep 5 per layer keeps 5"
    )


def test_contradictory_fixings_are_refused():
    fixed = torch.tensor([[True, False]])
    with pytest.raises(InvalidInput, match="both as kept and as pruned"):
        PerRow(keep=1).lmo(torch.zeros(1, 2), lower=fixed, upper=~fixed)
