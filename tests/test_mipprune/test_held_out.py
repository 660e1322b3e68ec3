from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from models import tiny_model, tiny_tokens
from runs import content, interrupted, save_source

import mipprune
from mipprune import Choice, LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.certify import certify
from mipprune.held_out import split_windows
from mipprune.html_report import html_report
from mipprune.job import prune_to_folder
from mipprune.journal import FileJournal
from mipprune.models import LoadedModel, all_layers, find_blocks
from mipprune.opening import Source
from mipprune.report import choice_line, layer_table
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import InvalidInput, PerRow, updated_loss

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random")
OWN, APART = split_windows(WINDOWS, 0.25)
SIZE = {"samples": 8, "batch_size": 4}
HALF = PerRow(sparsity=0.5)
SHRINK = Choice("shrink", (0.0, 0.4, 0.9))


def weights_of(model):
    return {layer.name: layer.weight.clone() for layer in all_layers(*find_blocks(model))}


def gram_of(model, windows, layer):
    return mipprune.layer_problem(model, None, windows, layer, **SIZE).gram


def test_windows_are_split():
    assert torch.equal(torch.cat([OWN.tokens, APART.tokens]), WINDOWS.tokens)
    assert len(APART.tokens) == 2
    assert [len(split_windows(WINDOWS, share)[1].tokens) for share in (0.01, 0.99)] == [1, 7]
    with pytest.raises(InvalidInput, match="leaves none to hold out"):
        split_windows(APART.__class__(WINDOWS.tokens[:1], "random"), 0.5)


@pytest.mark.parametrize("grams", ["pruned", "dense"])
def test_held_out_losses_are_those_of_the_other_windows(grams):
    model = tiny_model("llama")
    dense = weights_of(model)
    settings = {"layer_step": LayerStep(update="gain"), "grams": grams, **SIZE}
    report = mipprune.prune(model, None, WINDOWS, HALF, "wanda", held_out=0.25, **settings)
    seen_by = model if grams == "pruned" else tiny_model("llama")
    written = weights_of(model)
    checked = [one for one in report.layers if one.name.endswith(".q_proj")]
    assert len(checked) == 3
    for one in checked:
        gram = gram_of(seen_by, APART, one.name)
        masked = dense[one.name].where(report.masks[one.name], 0.0)
        for weight, found in (
            (masked, one.held_out_loss),
            (written[one.name], one.held_out_updated_loss),
        ):
            loss = float(updated_loss(dense[one.name], gram, weight).sum())
            assert found == pytest.approx(loss, rel=1e-5)
        assert one.updated_loss != one.held_out_updated_loss
    apart = {"windows": 2, "sha256": APART.digest}
    assert report.calibration["held_out"] == apart
    # What is held out plays no part in masks and weights.
    alone = tiny_model("llama")
    without = mipprune.prune(alone, None, OWN, HALF, "wanda", **{**settings, "samples": 6})
    assert without.mask_hash == report.mask_hash
    assert all(torch.equal(weight, written[name]) for name, weight in weights_of(alone).items())
    assert without.held_out_loss is None


@pytest.mark.parametrize(
    ("choice", "solver", "options"),
    [
        (SHRINK, "swap", lambda value: {"layer_step": LayerStep(Surrogate(shrink=value))}),
        (
            Choice("fixed", (0.0, 0.9)),
            "frank_wolfe",
            lambda value: {"solver_options": {"fixed": value, "iterations": 50}},
        ),
    ],
)
def test_every_layer_takes_the_value_of_least_held_out_loss(choice, solver, options):
    settings = {**SIZE, "held_out": 0.25, "grams": "dense"}
    few = {"solver_options": {"iterations": 50}} if solver == "frank_wolfe" else {}
    report = mipprune.prune(
        tiny_model("llama"), None, WINDOWS, HALF, solver, choice=choice, **few, **settings
    )
    each = [
        mipprune.prune(tiny_model("llama"), None, WINDOWS, HALF, solver, **options(v), **settings)
        for v in choice.values
    ]
    for at, layer in enumerate(report.layers):
        losses = [one.layers[at].held_out_updated_loss for one in each]
        best = losses.index(min(losses))
        assert layer.choice["losses"] == losses
        assert layer.choice["value"] == choice.values[best]
        assert torch.equal(report.masks[layer.name], each[best].masks[layer.name])
    assert len({layer.choice["value"] for layer in report.layers}) > 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model's folder."""
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("models") / "tiny")


def test_resumed_streamed_and_certified(source, tmp_path, monkeypatch):
    settings = Settings(Rules(HALF), choice=SHRINK, held_out=0.25, **SIZE)
    whole = Source(source)
    report = prune_to_folder(whole, tmp_path / "whole", WINDOWS, settings)
    streamed = Source(source, stream=True)
    prune_to_folder(streamed, tmp_path / "streamed", WINDOWS, settings)
    with interrupted(after=4):
        prune_to_folder(whole, tmp_path / "resumed", WINDOWS, settings)
    other = replace(settings, held_out=0.5)
    with pytest.raises(InvalidInput, match=r"'held_out' is 0\.5 now"):
        prune_to_folder(whole, tmp_path / "resumed", WINDOWS, other, resume=True)
    prune_to_folder(whole, tmp_path / "resumed", WINDOWS, settings, resume=True)
    whole, streamed, resumed = (
        content(tmp_path / name) for name in ("whole", "streamed", "resumed")
    )
    assert whole == resumed
    assert whole["mipprune.json"] == streamed["mipprune.json"]
    assert len({layer.choice["value"] for layer in report.layers}) > 1
    loaded = mipprune.load_model(source, torch.device("cpu"))
    dense = LoadedModel(loaded.model, loaded.tokenizer, loaded.stored_dtype)
    certify(tmp_path / "whole", rows=1, row_seconds=0.1, model=dense, calibration=WINDOWS)


@pytest.mark.parametrize("grams", ["pruned", "dense"])
def test_a_value_for_the_model_has_the_least_loss_of_all_layers(grams):
    """Measured on dense inputs, before the run, whatever the run's are."""
    settings = {**SIZE, "held_out": 0.25, "layer_step": LayerStep(update="gain")}

    def prune(**more):
        return mipprune.prune(tiny_model("llama"), None, WINDOWS, HALF, **{**settings, **more})

    report = prune(choice=replace(SHRINK, scope="model"), grams=grams)
    steps = [LayerStep(Surrogate(shrink=value), "gain") for value in SHRINK.values]
    losses = [prune(layer_step=step, grams="dense").held_out_loss for step in steps]
    choice = report.settings["choice"]
    assert choice["losses"] == pytest.approx(losses, rel=1e-12)
    best = losses.index(min(losses))
    assert choice["value"] == SHRINK.values[best]
    assert choice["values"] == list(SHRINK.values)
    assert len(set(losses)) == 3
    expected = prune(layer_step=steps[best], grams=grams)
    assert report.mask_hash == expected.mask_hash
    assert report.layers[5].held_out_loss == expected.layers[5].held_out_loss
    assert report.layers[5].choice is None
    assert f"shrink is {choice['value']} in all layers, by their held-out loss (0.0: " in (
        choice_line(report)
    )
    assert choice_line(expected) is None


def test_a_value_for_the_model_is_chosen_once(source, tmp_path, monkeypatch):
    """Also where sparsity is allocated before; the choice is not made anew, and certified."""
    settings = Settings(
        Rules(HALF),
        choice=Choice("damping", (0.0, 1.0), "model"),
        allocation=mipprune.Allocation("owl"),
        held_out=0.25,
        **SIZE,
    )
    whole = Source(source)
    report = prune_to_folder(whole, tmp_path / "whole", WINDOWS, settings)
    assert report.settings["choice"]["value"] == 1.0
    prune_to_folder(Source(source, stream=True), tmp_path / "streamed", WINDOWS, settings)
    choose, measured = FileJournal.choose, []

    def watched(self, chosen):
        measured.append(chosen)
        choose(self, chosen)

    monkeypatch.setattr(FileJournal, "choose", watched)
    finish = FileJournal.finish

    def crash(self, layer, pruned):
        raise KeyboardInterrupt

    for at in (crash, finish):
        monkeypatch.setattr(FileJournal, "finish", at)
        with pytest.raises(KeyboardInterrupt) if at is crash else nullcontext():
            prune_to_folder(whole, tmp_path / "resumed", WINDOWS, settings, resume=True)
    assert len(measured) == 1
    folders = [content(tmp_path / name) for name in ("whole", "resumed", "streamed")]
    assert folders[0] == folders[1]
    assert folders[0]["mipprune.json"] == folders[2]["mipprune.json"]
    loaded = mipprune.load_model(source, torch.device("cpu"))
    dense = LoadedModel(loaded.model, loaded.tokenizer, loaded.stored_dtype)
    certify(tmp_path / "whole", rows=1, row_seconds=0.01, model=dense, calibration=WINDOWS)


def test_what_was_held_out_is_shown():
    report = mipprune.prune(
        tiny_model("llama"), None, WINDOWS, HALF, "swap", held_out=0.25, choice=SHRINK, **SIZE
    )
    assert "held out / own" in [column.header for column in layer_table(report).columns]
    page = html_report(report.to_dict(), report.timings())
    assert "<th>held out</th>" in page
    layer = report.layers[0]
    assert f"<td>shrink {layer.choice['value']}</td>" in page
    assert f"<td>{layer.held_out_updated_loss:.4g}</td>" in page


def test_choices_as_they_are_written():
    assert Choice.parse("shrink=0,0.25,1") == Choice("shrink", (0, 0.25, 1))
    assert Choice.parse("step = auto,exact") == Choice("step", ("auto", "exact"))
    assert Choice.parse("shrink=0,1", "model").scope == "model"
    with pytest.raises(InvalidInput, match="not for 'row'; give layer or model"):
        Choice.parse("shrink=0,1", "row")
    for text, message in [
        ("shrink", "not of the form"),
        ("=1,2", "not of the form"),
        ("shrink=0.5", "nothing to choose"),
        ("shrink=0.5,0.5", "nothing to choose"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            Choice.parse(text)


def test_what_cannot_be_chosen_is_refused():
    model = tiny_model("llama")
    for options, message in [
        ({"choice": SHRINK}, "give a share of them too"),
        ({"choice": SHRINK, "held_out": 1.0}, "held_out=1.0 is outside"),
        ({"choice": Choice("hope", (1, 2)), "held_out": 0.5}, "has no option 'hope'"),
        ({"choice": Choice("shrink", (0, 2)), "held_out": 0.5}, "shrink=2 is outside"),
        ({"choice": Choice("shrink", (0, "a")), "held_out": 0.5}, "'a' is no value of shrink"),
        ({"choice": SHRINK, "held_out": 0.5, "time_budget": 9.0}, "leave the choice out"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            mipprune.prune(model, None, WINDOWS, HALF, "swap", **options, **SIZE)


def test_an_expert_without_held_out_tokens_takes_the_first_value():
    windows = replace(WINDOWS, tokens=torch.cat([WINDOWS.tokens[:, :2], WINDOWS.tokens[:, 2:4]]))
    report = mipprune.prune(
        tiny_model("mixtral"), None, windows, HALF, "swap", held_out=0.01, choice=SHRINK,
        samples=16, batch_size=4,
    )  # fmt: skip
    unseen = [layer for layer in report.layers if layer.held_out_loss is None]
    assert 0 < len(unseen) < len(report.layers)
    assert all(layer.choice["value"] == 0.0 for layer in unseen)
    assert report.held_out_loss is None


def test_the_command_line_says_for_what_it_is_chosen(run, tmp_path):
    size = ["--samples", "2", "--seqlen", "64", "--pattern", "2:4", "--only", "*.0.*.o_proj"]
    options = ["--solver", "wanda", "--choose", "shrink=0,0.5", "--held-out", "0.5"]
    code, printed, err = run(
        "prune", "embedded", "--out", tmp_path / "out", *options, *size, "--choose-for", "model"
    )
    assert code == 0, err
    assert "shrink is 0 in all layers, by their held-out loss (0: " in printed
    code, _, err = run(
        "prune", "embedded", "--out", tmp_path / "no", *size, "--choose-for", "model"
    )
    assert code != 0
    assert "give that too" in err
