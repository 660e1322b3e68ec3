"""Gram matrices taken anew within a block, and what a layer would see in the dense model."""

import re

import pytest
import torch
from models import tiny_model, tiny_tokens
from runs import content, interrupted, save_source

import mipprune
from mipprune import LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.certify import certify, check_folder
from mipprune.job import prune_to_folder
from mipprune.models import LoadedModel, all_layers, find_blocks
from mipprune.opening import Source
from mipprune.placement import Placement
from mipprune.rules import Rules
from mipprune.settings import Settings
from mipprune.stages import Stages
from mipprune.walk import BlockWalk
from solvers import NM, InvalidInput, PerRow

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
HALF = PerRow(sparsity=0.5)
SIZE = {"samples": 8, "batch_size": 3}
AIMED = LayerStep(Surrogate(dense_targets=1.0, stream=True), "least_squares", bias="existing")


def prune(model, pattern=HALF, solver="wanda", **options):
    return mipprune.prune(model, None, WINDOWS, pattern, solver, **SIZE, **options)


def layers_of(model):
    return {layer.name: layer for layer in all_layers(*find_blocks(model))}


def stages_of(family):
    """Of the last block, the layers' own names."""
    model = tiny_model(family)
    steps = list(BlockWalk(Placement(model), WINDOWS.tokens, 4, stages=Stages()))
    last = steps[-1].index
    return [{one.name.split(".")[-1] for one in s.layers} for s in steps if s.index == last]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", "q_proj k_proj v_proj|o_proj|gate_proj up_proj|down_proj"),
        ("gpt2", "c_attn|c_proj|c_fc|c_proj"),
        ("phi", "q_proj k_proj v_proj fc1|dense|fc2"),  # both parts of a block in parallel
        ("mixtral", None),
    ],
)
def test_stages_follow_the_inputs(family, expected):
    found = stages_of(family)
    if expected is not None:
        assert found == [set(stage.split()) for stage in expected.split("|")]
        return
    # all experts together: what they read, then what they write
    assert len(found) == 4
    sizes = [len({name.split("[")[0] for name in stage}) for stage in found]
    assert sizes == [3, 1, sizes[2], 1]


def test_layers_that_no_token_reaches_come_last():
    model = tiny_model("llama")
    block = model.model.layers[0]
    block.spare = torch.nn.Linear(4, 4)
    steps = list(BlockWalk(Placement(model), WINDOWS.tokens, 4, stages=Stages()))
    names = [[one.name for one in step.layers] for step in steps if step.index == 0]
    assert len(names) == 5
    assert names[-1] == ["model.layers.0.spare"]


@pytest.mark.parametrize("update", ["none", "least_squares"])
def test_every_stage_sees_what_was_pruned_before_it(update):
    """The last block's Gram matrices are those of a model pruned by hand, stage by stage."""
    pruned = tiny_model("llama")
    report = prune(pruned, grams="sequential", layer_step=LayerStep(update=update))
    found = {layer.name: layer for layer in report.layers}
    written, by_hand = layers_of(pruned), tiny_model("llama")
    own = layers_of(by_hand)
    block = "model.layers.2."
    for name, layer in own.items():
        if not name.startswith(block):
            layer.weight.copy_(written[name].weight)
    for stage in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"):
        names = [name for name in own if name.startswith(block) and name.split(".")[-1] in stage]
        for name in names:
            problem = mipprune.layer_problem(by_hand, None, WINDOWS, name, **SIZE)
            loss = float(problem.objective(report.masks[name]).sum())
            assert found[name].loss == pytest.approx(loss, rel=1e-5)
        for name in names:
            own[name].weight.copy_(written[name].weight)
    once = prune(tiny_model("llama"), layer_step=LayerStep(update=update))
    assert report.mask_hash != once.mask_hash
    first = [layer.loss for layer in report.layers[:3]]
    assert first == [layer.loss for layer in once.layers[:3]]
    assert report.layers[3].loss != once.layers[3].loss


def test_held_out_windows_run_through_the_same_stages():
    report = prune(tiny_model("llama"), grams="sequential", held_out=0.25)
    own = Windows(WINDOWS.tokens[:6], "random tokens")
    alone = mipprune.prune(
        tiny_model("llama"), None, own, HALF, "wanda", grams="sequential", samples=6, batch_size=3
    )
    assert alone.mask_hash == report.mask_hash
    apart = Windows(WINDOWS.tokens[6:], "random tokens")
    problem = mipprune.layer_problem(
        _with_masks(report, without="down_proj"), None, apart, report.layers[-1].name, **SIZE
    )
    last = report.layers[-1]
    expected = float(problem.objective(report.masks[last.name]).sum())
    assert last.held_out_loss == pytest.approx(expected, rel=1e-5)


def _with_masks(report, without):
    """The pruned model, but for one layer of its last block."""
    model = tiny_model("llama")
    for name, layer in layers_of(model).items():
        if name != f"model.layers.2.mlp.{without}":
            layer.weight.masked_fill_(~report.masks[name], 0.0)
    return model


def seen(model):
    """First arguments of all modules on all windows, float64 ``[tokens, d]``, in one forward."""
    found = {}

    def note(name):
        def before(_, args, kwargs):
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, torch.Tensor) and given.is_floating_point():
                found[name] = given.flatten(0, -2).double()

        return before

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(input_ids=WINDOWS.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


ADDED = {
    "llama": {"o_proj": "", "down_proj": ".post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": ".ln_2"},
    "opt": {"out_proj": "", "fc2": ".final_layer_norm"},
}
"""Layers that write to the residual stream, and whose input it is before that."""


@pytest.mark.parametrize("family", ADDED)
@pytest.mark.parametrize("sequential", [False, True])
def test_inputs_of_both_models_are_paired(family, sequential):
    """Against inputs of the dense model and of one pruned by hand so far."""
    model, by_hand = tiny_model(family), tiny_model(family)
    own = layers_of(by_hand)

    def before(name):
        """The module that is given what is added to a layer's output; None if nothing is."""
        block = re.match(r".*?\.\d+", name)[0]
        found = [given for end, given in ADDED[family].items() if name.endswith(end)]
        return block + found[0] if found else None

    dense = seen(tiny_model(family))
    stages = Stages() if sequential else None
    walk = BlockWalk(Placement(model), WINDOWS.tokens, 3, stages=stages, targets="stream")
    checked = 0
    for step in walk:
        pruned = seen(by_hand)
        for layer in step.layers:
            gram = step.grams.gram(layer)
            x, tokens = pruned[layer.name], WINDOWS.tokens.numel()
            pairs = [
                (gram.matrix, x.T @ x / tokens),
                (gram.cross, dense[layer.name].T @ x / tokens),
                (gram.cross_mean, dense[layer.name].mean(dim=0)),
            ]
            stream = before(layer.name)
            assert (gram.gap is None) == (stream is None)
            if stream is not None:
                gap = dense[stream] - pruned[stream]
                pairs += [(gram.gap, gap.T @ x / tokens), (gram.gap_mean, gap.mean(dim=0))]
            for found, expected in pairs:
                near = 1e-5 * float(expected.abs().max()) + 1e-9
                assert torch.allclose(found, expected, rtol=1e-4, atol=near)
            checked += not torch.allclose(gram.cross, gram.matrix, rtol=1e-2, atol=1e-4)
        for layer in step.layers:
            mask = HALF.round(torch.rand(layer.weight.shape))
            bias = None if layer.bias is None else layer.bias + 0.1
            step.prune(layer, mask, layer.weight * mask, bias)
            own[layer.name].weight.mul_(mask)
            if bias is not None:
                own[layer.name].bias.copy_(bias)
    assert checked > len(own) / 3


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("bloom", {"dense", "dense_4h_to_h"}),
        ("mixtral", {"o_proj"}),  # experts' outputs are mixed first,
        ("gemma2", set()),  # these are normed,
        ("granite", set()),  # scaled,
        ("phi", set()),  # and those of both parts of a block added up
    ],
)
def test_layers_that_write_to_the_stream_are_found(family, writers):
    walk = BlockWalk(Placement(tiny_model(family)), WINDOWS.tokens, 8, targets="stream")
    step = next(iter(walk))
    found = {one.name for one in step.layers if step.grams.gram(one).gap is not None}
    assert {name.split(".")[-1] for name in found} == writers


def test_experts_aim_at_their_own_outputs():
    report = prune(tiny_model("mixtral"), layer_step=AIMED, grams="sequential")
    for layer in report.layers:
        assert ("router" in layer.note) == ("experts" in layer.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with biases, in a folder."""
    model = tiny_model("qwen2")
    for layer in layers_of(model).values():
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
    return save_source(model, tmp_path_factory.mktemp("models") / "tiny")


def state(folder):
    return mipprune.load_model(str(folder), torch.device("cpu")).model.state_dict()


@pytest.mark.parametrize("update", ["none", "least_squares"])
def test_resumed_streamed_and_certified(source, tmp_path, monkeypatch, update):
    step = LayerStep(Surrogate(dense_targets=0.7, stream=True), update, bias="existing")
    settings = Settings(Rules(HALF), "swap", grams="sequential", layer_step=step, **SIZE)
    report = prune_to_folder(Source(source), tmp_path / "whole", WINDOWS, settings)
    prune_to_folder(Source(source, stream=True), tmp_path / "streamed", WINDOWS, settings)
    with interrupted(after=11):  # within the second block, after its first stages
        prune_to_folder(Source(source), tmp_path / "resumed", WINDOWS, settings)
    prune_to_folder(Source(source), tmp_path / "resumed", WINDOWS, settings, resume=True)
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")
    saved, other = (state(tmp_path / name) for name in ("whole", "streamed"))
    assert all(torch.equal(saved[name], other[name]) for name in saved)
    model = mipprune.load_model(source, torch.device("cpu")).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = LoadedModel(model, None, torch.float32)
    found = certify(tmp_path / "whole", rows=1, row_seconds=0.1, model=dense, calibration=WINDOWS)
    assert len(check_folder(tmp_path / "whole")) == len(found) == len(report.layers)
    assert all(one.bound <= one.loss and one.gap >= 0 for one in found)
    again = model.state_dict()
    assert all(torch.allclose(saved[name], again[name], atol=1e-6) for name in saved)
    moved = [name for name in saved if not torch.equal(saved[name], before[name])]
    assert any(name.endswith(".bias") for name in moved)
    assert {name.rpartition(".")[0] for name in moved} == {one.name for one in report.layers}


def test_an_allocation_is_plain_and_the_run_is_not():
    allocation = mipprune.Allocation(criterion="loss")
    report = prune(tiny_model("llama"), allocation=allocation, layer_step=AIMED)
    plain = LayerStep(update="least_squares")
    other = prune(tiny_model("llama"), allocation=allocation, layer_step=plain)
    assert report.settings["rules"] == other.settings["rules"]
    assert report.mask_hash != other.mask_hash


def test_dense_targets_bring_the_model_nearer():
    """Of the hidden states before the head, on the calibration text."""
    dense = tiny_model("llama")
    last = "model.norm"
    aim = seen(dense)[last]
    distance = {}
    for share, stream in ((0.0, False), (1.0, False), (1.0, True)):
        model = tiny_model("llama")
        surrogate = Surrogate(dense_targets=share, stream=stream)
        step = LayerStep(surrogate, "least_squares", 1e-4)
        prune(model, grams="sequential", layer_step=step)
        distance[share, stream] = float((seen(model)[last] - aim).square().sum())
    own, dense_targets, stream = distance.values()
    assert stream < dense_targets < own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grams": "dense", "layer_step": AIMED}, "the dense model's anyway"),
        ({"layer_step": LayerStep(Surrogate(dense_targets=1.0))}, "knows no linear term"),
        (
            {
                "layer_step": AIMED,
                "held_out": 0.25,
                "choice": mipprune.Choice("shrink", (0.0, 0.5)),
            },
            "not what dense targets aim at",
        ),
        ({"layer_step": LayerStep(Surrogate(dense_targets=1.0)), "solver": "alps"}, "swap"),
    ],
)
def test_what_does_not_go_together_is_refused(options, said):
    with pytest.raises(InvalidInput, match=said):
        prune(tiny_model("llama"), NM(2, 4), **options)
