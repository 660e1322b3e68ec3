"""Token weights against plain autograd, and masks by them against problems stated by hand."""

from dataclasses import replace

import pytest
import torch
from models import tiny_model, tiny_tokens
from runs import interrupted, save_source
from torch import nn
from torch.nn.functional import cross_entropy

import mipprune
from mipprune import Choice, LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.certify import certify, check_folder
from mipprune.estimate import plan
from mipprune.folder import ModelFolder, build_empty
from mipprune.gram import GramCollector
from mipprune.job import prune_to_folder
from mipprune.models import LoadedModel, PrunableLayer, all_layers, find_blocks
from mipprune.observer import Observer
from mipprune.opening import Source
from mipprune.placement import FromFolder, FromHost, Placement
from mipprune.prune import settled
from mipprune.rules import Rules
from mipprune.settings import Settings
from mipprune.surrogate import Inputs, TokenWeighted, centred_inputs, row_slices, shrunk
from mipprune.token_weights import Fisher, InverseNorm, fisher
from mipprune.walk import BlockWalk
from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, solve

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random")
HALF = PerRow(sparsity=0.5)
SIZE = {"samples": 8, "batch_size": 4}
FISHER = Surrogate(shrink=0.5, tokens="fisher", row_groups=3)
INVERSE = Surrogate(tokens="inverse_norm")


def observed(model, tokens):
    """By plain autograd: every layer's input, output gradient, and its block's input, flattened."""
    name, blocks = find_blocks(model)
    seen, handles = {}, []
    for index, block in enumerate(blocks):
        before = {}

        def enter(_, args, kwargs, before=before):
            before["hidden"] = args[0] if args else kwargs["hidden_states"]

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        for layer in all_layers(name, blocks):
            if layer.name.startswith(f"{name}.{index}."):

                def after(_, args, output, layer=layer, before=before):
                    output.retain_grad()
                    seen[layer.name] = (args[0], output, before["hidden"])

                handles.append(layer.module.register_forward_hook(after))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {
        layer: [one.detach().double().flatten(0, -2) for one in (x, output.grad, hidden)]
        for layer, (x, output, hidden) in seen.items()
    }


def by_hand(gradient, groups):
    """Fisher weights ``[groups, tokens]``."""
    rows = row_slices(gradient.shape[1], groups)
    return torch.stack([gradient[:, part].square().sum(dim=1) for part in rows])


def token_weighted(x, f):
    return (x * f[:, None]).T @ x / f.sum()


@pytest.fixture(scope="module")
def seen():
    return observed(tiny_model("llama"), WINDOWS.tokens)


def names(model):
    return [layer.name for layer in all_layers(*find_blocks(model))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text", "falcon"])
def test_fisher_weights_are_those_of_plain_autograd(family):
    model = tiny_model(family)
    expected = observed(tiny_model(family), WINDOWS.tokens)
    found = fisher(
        Placement(model), BlockWalk(Placement(model), WINDOWS.tokens, 3), names(model), 3
    )
    assert found.weights.keys() == expected.keys()
    for layer, weights in found.weights.items():
        wanted = by_hand(expected[layer][1], 3)
        assert weights.dtype == torch.float32
        assert weights.shape == (3, *WINDOWS.tokens.shape)
        error = (weights.flatten(1) - wanted).abs().max()
        assert float(error) < 1e-5 * float(wanted.max())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_block_at_a_time_suffices():
    model, whole = tiny_model("llama"), tiny_model("llama")
    placement = FromHost(model, torch.device("cpu"))
    busy = []
    visit = placement.block

    def watched(index):
        busy.append(index)
        return visit(index)

    walk = BlockWalk(placement, WINDOWS.tokens, 4)
    placement.block = watched
    found = fisher(placement, walk, names(model))
    outside = [-1] * 4  # once for each window's logits
    assert busy == 2 * [0, 1, 2, *outside, 2, 1, 0]
    expected = fisher(
        Placement(whole), BlockWalk(Placement(whole), WINDOWS.tokens, 4), names(model)
    )
    assert all(torch.equal(found.weights[name], expected.weights[name]) for name in names(model))


@pytest.mark.parametrize("surrogate", [FISHER, INVERSE])
def test_weighted_statistics_are_those_of_the_tokens(surrogate, seen):
    model = tiny_model("llama")
    walk = BlockWalk(Placement(model), WINDOWS.tokens, 3)
    if surrogate.tokens == "fisher":
        walk.token_weights = fisher(Placement(model), walk, names(model), 3)
    else:
        walk.token_weights = InverseNorm(names(model))
    for step in walk:
        for layer in step.layers:
            x, gradient, hidden = seen[layer.name]
            f = by_hand(gradient, 3)
            if surrogate.tokens == "inverse_norm":
                f = 1 / hidden.square().sum(dim=1)[None]
            found = step.grams.gram(layer)
            assert found.weighted.gram.shape == (len(f), *found.matrix.shape)
            for group, weights in enumerate(f):
                gram = token_weighted(x, weights)
                assert torch.allclose(found.weighted.gram[group], gram, rtol=1e-4, atol=1e-6)
                mean = (weights @ x) / weights.sum()
                assert torch.allclose(found.weighted.mean[group], mean, rtol=1e-4, atol=1e-5)
            assert torch.allclose(found.matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            step.grams.release(layer)
        assert not step.grams._weighted


def test_token_weights_count_tokens():
    """A token of weight 2 is one that is seen twice."""
    x = torch.randn(1, 60, 5, generator=torch.Generator().manual_seed(0))
    repeats = torch.arange(60) % 3
    layer = PrunableLayer("layer", nn.Linear(5, 2))

    def gram(inputs, weights=None):
        grams = GramCollector([layer], weights=weights)
        with grams.collecting(hidden=inputs), torch.no_grad():
            layer.module(inputs)
        return grams.gram(layer)

    found = gram(x, Fisher({"layer": repeats[None, None].float()})).weighted
    expected = gram(x.repeat_interleave(repeats, dim=1))
    assert torch.allclose(found.gram[0], expected.matrix, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.mean[0], expected.mean, rtol=1e-5, atol=1e-6)


def test_a_bias_takes_up_the_plain_mean_of_weighted_tokens(seen):
    x, gradient, _ = seen["model.layers.1.mlp.down_proj"]
    f, mean = by_hand(gradient, 2), x.mean(dim=0)
    grams = torch.stack([token_weighted(x, weights) for weights in f])
    means = torch.stack([(weights @ x) / weights.sum() for weights in f])
    inputs = Inputs(x.T @ x / len(x), mean, weighted=TokenWeighted(grams, means))
    found = centred_inputs(inputs).weighted
    for group, weights in enumerate(f):
        assert torch.allclose(found.gram[group], token_weighted(x - mean, weights))
        assert torch.allclose(found.mean[group], (weights @ (x - mean)) / weights.sum())


@pytest.mark.parametrize("start", ["wanda", "current"])
def test_groups_of_rows_are_problems_of_their_own(seen, start):
    model = tiny_model("llama")
    given = {layer.name: layer.weight.clone() for layer in all_layers(*find_blocks(model))}
    if start == "current":
        for layer in all_layers(*find_blocks(model)):
            mask = HALF.round(layer.weight.abs())
            layer.weight.masked_fill_(~mask, 0.0)
            given[layer.name] = layer.weight.clone()
        seen = observed(model, WINDOWS.tokens)
        model.zero_grad()
    report = mipprune.prune(
        model, None, WINDOWS, HALF, "swap", start, layer_step=LayerStep(FISHER, "gain"),
        grams="dense", **SIZE,
    )  # fmt: skip
    for layer in report.layers:
        x, gradient, _ = seen[layer.name]
        weight, f = given[layer.name], by_hand(gradient, 3)
        rows = row_slices(layer.rows, 3)
        assert [part.stop - part.start for part in rows] in ([11, 11, 10], [6, 5, 5], [16] * 3)
        total = 0.0
        for part, weights in zip(rows, f, strict=True):
            problem = MaskProblem(weight[part], shrunk(token_weighted(x, weights), 0.5), HALF)
            first = weight[part] != 0 if start == "current" else solve(problem, start).mask
            best = solve(problem, "swap", start=first)
            found = problem.objective(report.masks[layer.name][part])
            # Gram matrices of one batch are in float32, so a tie may be decided otherwise.
            assert float(found.sum()) == pytest.approx(float(best.objective.sum()), rel=1e-3)
            total += float(found.sum())
        assert layer.surrogate_loss == pytest.approx(total, rel=1e-4)
        plain = MaskProblem(weight, x.T @ x / len(x), HALF)
        loss = float(plain.objective(report.masks[layer.name]).sum())
        assert layer.loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("backward", [True, False])
def test_batches_may_be_halved_in_the_backward_pass_or_after_it(backward, monkeypatch):
    step = LayerStep(FISHER)
    expected = mipprune.prune(tiny_model("llama"), None, WINDOWS, HALF, layer_step=step, **SIZE)
    model, passed, said = tiny_model("llama"), [], []

    def before(_, args):
        passed.extend([True] * torch.is_grad_enabled())
        full = torch.is_grad_enabled() if backward else passed and not torch.is_grad_enabled()
        if full and len(args[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(before)
    monkeypatch.setattr(Observer, "warning", lambda _, text: said.append(text))
    report = mipprune.prune(model, None, WINDOWS, HALF, layer_step=step, samples=8, batch_size=8)
    assert [int(text.split()[-2]) for text in said] == [4, 2]
    for found, wanted in zip(report.layers, expected.layers, strict=True):
        assert found.surrogate_loss == pytest.approx(wanted.surrogate_loss, rel=1e-3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model's folder."""
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("models") / "tiny")


def masks(folder):
    return (folder / "masks.safetensors").read_bytes()


@pytest.mark.parametrize("surrogate", [FISHER, replace(INVERSE, centre=0.5)])
def test_resumed_certified_and_checked(source, tmp_path, monkeypatch, surrogate):
    settings = Settings(
        Rules(HALF),
        layer_step=LayerStep(surrogate, "least_squares"),
        choice=Choice("shrink", (0.2, 0.8)),
        held_out=0.25,
        grams="sequential" if surrogate.tokens == "fisher" else "pruned",
        **SIZE,
    )
    whole = Source(source)
    prune_to_folder(whole, tmp_path / "whole", WINDOWS, settings)
    with interrupted(after=9):
        prune_to_folder(whole, tmp_path / "resumed", WINDOWS, settings)
    prune_to_folder(whole, tmp_path / "resumed", WINDOWS, settings, resume=True)
    assert masks(tmp_path / "whole") == masks(tmp_path / "resumed")
    if surrogate.tokens == "inverse_norm":
        prune_to_folder(Source(source, stream=True), tmp_path / "streamed", WINDOWS, settings)
        assert masks(tmp_path / "whole") == masks(tmp_path / "streamed")
    loaded = mipprune.load_model(source, torch.device("cpu"))
    dense = LoadedModel(loaded.model, loaded.tokenizer, loaded.stored_dtype)
    results = certify(
        tmp_path / "whole", rows=3, row_seconds=0.01, model=dense, calibration=WINDOWS
    )
    verified = check_folder(tmp_path / "whole")
    for one in results:
        assert verified[one.name] == (3, pytest.approx(one.gap, abs=1e-9))
    if surrogate.row_groups > 1:
        files = [path.name for path in (tmp_path / "whole" / "certificates").iterdir()]
        assert {name.split(".")[-2] for name in files if "problem" not in name} == {
            "group0", "group1", "group2"
        }  # fmt: skip


def test_an_allocation_goes_by_the_same_masks():
    report = mipprune.prune(
        tiny_model("llama"), None, WINDOWS, HALF, layer_step=LayerStep(FISHER),
        allocation=mipprune.Allocation(), **SIZE,
    )  # fmt: skip
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert len({layer.sparsity for layer in report.layers}) > 1


def test_rows_without_any_influence_count_all_tokens(seen):
    model = tiny_model("llama")
    layer = model.model.layers[2].mlp
    with torch.no_grad():
        layer.down_proj.weight[:, :16] = 0.0  # of three groups of up_proj's rows, the first
    report = mipprune.prune(model, None, WINDOWS, HALF, layer_step=LayerStep(FISHER), **SIZE)
    notes = {one.name: one.note for one in report.layers if one.note}
    assert notes == dict.fromkeys(
        ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"],
        "has no token weights in 1 of 3 groups of rows: all tokens count the same there",
    )
    assert any("up_proj has no token weights" in warning for warning in report.warnings)


def test_what_cannot_be_weighted_is_refused(tmp_path):
    def prune(family="llama", pattern=HALF, surrogate=FISHER, **options):
        mipprune.prune(
            tiny_model(family), None, WINDOWS, pattern, layer_step=LayerStep(surrogate),
            **SIZE, **options,
        )  # fmt: skip

    with pytest.raises(InvalidInput, match="cannot be solved in 3 groups"):
        prune(pattern=PerLayer(sparsity=0.5))
    for surrogate in (FISHER, INVERSE):
        with pytest.raises(InvalidInput, match="tokens routed to it"):
            prune("mixtral", surrogate=surrogate)
    with pytest.raises(InvalidInput, match="hand on more than hidden states"):
        prune("bloom")
    for fields, message in [
        ({"tokens": "loud"}, "none of equal, fisher, inverse_norm"),
        ({"tokens": "fisher", "row_groups": 0}, "row_groups=0 is below 1"),
        ({"tokens": "inverse_norm", "row_groups": 2}, "give --tokens fisher too"),
        ({"tokens": "fisher", "dense_targets": True}, "leave one out"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            Surrogate(**fields)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    empty = build_empty(model.config, torch.float32)
    folder = ModelFolder(tmp_path, empty)
    streamed = FromFolder(empty, folder, torch.device("cpu"), torch.float32)
    step = LayerStep(FISHER)
    with pytest.raises(InvalidInput, match="give --no-stream"):
        mipprune.prune(empty, None, WINDOWS, HALF, layer_step=step, placement=streamed, **SIZE)
    with pytest.raises(InvalidInput, match="give --no-stream"):
        settled(Settings(Rules(HALF), layer_step=step), streamed)
    x = torch.eye(4)
    with pytest.raises(InvalidInput, match="need statistics with weights"):
        FISHER.problems(x, Inputs(x.double()), HALF)


def test_experts_may_be_left_dense():
    rules = Rules(NM(2, 4), ignore=("*experts*",))
    report = mipprune.prune(
        tiny_model("qwen3_moe"), None, WINDOWS, rules, layer_step=LayerStep(INVERSE), **SIZE
    )
    assert len(report.layers) == 3 * 4


def test_a_plan_counts_the_backward_pass():
    model = tiny_model("llama")
    plans = {
        tokens: plan(
            Placement(model),
            WINDOWS,
            Settings(Rules(HALF), batch_size=8, layer_step=LayerStep(Surrogate(tokens=tokens))),
        )
        for tokens in ("equal", "inverse_norm", "fisher")
    }
    assert "token weights" in plans["fisher"].phases
    assert "token weights" not in plans["inverse_norm"].phases
    # Each layer has a matrix of its own: those that share their input otherwise, too.
    squares = 12 * (6 * 32**2 + 48**2)
    shared = 12 * (3 * 32**2 + 48**2)
    phases = {tokens: found.phases["Gram matrices"] for tokens, found in plans.items()}
    kept = 4 * 21 * WINDOWS.tokens.numel()
    assert phases["fisher"] - phases["equal"] == pytest.approx(squares + kept, abs=2**24)
    assert phases["inverse_norm"] - phases["equal"] == pytest.approx(shared, abs=2**24)


def test_weights_are_looked_up_by_place():
    weights = torch.arange(24.0).view(2, 3, 4)
    of = Fisher({"layer": weights}).of_batch(slice(1, 3), torch.zeros(2, 4, 8))
    assert torch.equal(of("layer"), weights[:, 1:].reshape(2, 8))
    assert of("another") is None
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert InverseNorm(["layer"]).of_batch(slice(0, 1), hidden)("layer").tolist() == [
        [pytest.approx(1 / 25), 0.0]
    ]


def test_the_command_line_says_which_tokens_count(run, tmp_path):
    size = ["--samples", "2", "--seqlen", "64", "--pattern", "2:4", "--only", "*.0.*"]
    out = tmp_path / "out"
    options = ["--tokens", "fisher", "--row-groups", "2", "--solver", "wanda", *size]
    code, _, err = run("prune", "embedded", "--out", out, *options)
    assert code == 0, err
    surrogate = mipprune.results.read_record(out)["settings"]["layer_step"]["surrogate"]
    assert (surrogate["tokens"], surrogate["row_groups"]) == ("fisher", 2)
    code, _, err = run("prune", "embedded", "--out", tmp_path / "no", "--tokens", "all", *size)
    assert code != 0
    assert "none of equal, fisher, inverse_norm" in err
