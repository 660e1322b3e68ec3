import itertools

import pytest
import torch
from helpers import make_problem
from hypothesis import given
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, order_inputs, saliency_lost, solve
from solvers import input_order as module


def saliencies(rows, d, seed=0, skew=1.5):
    """Inputs that matter very differently, and to all rows alike."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(skew * torch.randn(d, generator=generator))
    return (torch.randn(rows, d, generator=generator).square() * scale).double()


def lost_by_hand(saliency, pattern, order):
    total = 0.0
    for row in saliency[:, order].tolist():
        for at in range(0, len(row), pattern.group):
            total += sum(sorted(row[at : at + pattern.group])[: pattern.group - pattern.keep])
    return total


def best_by_enumeration(saliency, pattern):
    """Least loss over all ways to part the inputs into groups."""

    def parted(left):
        if not left:
            yield []
            return
        first, *rest = left
        for others in itertools.combinations(rest, pattern.group - 1):
            remaining = [one for one in rest if one not in others]
            for groups in parted(remaining):
                yield [first, *others, *groups]

    return min(
        lost_by_hand(saliency, pattern, order) for order in parted(list(range(saliency.shape[1])))
    )


SHAPES = st.sampled_from([(1, 2), (2, 3), (2, 4), (1, 4), (3, 4), (4, 8)])


@given(SHAPES, st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_it_is_a_permutation_that_never_loses_more(kept, groups, rows, seed, ties):
    pattern = NM(*kept)
    saliency = saliencies(rows, groups * pattern.group, seed)
    if ties:
        saliency = saliency.round()
    found = order_inputs(saliency, pattern, seed=seed)
    assert found.order.sort().values.tolist() == list(range(saliency.shape[1]))
    assert found.lost <= found.lost_as_given
    given_order = torch.arange(saliency.shape[1])
    for order, lost in ((found.order, found.lost), (given_order, found.lost_as_given)):
        assert lost == pytest.approx(lost_by_hand(saliency, pattern, order), rel=1e-12)
        assert lost == pytest.approx(saliency_lost(saliency, pattern, order), rel=1e-12)


@pytest.mark.parametrize("kept", [(1, 2), (2, 4), (1, 4), (2, 3), (4, 8)])
def test_no_exchange_at_one_place_is_left(kept):
    """The last round improved nothing: inputs at one place of two groups are in the right one."""
    pattern = NM(*kept)
    saliency = saliencies(7, 6 * pattern.group)
    found = order_inputs(saliency, pattern, rounds=1000, tolerance=0.0)
    groups = found.order.view(-1, pattern.group)
    for place in range(pattern.group):
        for a, b in itertools.combinations(range(len(groups)), 2):
            other = groups.clone()
            other[a, place], other[b, place] = groups[b, place], groups[a, place]
            assert saliency_lost(saliency, pattern, other.flatten()) >= found.lost * (1 - 1e-12)


@pytest.mark.parametrize(("kept", "d"), [((1, 2), 8), ((2, 4), 8), ((1, 3), 9), ((2, 3), 9)])
def test_small_cases_come_close_to_the_best_order(kept, d):
    pattern = NM(*kept)
    share = []
    for seed in range(12):
        saliency = saliencies(4, d, seed)
        best = best_by_enumeration(saliency, pattern)
        found = order_inputs(saliency, pattern, rounds=50, tolerance=0.0)
        assert found.lost >= best * (1 - 1e-12)
        share.append((found.lost - best) / max(found.lost_as_given - best, 1e-300))
    assert sum(share) / len(share) < 0.3
    assert min(share) < 1e-9


def test_two_groups_of_two_are_solved():
    """Every pairing of four inputs is reached by one assignment."""
    for seed in range(20):
        saliency = saliencies(3, 4, seed)
        found = order_inputs(saliency, NM(1, 2), rounds=50, tolerance=0.0)
        assert found.lost == pytest.approx(best_by_enumeration(saliency, NM(1, 2)))


def test_wandas_mask_on_reordered_inputs_loses_that_saliency():
    problem = make_problem(6, 24, NM(2, 4))
    saliency = problem.weight.square() * problem.gram.diagonal()
    found = order_inputs(saliency, NM(2, 4))
    weight, gram = problem.weight[:, found.order], problem.gram[found.order][:, found.order]
    moved = MaskProblem(weight, gram, NM(2, 4))
    for one, lost in ((problem, found.lost_as_given), (moved, found.lost)):
        mask = solve(one, "wanda").mask
        gone = one.weight.square() * one.gram.diagonal()
        assert float(gone.masked_fill(mask, 0).sum()) == pytest.approx(lost)


def test_parts_of_groups_and_rows_still_lower_the_loss_of_all(monkeypatch):
    saliency = saliencies(64, 160)
    whole = order_inputs(saliency, NM(2, 4), rows=64)
    monkeypatch.setattr(module, "_GROUPS_AT_ONCE", 7)
    monkeypatch.setattr(module, "_CHUNK", 100)
    parts = order_inputs(saliency, NM(2, 4), rows=20)
    assert parts.lost == pytest.approx(saliency_lost(saliency, NM(2, 4), parts.order))
    assert whole.lost < 0.9 * whole.lost_as_given
    assert parts.lost < whole.lost_as_given - 0.7 * (whole.lost_as_given - whole.lost)


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(InvalidInput, match="divisible by 4"):
        order_inputs(saliencies(3, 6), NM(2, 4))
    with pytest.raises(InvalidInput, match="not negative"):
        order_inputs(-saliencies(3, 8), NM(2, 4))
    with pytest.raises(InvalidInput, match="finite"):
        order_inputs(saliencies(3, 8) / 0.0, NM(2, 4))
