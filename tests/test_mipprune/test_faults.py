"""What a run does when the device's memory does not suffice."""

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.observer import Observer
from solvers import InvalidInput, PerLayer, PerRow
from solvers.swap import Swap

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")


class Warnings(Observer):
    def __init__(self):
        self.said = []

    def warning(self, text):
        self.said.append(text)


def prune(model, pattern=None, **options):
    observer = Warnings()
    pattern = pattern or PerRow(sparsity=0.5)
    options = {"samples": 8, "batch_size": 8, "observer": observer, **options}
    return mipprune.prune(model, None, WINDOWS, pattern, **options), observer.said


def too_large(model, windows):
    """Block 1 has no memory for more than so many windows."""

    def before(_, args):
        if len(args[0]) > windows:
            raise torch.OutOfMemoryError("out of memory")

    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(before)
    return model


@pytest.mark.parametrize(
    ("grams", "targets"), [("pruned", 0.0), ("dense", 0.0), ("pruned", 1.0), ("sequential", 1.0)]
)
def test_batches_are_halved_and_the_run_goes_on(grams, targets):
    step = {"layer_step": LayerStep(Surrogate(dense_targets=targets), "least_squares")}
    report, said = prune(too_large(tiny_model("llama"), 3), grams=grams, **step)
    assert said == [
        "Out of device memory: from here on in batches of 4 windows.",
        "Out of device memory: from here on in batches of 2 windows.",
    ]
    expected, said = prune(tiny_model("llama"), grams=grams, batch_size=2, **step)
    assert said == []
    for found, wanted in zip(report.layers, expected.layers, strict=True):
        assert found.tokens == wanted.tokens == WINDOWS.tokens.numel()
        # other batches round otherwise, and every stage and target sees that of those before
        assert found.loss == pytest.approx(wanted.loss, rel=3e-2 if targets else 1e-3)


def test_a_window_that_does_not_fit_ends_the_run():
    with pytest.raises(InvalidInput, match="batch of 1 windows of 32 tokens; give a smaller"):
        prune(too_large(tiny_model("llama"), 0.5))


def limited(monkeypatch, rows):
    search = Swap._search

    def limited(self, asked):
        if asked.problem.shape[0] > rows:
            raise torch.OutOfMemoryError("out of memory")
        return search(self, asked)

    monkeypatch.setattr(Swap, "_search", limited)


def test_rows_are_solved_in_pieces(monkeypatch):
    expected, _ = prune(tiny_model("llama"))
    limited(monkeypatch, 20)
    report, said = prune(tiny_model("llama"))
    assert said == [
        "Out of device memory: from here on rows are solved in 2 pieces.",
        "Out of device memory: from here on rows are solved in 4 pieces.",
    ]
    assert report.mask_hash == expected.mask_hash
    assert [layer.loss for layer in report.layers] == [layer.loss for layer in expected.layers]
    assert {layer.status for layer in report.layers} == {"LOCAL_OPTIMUM"}


@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.5), PerLayer(sparsity=0.5)])
def test_rows_that_do_not_fit_end_the_run(monkeypatch, pattern):
    limited(monkeypatch, 0)
    with pytest.raises(InvalidInput, match="too little memory to solve"):
        prune(tiny_model("llama"), pattern)
