import json

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.layer_step import parse_targets
from mipprune.models import all_layers, find_blocks
from mipprune.surrogate import Inputs
from solvers import InvalidInput, LeastSquares, MaskProblem, PerRow, solve, unbiased_gain

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
PATTERN = PerRow(sparsity=0.6)
UPDATES = ["none", "gain", "least_squares", "sparsegpt"]


PLAIN = LayerStep()


def prune(model, layer_step=PLAIN, solver="swap", **options):
    return mipprune.prune(
        model, None, WINDOWS, PATTERN, solver, samples=8, layer_step=layer_step, **options
    )


def weights(model):
    return {layer.name: layer.weight for layer in all_layers(*find_blocks(model))}


@pytest.mark.parametrize("update", UPDATES)
def test_updates_keep_the_mask_and_least_squares_lowers_the_loss(update):
    model = tiny_model("llama")
    report = prune(model, LayerStep(update=update))
    dense = weights(tiny_model("llama"))
    for result in report.layers:
        mask, weight = report.masks[result.name], weights(model)[result.name]
        assert PATTERN.is_feasible(mask)
        assert not bool(weight[~mask].any())
        same = torch.equal(weight, dense[result.name].masked_fill(~mask, 0.0))
        assert same == (update == "none")
        if update in ("none", "least_squares"):
            assert (result.updated_loss < result.loss) == (update != "none")
    assert report.settings["layer_step"]["update"] == update
    assert json.loads(json.dumps(report.to_dict()))["updated_loss"] == report.updated_loss


def test_a_layer_is_judged_and_updated_as_the_recipe_says():
    """The first layer's problem, rebuilt by hand."""
    model, layer_step = tiny_model("gpt2"), LayerStep(Surrogate(shrink=0.5), "least_squares", 0.05)
    report = prune(model, layer_step)
    name = report.layers[0].name
    plain = mipprune.layer_problem(tiny_model("gpt2"), None, WINDOWS, name)
    half = (plain.gram + plain.gram.diagonal().diag()) / 2
    expected = solve(MaskProblem(plain.weight, half, PATTERN), "swap")
    assert torch.equal(report.masks[name], expected.mask)
    first = report.layers[0]
    assert first.surrogate_loss == pytest.approx(float(expected.objective.sum()))
    assert first.loss == pytest.approx(float(plain.objective(expected.mask).sum()))
    updated = LeastSquares(damping=0.05)(plain.weight, plain.gram, expected.mask)
    assert torch.allclose(weights(model)[name], updated, atol=1e-6)
    gain = tiny_model("gpt2")
    prune(gain, LayerStep(Surrogate(shrink=0.5), "gain"))
    row = unbiased_gain(plain.weight, plain.gram, expected.mask)
    assert torch.allclose(weights(gain)[name], row, atol=1e-6)


def test_a_centred_gram_matrix_comes_from_the_mean_of_the_run():
    report = prune(tiny_model("llama"), LayerStep(Surrogate(centre=1.0)))
    plain = prune(tiny_model("llama"))
    assert all(result.surrogate_loss <= result.loss * (1 + 1e-9) for result in report.layers)
    assert all(result.surrogate_loss == result.loss for result in plain.layers)
    assert report.mask_hash != plain.mask_hash


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("dsnot", {}),
        ("sparsegpt", {}),
        ("alps", {}),
        ("joint", {}),
        ("tabu", {"iterations": 100}),
        ("chain", {"stages": ["wanda", "swap"]}),
    ],
)
def test_searches_and_baselines_run_in_a_model(solver, options):
    layer_step = LayerStep(update="least_squares")
    report = prune(tiny_model("llama"), layer_step, solver, solver_options=options)
    assert all(PATTERN.is_feasible(mask) for mask in report.masks.values())
    assert report.updated_loss < report.loss


def test_a_recipe_survives_its_record():
    layer_step = LayerStep(Surrogate(shrink=0.25, dense_targets=0.5), "gain", 0.02, "existing")
    assert LayerStep.from_dict(json.loads(json.dumps(layer_step.to_dict()))) == layer_step


def test_targets_have_names():
    named = {"own": (0.0, False), "dense": (1.0, False), "dense:0.5": (0.5, False)}
    named |= {"stream": (1.0, True), "stream:0.25": (0.25, True)}
    assert {text: parse_targets(text) for text in named} == named
    for text in ("both", "own:0.5", "dense:0", "dense:2", "stream:", "stream:half"):
        with pytest.raises(InvalidInput, match="own, dense or stream"):
            parse_targets(text)


def test_wrong_recipes_are_refused():
    with pytest.raises(InvalidInput, match="none of none, gain"):
        LayerStep(update="magic")
    with pytest.raises(InvalidInput, match="none of none, existing"):
        LayerStep(bias="new")


@pytest.mark.parametrize("update", UPDATES)
def test_a_layer_that_saw_nothing_keeps_its_weights(update):
    weight, mask = torch.randn(3, 8), torch.rand(3, 8) < 0.5
    updated = LayerStep(update=update).aim(weight, Inputs(torch.zeros(8, 8))).updated(mask)
    assert torch.equal(updated, weight.masked_fill(~mask, 0.0))
