import contextlib
import itertools

import numpy as np
import pytest
import torch
from helpers import patterns
from hypothesis import given
from hypothesis import strategies as st

from solvers import NM, InvalidInput, PerLayer, PerRow, removed_count


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
    ("d", "sparsity", "removed", "of_three"),
    [(10, 0.6, 6, 18), (7, 0.5, 3, 10), (384, 0.6, 230, 691), (100, 0.29, 29, 87), (3, 0.1, 0, 0)],
)
def test_kept_counts_follow_the_convention(d, sparsity, removed, of_three):
    mask = PerRow(sparsity=sparsity).round(torch.zeros(3, d))
    assert mask.sum(dim=1).tolist() == [d - removed] * 3
    mask = PerLayer(sparsity=sparsity).round(torch.zeros(3, d))
    assert int(mask.sum()) == 3 * d - of_three


SIZES = [*range(1, 130), 384, 768, 1000, 1024, 4096, 14336, 4096 * 14336, 10**9 + 7]


@pytest.mark.parametrize("digits", [2, 3])
def test_as_many_are_removed_as_the_exact_product_allows(digits):
    scale = 10**digits
    for numerator in range(scale + 1):
        sparsity = float(f"{numerator / scale:.{digits}f}")
        for size in SIZES:
            assert removed_count(size, sparsity) == numerator * size // scale


def test_shares_that_no_float_is_count_as_meant():
    for size in (3, 7, 9, 11, 999, 4096 * 9 * 7):
        for parts in (3, 7, 9):
            for part in range(1, parts):
                assert removed_count(size, part / parts) == part * size // parts
    assert removed_count(100, 0.1 + 0.2) == 30
    assert removed_count(1000, 1 - 0.42) == 580
    assert removed_count(10, np.nextafter(0.3, 0)) == 3
    assert removed_count(10**7, 0.3 - 1e-9) == 2_999_999


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_removed_counts_are_counts_near_the_product(size, sparsity):
    count = removed_count(size, sparsity)
    assert 0 <= count <= size
    assert count - 1e-6 <= size * sparsity < count + 1 + 1e-6


def test_counts_that_mean_the_same_are_converted():
    assert PerRow(keep=np.int64(3)) == PerRow(keep=3)
    assert type(PerRow(keep=np.int64(3)).keep) is int
    assert PerRow(sparsity=np.float32(0.6)) == PerRow(sparsity=0.6)
    assert PerLayer(sparsity=np.float16(0.29)).kept_per_cell((1, 100)) == 71
    assert NM(np.int32(2), np.int64(4)) == NM(2, 4)
    assert type(NM(np.int32(2), 4).to_dict()["keep"]) is int


@pytest.mark.parametrize("keep", [2.5, 2.0, True, "2", -1, float("nan")])
def test_what_is_no_count_is_refused(keep):
    for make in (lambda: PerRow(keep=keep), lambda: PerLayer(keep=keep)):
        with pytest.raises(InvalidInput, match=r"keep=.* must be a whole number of at least 0"):
            make()
    with pytest.raises(InvalidInput, match=r"keep=|kept number"):
        NM(keep, 4)
    with pytest.raises(InvalidInput, match=r"group=|kept number"):
        NM(2, keep)


def test_directions_and_relaxed_masks_with_nan_are_refused():
    direction = torch.zeros(3, 4)
    direction[1, 2] = torch.nan
    for pattern in (PerRow(keep=2), PerLayer(sparsity=0.5), NM(2, 4)):
        for call in (pattern.lmo, pattern.round):
            with pytest.raises(InvalidInput, match="NaN, first in row 1"):
                call(direction)


@given(shaped())
def test_the_oracle_without_checks_is_the_oracle(case):
    pattern, direction, seed = case
    draw = torch.rand(direction.shape, generator=torch.Generator().manual_seed(seed))
    for lower, upper in [(None, None), (draw < 0.2, None), (draw < 0.2, draw < 0.8)]:
        with contextlib.suppress(InvalidInput):
            checked = pattern.lmo(direction, lower, upper)
            assert torch.equal(checked, pattern.unchecked_lmo(direction, lower, upper))


def test_nm_keeps_the_first_number():
    mask = NM(keep=1, group=4).round(torch.arange(8.0)[None])
    assert mask.tolist() == [[False, False, False, True] * 2]
    assert NM.parse("1:4") == NM(keep=1, group=4)
    assert str(NM(1, 4)) == "1:4"


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), "0.5", True, 10**400])
@pytest.mark.parametrize("pattern", [PerRow, PerLayer])
def test_sparsity_outside_the_open_unit_interval_is_refused(pattern, sparsity):
    with pytest.raises(InvalidInput, match="fraction of weights removed"):
        pattern(sparsity=sparsity)


def test_a_budget_takes_one_of_sparsity_and_keep():
    for wrong in ({}, {"sparsity": 0.5, "keep": 3}):
        with pytest.raises(InvalidInput, match="either sparsity or keep"):
            PerRow(**wrong)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4"])
def test_nm_that_keeps_all_or_nothing_is_refused(text):
    with pytest.raises(InvalidInput, match="kept number must be in"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["2-4", "two:four", "2:4:8", "", "2.0:4", None])
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
