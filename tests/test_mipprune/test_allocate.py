import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, tiny_tokens

import mipprune
from mipprune.allocate import (
    BlockOutliers,
    LossCurve,
    Option,
    allocate,
    allocated_rules,
    choose,
    loss_curves,
    outlier_ratios,
    owl,
)
from mipprune.calibration import Windows
from mipprune.models import find_blocks
from mipprune.prune import all_layers
from solvers import InvalidInput, MaskProblem, PerLayer, PerRow, solve

WINDOWS = Windows(tiny_tokens(windows=6, length=32), "random")
SIZE = {"samples": 6, "batch_size": 4}


def layers_of(model):
    return all_layers(*find_blocks(model))


def removed_by(rules, layers):
    total = 0
    for layer in layers:
        rows, d = layer.weight.shape
        pattern = rules.pattern_for(layer.name)
        cells = rows if isinstance(pattern, PerRow) else 1
        total += rows * d - cells * pattern.kept_per_cell((rows, d))
    return total


def curve(name, losses, rows=2, inputs=10, keeps=(8, 6, 4, 2)):
    options = tuple(
        Option(keep, rows * (inputs - keep), loss, loss)
        for keep, loss in zip(keeps, losses, strict=True)
    )
    return LossCurve(name, rows, inputs, 1.0, options, {})


@st.composite
def knapsacks(draw):
    costs, removed = [], []
    unit = draw(st.sampled_from([1, 7, 10**6 + 3]))
    value = draw(st.sampled_from([st.integers(0, 9).map(float), st.floats(0, 1e6)]))
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 4))
        costs.append(draw(st.lists(value, min_size=size, max_size=size)))
        counts = st.lists(st.integers(0, 12), min_size=size, max_size=size)
        removed.append([unit * count for count in draw(counts)])
    return costs, removed, draw(st.integers(0, sum(map(max, removed))))


@settings(max_examples=60, deadline=None)
@given(knapsacks())
def test_choices_are_those_of_enumeration(case):
    costs, removed, target = case

    def outcome(choice):
        taken = [(costs[i][j], removed[i][j]) for i, j in enumerate(choice)]
        return math.fsum(cost for cost, _ in taken), sum(count for _, count in taken)

    every = map(outcome, itertools.product(*(range(len(one)) for one in costs)))
    best, fewest = min(one for one in every if one[1] >= target)
    cost, count = outcome(choose(costs, removed, target))
    assert count >= target
    worst = max(map(max, costs))
    assert cost == pytest.approx(best, rel=1e-9, abs=1e-8 * worst)
    if cost == best and all(value.is_integer() for one in costs for value in one):
        assert count == fewest


def test_sparsity_goes_where_it_costs_least():
    # Per layer 4, 8, 12 or 16 of 20 weights go; uniform 60 % of both layers is 24.
    cheap, dear = curve("cheap", [0.0, 1.0, 2.0, 3.0]), curve("dear", [0.0, 5.0, 10.0, 30.0])
    rules = allocate([cheap, dear], 0.6)
    assert rules.pattern_for("cheap") == PerRow(keep=2)
    assert rules.pattern_for("dear") == PerRow(keep=6)
    assert rules.pattern_for("other") is None
    layer = allocate([cheap, dear], 0.6, scope="layer")
    assert layer.pattern_for("cheap") == PerLayer(keep=4)
    bounded = allocate([cheap, dear], 0.6, low=0.5, high=0.7)
    assert bounded.pattern_for("cheap") == bounded.pattern_for("dear") == PerRow(keep=4)


def test_bounds_that_cannot_hold_are_refused():
    both = [curve("a", [0.0, 1.0, 2.0, 3.0]), curve("b", [0.0, 1.0, 2.0, 3.0])]
    with pytest.raises(InvalidInput, match=r"not between 0\.200 and 0\.400"):
        allocate(both, 0.6, high=0.5)
    with pytest.raises(InvalidInput, match="a was not measured between"):
        allocate(both, 0.6, low=0.95)
    model = tiny_model("llama")
    for options, message in [
        ({"method": "best"}, "none of uniform, owl, integer_program"),
        ({"low": 0.7}, "needs bounds"),
        ({"criterion": "hope"}, "none of loss, relative, divergence"),
        ({"scope": "column"}, "none of row, layer"),
        ({"ignore": ("nothing",)}, "No layer is named 'nothing'"),
        ({"probe": 0}, "probe=0"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            allocated_rules(model, None, WINDOWS, 0.6, **options, **SIZE)


def test_owl_on_a_case_worked_out_by_hand():
    # Ratios 0.01, 0.02, 0.05: stretched to 0.16 they keep 0, 0.04, 0.16 more than the first; with
    # mean 0.4 that is 0.4 - 0.2/3 + (0, 0.04, 0.16), so sparsities 0.6667, 0.6267, 0.5067.
    blocks = [
        BlockOutliers({f"{index}.a": (4, 3000)}, ratio)
        for index, ratio in enumerate([0.01, 0.02, 0.05])
    ]
    rules = owl(blocks, 0.6)
    kept = [rules.pattern_for(f"{index}.a").keep for index in range(3)]
    assert kept == [1000, 1120, 1480]
    # Nothing to tell blocks apart by; and a large block moves the others.
    same = owl([BlockOutliers({f"{i}": (4, 10)}, 0.1) for i in range(3)], 0.6)
    assert [same.pattern_for(f"{i}").keep for i in range(3)] == [4, 4, 4]
    unequal = owl(
        [BlockOutliers({"big": (9, 1000)}, 0.1), BlockOutliers({"small": (1, 1000)}, 0.2)], 0.6
    )
    big, small = (unequal.pattern_for(name).keep for name in ("big", "small"))
    assert small - big in (159, 160, 161)
    assert 4000 - 9 <= 9 * big + small <= 4000


def test_outliers_are_counted_over_a_whole_block():
    model = tiny_model("llama")
    seen = {}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].flatten(0, 1).double()})
        )
        for layer in layers_of(model)
    ]
    with torch.no_grad():
        model(WINDOWS.tokens)
    for hook in hooks:
        hook.remove()
    found = outlier_ratios(model, None, WINDOWS, 2.0, **SIZE)
    assert [list(block.shapes) for block in found] == [
        [layer.name for layer in layers_of(model) if f".{index}." in layer.name]
        for index in range(3)
    ]
    weights = {layer.name: layer.weight for layer in layers_of(model)}
    for block in found:
        score = torch.cat(
            [(weights[n].double().abs() * seen[n].norm(dim=0)).flatten() for n in block.shapes]
        )
        expected = float((score > 2 * score.mean()).double().mean())
        assert expected > 0
        assert block.ratio == pytest.approx(expected, abs=2 / len(score))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_curves_are_the_losses_and_the_divergence_of_single_layers(family):
    model, dense = tiny_model(family), tiny_model(family)
    before = [layer.weight.clone() for layer in layers_of(model)]
    curves = loss_curves(
        model, None, WINDOWS, 0.5, [0.25, 0.5, 0.75], anchors=[0.25, 0.75], probe=6, **SIZE
    )
    assert all(torch.equal(a, b.weight) for a, b in zip(before, layers_of(model), strict=True))
    assert [one.layer for one in curves] == [layer.name for layer in layers_of(model)]
    index = len(curves) - 1
    last = curves[index]
    plain = mipprune.layer_problem(model, None, WINDOWS, last.layer, **SIZE)
    for option, sparsity in zip(last.options, [0.25, 0.5, 0.75], strict=True):
        problem = MaskProblem(plain.weight, plain.gram, PerRow(sparsity=sparsity))
        assert option.removed == sparsity * last.rows * last.inputs
        assert option.loss == pytest.approx(float(solve(problem, "wanda").objective.sum()))
        if sparsity == 0.5:
            continue
        layer = layers_of(model)[index]
        with torch.no_grad():
            layer.weight.masked_fill_(~solve(problem, "swap", start="wanda").mask, 0.0)
        kl = mipprune.side_by_side(dense, model, WINDOWS).kl.mean
        with torch.no_grad():
            layer.weight.copy_(before[index])
        assert kl > 0
        assert option.cost == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert last.divergence[option.keep] == pytest.approx(option.cost)
    # Between its anchors the divergence per unit of loss is interpolated.
    low, middle, high = (option.cost / option.loss for option in last.options)
    assert middle == pytest.approx((low + high) / 2)
    relative = loss_curves(model, None, WINDOWS, 0.5, [0.5], criterion="relative", **SIZE)[index]
    assert relative.options[0].cost == pytest.approx(last.options[1].loss / last.energy)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("method", ["owl", "integer_program"])
def test_rules_remove_as_much_as_uniform_sparsity(method, scope):
    model = tiny_model("llama")
    options = {"scope": scope, "ignore": ("*.0.*",), **SIZE}
    uniform = allocated_rules(model, None, WINDOWS, 0.6, "uniform", **options)
    rules = allocated_rules(model, None, WINDOWS, 0.6, method, **options)
    chosen = [layer for layer in layers_of(model) if ".0." not in layer.name]
    excess = removed_by(rules, chosen) - removed_by(uniform, chosen)
    assert 0 <= excess <= sum(layer.weight.shape[0] for layer in chosen)
    assert len({rules.pattern_for(layer.name).keep for layer in chosen}) > 1
    report = mipprune.prune(model, None, WINDOWS, rules, "wanda", samples=6)
    assert [result.name for result in report.layers] == [layer.name for layer in chosen]


def test_an_expert_that_saw_no_token_keeps_the_uniform_sparsity():
    model = tiny_model("mixtral")
    few = Windows(tiny_tokens(windows=1, length=2), "random")
    curves = loss_curves(model, None, few, 0.5, [0.25, 0.5, 0.75], samples=1, probe=1)
    unseen = [one for one in curves if one.energy == 0]
    assert 0 < len(unseen) < len(curves)
    for one in unseen:
        assert [option.keep for option in one.options] == [one.inputs // 2]
    rules = allocate(curves, 0.5)
    assert rules.pattern_for(unseen[0].layer) == PerRow(keep=unseen[0].inputs // 2)
