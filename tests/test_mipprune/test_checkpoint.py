import json
import os

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune.calibration import Windows
from mipprune.checkpoint import MASKS_FILE, RECORD_FILE, check_new, save_masks, write_json
from solvers import NM, InvalidInput, PerRow


def test_a_saved_model_is_the_pruned_one(tmp_path, embedded):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = mipprune.prune(
        embedded.model, embedded.tokenizer, None, PerRow(sparsity=0.6), samples=4, seqlen=64
    )
    tokens = Windows(tiny_tokens(windows=4, length=64), "random")
    before = mipprune.perplexity(embedded.model, tokens)
    out = tmp_path / "pruned"
    mipprune.save(out, embedded.model, embedded.tokenizer, report, embedded.stored_dtype)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert mipprune.perplexity(model, tokens) == before
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float16
    assert AutoTokenizer.from_pretrained(out)("def f():")["input_ids"]
    for name, mask in report.masks.items():
        weight = model.get_submodule(name).weight
        d = weight.shape[1]
        assert bool(((weight != 0).sum(dim=1) <= d - int(0.6 * d)).all())
        assert bool((mask.sum(dim=1) == d - int(0.6 * d)).all())
        assert not bool(weight[~mask].any())
    masks = mipprune.load_masks(out)
    assert masks.keys() == report.masks.keys()
    assert all(torch.equal(masks[name], report.masks[name]) for name in masks)
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["mask_hash"] == report.mask_hash
    assert record["calibration"]["sha256"] == report.calibration["sha256"]
    assert len(record["layers"]) == 42
    assert record["layers"][0]["loss"] < record["layers"][0]["loss_start"]
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_gpt2_masks_are_outputs_by_inputs(tmp_path):
    model = tiny_model("gpt2")
    report = mipprune.prune(model, None, Windows(tiny_tokens(), "x"), NM(1, 4), samples=5)
    save_masks(tmp_path / MASKS_FILE, report.masks)
    masks = mipprune.load_masks(tmp_path)
    assert masks["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert torch.equal(
        masks["transformer.h.0.attn.c_attn"].T, model.transformer.h[0].attn.c_attn.weight != 0
    )


def test_masks_of_any_width_survive_packing(tmp_path):
    masks = {f"w{d}": torch.rand(3, d) < 0.5 for d in (1, 7, 8, 9, 33)}
    save_masks(tmp_path / "m", masks)
    again = mipprune.load_masks(tmp_path / "m")
    assert all(torch.equal(again[name], masks[name]) for name in masks)


def test_files_that_are_no_masks_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no masks at"):
        mipprune.load_masks(tmp_path)
    (tmp_path / MASKS_FILE).write_text("?")
    with pytest.raises(InvalidInput, match="no file of packed masks"):
        mipprune.load_masks(tmp_path)


def test_an_output_that_exists_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="exists already"):
        check_new(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="no folder to write in"):
        check_new(tmp_path / "file" / "out")
    assert check_new(tmp_path / "new" / "out") == tmp_path / "new" / "out"
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInput, match="cannot be written"):
        check_new(tmp_path / "out")


def test_nothing_half_written_stays(tmp_path, embedded, monkeypatch):
    report = mipprune.prune(
        embedded.model, embedded.tokenizer, None, NM(2, 4), "magnitude", samples=1, seqlen=8
    )

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("mipprune.checkpoint.save_masks", fail)
    with pytest.raises(OSError, match="disk full"):
        mipprune.save(tmp_path / "out", embedded.model, embedded.tokenizer, report)
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": (float("inf"), None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": [None, None]}
