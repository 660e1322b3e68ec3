import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model, tiny_tokens
from runs import interrupted, save_source

import mipprune
from mipprune.allocate import Allocation, allocate
from mipprune.calibration import Windows
from mipprune.dense_walk import DenseWalk
from mipprune.job import prune_to_folder
from mipprune.loss_curves import LossCurve, Option, loss_curves
from mipprune.models import all_layers, find_blocks
from mipprune.opening import Source
from mipprune.owl import BlockOutliers, outlier_ratios, owl
from mipprune.placement import FromHost, Placement
from mipprune.rules import Rules
from mipprune.settings import Settings
from mipprune.share_out import feasible, shared_out
from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, solve
from solvers.knapsack import choose

WINDOWS = Windows(tiny_tokens(windows=6, length=32), "random")
SIZE = {"samples": 6, "batch_size": 4}
HALF = Rules(PerRow(sparsity=0.5))
CPU = torch.device("cpu")


def walk_of(model, rules=HALF, windows=WINDOWS):
    return DenseWalk(Placement(model), windows, rules, 4)


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


def test_what_cannot_be_shared_out_is_refused():
    model = tiny_model("llama")
    for allocation, pattern, message in [
        ({"method": "best"}, PerRow(sparsity=0.6), "none of uniform, owl, integer_program"),
        ({"criterion": "hope"}, PerRow(sparsity=0.6), "none of loss, relative, divergence"),
        ({"measure": "guess"}, PerRow(sparsity=0.6), "none of swap, run"),
        ({"probe": 0}, PerRow(sparsity=0.6), "probe=0"),
        ({"low": 0.7}, PerRow(sparsity=0.6), "needs bounds"),
        ({}, NM(2, 4), "the pattern is 2:4"),
        ({}, PerRow(keep=5), "shares out a sparsity"),
        ({}, Rules(PerRow(sparsity=0.6), (("*.0.*", None),)), r"a rule names one for '\*\.0\.\*'"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            mipprune.prune(
                model, None, WINDOWS, pattern, allocation=Allocation(**allocation), **SIZE
            )


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
    found = outlier_ratios(walk_of(model), 2.0)
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
    curves = loss_curves(walk_of(model), 0.5, [0.25, 0.5, 0.75], anchors=[0.25, 0.75], probe=6)
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
    relative = loss_curves(walk_of(model), 0.5, [0.5], criterion="relative")[index]
    assert relative.options[0].cost == pytest.approx(last.options[1].loss / last.energy)


@pytest.mark.parametrize("scope", [PerRow, PerLayer])
@pytest.mark.parametrize("method", ["owl", "integer_program"])
def test_a_run_removes_as_much_as_with_uniform_sparsity(method, scope):
    model = tiny_model("llama")
    rules = Rules(scope(sparsity=0.6), ignore=("*.0.*",))
    report = mipprune.prune(
        model, None, WINDOWS, rules, "wanda", allocation=Allocation(method), **SIZE
    )
    chosen = [layer for layer in layers_of(model) if ".0." not in layer.name]
    assert [result.name for result in report.layers] == [layer.name for layer in chosen]
    allocated = Rules.of_settings(report.settings)
    excess = removed_by(allocated, chosen) - removed_by(rules, chosen)
    assert 0 <= excess <= sum(layer.weight.shape[0] for layer in chosen)
    assert len({result.sparsity for result in report.layers}) > 1
    for layer in chosen:
        assert allocated.pattern_for(layer.name).is_feasible(layer.weight != 0)
    assert report.settings["allocation"]["method"] == method


def test_divergences_can_be_measured_as_the_run_will_prune():
    step = mipprune.LayerStep(update="least_squares")
    allocation = Allocation(measure="run")
    settings = Settings(HALF, "alps", batch_size=4, layer_step=step, allocation=allocation)
    layers = layers_of(tiny_model("gpt2"))
    rules = shared_out(settings, Placement(tiny_model("gpt2")), WINDOWS)
    assert removed_by(rules, layers) >= removed_by(HALF, layers)
    pruned = []

    def prune(layer, gram, pattern):
        pruned.append(pattern)
        return torch.zeros_like(layer.weight)

    model = tiny_model("gpt2")
    last = loss_curves(walk_of(model), 0.5, [0.5], prune=prune, probe=6)[-1]
    assert len(pruned) == len(layers_of(model))
    gone = tiny_model("gpt2")
    with torch.no_grad():
        layers_of(gone)[-1].weight.zero_()
    kl = mipprune.side_by_side(model, gone, WINDOWS).kl.mean
    assert next(iter(last.divergence.values())) == pytest.approx(kl, rel=1e-3)


def test_blocks_that_visit_the_device_give_the_same_curves():
    placed = FromHost(tiny_model("llama"), CPU)
    visiting = loss_curves(DenseWalk(placed, WINDOWS, HALF, 4), 0.5, [0.5])
    assert visiting == loss_curves(walk_of(tiny_model("llama")), 0.5, [0.5])


def test_an_optional_allocation_leaves_large_models_alone(monkeypatch):
    monkeypatch.setattr("mipprune.share_out.MOST_LAYERS", 7)
    placement, said = Placement(tiny_model("llama")), []
    optional = Allocation(optional=True)
    assert feasible(optional, HALF, placement, said.append) is None
    assert "each of 21 layers" in said[0]
    assert feasible(Allocation(), HALF, placement) is not None
    assert feasible(Allocation("owl", optional=True), HALF, placement) is not None
    few = Rules(PerRow(sparsity=0.5), only=("*.0.*",))  # the seven layers of one block
    assert feasible(optional, few, placement) is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model's folder."""
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("models") / "tiny")


def test_an_interrupted_run_goes_on_with_the_rules_it_had(source, tmp_path, monkeypatch):
    settings = Settings(HALF, allocation=Allocation(), **SIZE)
    model = Source(source)
    whole = prune_to_folder(model, tmp_path / "whole", WINDOWS, settings)
    with interrupted():
        prune_to_folder(model, tmp_path / "out", WINDOWS, settings)
    other = replace(settings, allocation=Allocation("owl"))
    with pytest.raises(InvalidInput, match=r"'allocation\.method' is 'owl' now"):
        prune_to_folder(model, tmp_path / "out", WINDOWS, other, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(Allocation, "rules", None)  # they are in the journal
        resumed = prune_to_folder(model, tmp_path / "out", WINDOWS, settings, resume=True)
    assert resumed.mask_hash == whole.mask_hash
    records = [(tmp_path / name / "mipprune.json").read_bytes() for name in ("whole", "out")]
    assert records[0] == records[1]


def test_weights_that_are_streamed_do_with_owl_alone(source, tmp_path):
    settings = Settings(HALF, "wanda", allocation=Allocation("owl"), **SIZE)
    found = [
        prune_to_folder(Source(source, stream=stream), tmp_path / f"{stream}", WINDOWS, settings)
        for stream in (False, True)
    ]
    assert found[0].mask_hash == found[1].mask_hash
    by_program = replace(settings, allocation=Allocation())
    with pytest.raises(InvalidInput, match="give --no-stream, or --allocate owl"):
        prune_to_folder(Source(source, stream=True), tmp_path / "not", WINDOWS, by_program)
    assert not list(tmp_path.glob("not*"))


def test_an_expert_that_saw_no_token_keeps_the_uniform_sparsity():
    model = tiny_model("mixtral")
    few = Windows(tiny_tokens(windows=1, length=2), "random")
    curves = loss_curves(walk_of(model, windows=few), 0.5, [0.25, 0.5, 0.75], probe=1)
    unseen = [one for one in curves if one.energy == 0]
    assert 0 < len(unseen) < len(curves)
    for one in unseen:
        assert [option.keep for option in one.options] == [one.inputs // 2]
    rules = allocate(curves, 0.5)
    assert rules.pattern_for(unseen[0].layer) == PerRow(keep=unseen[0].inputs // 2)
