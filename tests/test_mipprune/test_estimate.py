import pytest
import torch
from models import tiny_model, tiny_tokens
from typer.testing import CliRunner

from mipprune.calibration import Windows
from mipprune.cli import app
from mipprune.estimate import choose_batch, plan
from mipprune.folder import ModelFolder, build_empty
from mipprune.models import find_blocks
from mipprune.placement import FromFolder, Placement
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import NM, PerRow

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
    found = plan(Placement(model), WINDOWS, Settings(Rules(PerRow(sparsity=0.5))))
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
    settings = Settings(Rules(NM(2, 4)), samples=8)
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
