import io
import re

import pytest
import torch
from models import tiny_model, tiny_tokens
from rich.console import Console
from typer.testing import CliRunner

from mipprune.calibration import Windows
from mipprune.cli import app
from mipprune.estimate import choose_batch, plan
from mipprune.folder import ModelFolder, build_empty
from mipprune.layer import LayerSolver
from mipprune.layer_step import LayerStep
from mipprune.models import find_blocks
from mipprune.placement import FromFolder, Placement
from mipprune.report import plan_table
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import NM, PerLayer, PerRow

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")


@pytest.mark.parametrize(
    ("family", "grams"),
    [
        (
            "llama",
            {"q_proj, k_proj, v_proj": 32, "o_proj": 32, "gate_proj, up_proj": 32, "down_proj": 48},
        ),
        ("gpt2", {"c_attn": 32, "c_fc": 32}),
    ],
)
def test_a_plan_names_blocks_and_gram_matrices(family, grams):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = plan(Placement(model), WINDOWS, Settings(Rules(PerRow(sparsity=0.5)), batch_size=8))
    assert found.blocks == 3
    assert found.layers == (7 if family == "llama" else 4)
    assert grams.items() <= found.grams.items()
    _, blocks = find_blocks(model)
    assert found.weights == sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    assert found.seconds > 0
    assert found.peak == max(found.phases.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_not_held_is_not_counted(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    empty = build_empty(model.config, torch.float32)
    placement = FromFolder(empty, ModelFolder(tmp_path, empty), torch.device("cpu"), torch.float32)
    settings = Settings(Rules(NM(2, 4)), samples=8, batch_size=8)
    found = plan(placement, WINDOWS, settings, host_bytes=0)
    kept = plan(placement, WINDOWS, settings)
    hidden = WINDOWS.tokens.numel() * 32 * 4
    difference = kept.phases["solving"] - found.phases["solving"]
    # the process itself may grow by some pages in between
    assert difference == pytest.approx(hidden, abs=2**24)
    assert "in the folder" in found.placement


def test_batches_on_the_cpu_are_of_eight():
    assert choose_batch(Placement(tiny_model("llama")), 2048) == 8


def test_a_dry_run_writes_nothing(tmp_path):
    arguments = ["prune", "embedded", "--out", str(tmp_path / "out"), "--pattern", "2:4"]
    done = CliRunner().invoke(app, [*arguments, "--samples", "4", "--seqlen", "64", "--dry-run"])
    assert done.exit_code == 0
    assert "6, each with 7 layers to prune" in done.stdout
    assert "704 x 704" in done.stdout
    assert "peak memory" in done.stdout
    assert "time, about" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", [NM(2, 4), PerRow(sparsity=0.5), PerLayer(sparsity=0.5)])
def test_the_time_is_of_the_whole_layer_step(pattern, monkeypatch):
    """Blocks are run and layers solved as in a run, and their times added up."""
    said = []

    class Slow(LayerSolver):
        def __call__(self, layer, gram):
            said.append(tuple(layer.weight.shape))
            return super().__call__(layer, gram)

    monkeypatch.setattr("mipprune.estimate.LayerSolver", Slow)
    monkeypatch.setattr("mipprune.estimate._timed", lambda work: float(work() is not work))
    step = LayerStep(update="least_squares")
    settings = Settings(Rules(pattern), layer_step=step, batch_size=4)
    found = plan(Placement(tiny_model("llama")), WINDOWS, settings, before=1000)
    # Whatever is timed takes 1 s here: two batches through a block, once to collect and once for
    # the next block, and seven layers; three such blocks. Loading is timed apart.
    assert 0 <= found.seconds - (1000 + 3 * (2 * 2 + 7)) < 60
    shapes = ((32, 32), (16, 32), (48, 32), (32, 48))
    # Each shape once: a quarter of its rows, without and with what happens once, and all.
    samples = [(rows // part, inputs) for rows, inputs in shapes for part in (4, 4, 1)]
    assert sorted(said) == sorted(samples)


def test_the_time_is_told_with_its_range(tmp_path):
    settings = Settings(Rules(NM(2, 4)), batch_size=8)
    table = plan_table(plan(Placement(tiny_model("llama")), WINDOWS, settings))
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    assert re.search(r"time, about +\d+ s, likely \d+ s to \d+ s", console.file.getvalue())
