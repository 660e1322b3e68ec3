import json
import shutil

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune.calibration import Windows
from mipprune.certify import _margin, _sample, certify, check_folder
from mipprune.models import LoadedModel
from solvers import NM, InvalidInput, PerLayer, PerRow

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")


def dense():
    return LoadedModel(tiny_model("llama"), None, torch.float32)


def pruned(folder, embedded, pattern=None, **options):
    model = tiny_model("llama")
    pattern = pattern or PerRow(sparsity=0.5)
    report = mipprune.prune(model, None, WINDOWS, pattern, samples=8, **options)
    mipprune.save(folder, model, embedded.tokenizer, report)
    return folder


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    embedded = mipprune.load_model("embedded", torch.device("cpu"))
    folder = pruned(tmp_path_factory.mktemp("certified") / "model", embedded)
    results = certify(folder, rows=3, row_seconds=2.0, model=dense(), calibration=WINDOWS)
    return folder, results


def test_every_layer_gets_a_valid_gap(certified):
    folder, results = certified
    assert len(results) == 21
    for result in results:
        assert len(result.rows) == len(set(result.rows)) == 3
        assert 0 <= result.gap < 1
        assert result.bound <= result.loss
        assert result.margin > 0
    record = json.loads((folder / "mipprune.json").read_text())
    written = [layer["certificate"]["gap"] for layer in record["layers"]]
    assert written == [result.gap for result in results]


def test_the_folder_checks_itself(certified):
    folder, results = certified
    verified = check_folder(folder)
    assert {name: count for name, (count, _) in verified.items()} == {
        result.name: 3 for result in results
    }
    for result in results:
        assert verified[result.name][1] == pytest.approx(result.gap, abs=1e-9)


def test_a_run_with_a_recipe_is_repeated(tmp_path, embedded):
    layer_step = mipprune.LayerStep(mipprune.Surrogate(shrink=0.5), "least_squares")
    folder = pruned(tmp_path / "model", embedded, layer_step=layer_step)
    model = dense()
    results = certify(folder, rows=1, row_seconds=0.2, model=model, calibration=WINDOWS)
    assert len(check_folder(folder)) == len(results) == 21
    saved = mipprune.load_model(str(folder), torch.device("cpu")).model.state_dict()
    again = model.model.state_dict()
    assert all(torch.allclose(saved[name], again[name], atol=1e-6) for name in saved)


def copied(certified, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(certified[0], folder)
    return folder, folder / "certificates" / f"{certified[1][0].name}.safetensors"


def test_tampering_is_noticed(certified, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, file = copied(certified, tmp_path)
    tensors = load_file(file)
    save_file({**tensors, "shift": tensors["shift"] * 0}, file)
    tensors["diagonal"][0] += abs(tensors["diagonal"]).max()
    save_file(tensors, file)
    with pytest.raises(InvalidInput, match=f"Layer {certified[1][0].name}: Row 0"):
        check_folder(folder)


def test_a_raised_claim_is_noticed(certified, tmp_path):
    folder, _ = copied(certified, tmp_path)
    record = json.loads((folder / "mipprune.json").read_text())
    record["layers"][3]["certificate"]["bound"] *= 1.01
    (folder / "mipprune.json").write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match="claims the bound"):
        check_folder(folder)


def test_exchanged_masks_are_noticed(certified, tmp_path):
    folder, _ = copied(certified, tmp_path)
    masks = mipprune.load_masks(folder)
    name, row = certified[1][0].name, certified[1][0].rows[0]
    masks[name][row] = masks[name][row].flip(0)
    mipprune.checkpoint.save_masks(folder / "masks.safetensors", masks)
    with pytest.raises(InvalidInput, match="not the model's"):
        check_folder(folder)


def test_all_rows_have_no_margin(tmp_path, embedded):
    folder = pruned(tmp_path / "m", embedded, NM(2, 4))
    results = certify(folder, rows=None, row_seconds=0.01, model=dense(), calibration=WINDOWS)
    assert results[0].rows == list(range(32))
    assert results[0].margin == results[0].gap_margin == 0.0


def test_a_budget_per_layer_is_certified_at_a_price(tmp_path, embedded):
    folder = pruned(tmp_path / "layer", embedded, PerLayer(sparsity=0.5))
    results = certify(folder, rows=3, row_seconds=0.01, model=dense(), calibration=WINDOWS)
    verified = check_folder(folder)
    for result in results:
        assert result.bound <= result.loss
        assert result.price is not None
        assert result.gap_margin > 0
        assert verified[result.name][1] == pytest.approx(result.gap, abs=1e-9)
    name = results[0].name
    masks = mipprune.load_masks(folder)
    masks[name][results[0].rows[0]] = True
    mipprune.checkpoint.save_masks(folder / "masks.safetensors", masks)
    with pytest.raises(InvalidInput, match=f"Layer {name}: The mask does not follow"):
        check_folder(folder)


def test_runs_that_cannot_be_repeated_are_refused(certified, tmp_path, embedded):
    folder, _ = copied(certified, tmp_path)
    other = Windows(tiny_tokens(windows=8, length=32, seed=1), "other")
    with pytest.raises(InvalidInput, match="gives other tokens"):
        certify(folder, rows=1, model=dense(), calibration=other)
    wrong = LoadedModel(tiny_model("llama", seed=1), None, torch.float32)
    with pytest.raises(InvalidInput, match="in the record"):
        certify(folder, rows=1, model=wrong, calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="does not name its model"):
        certify(folder, rows=1, calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="certify nothing"):
        certify(folder, rows=0, model=dense(), calibration=WINDOWS)
    with pytest.raises(InvalidInput, match="no pruned model's folder"):
        certify(tmp_path)
    fresh = pruned(tmp_path / "fresh", embedded, solver="wanda")
    with pytest.raises(InvalidInput, match="has no certificates"):
        check_folder(fresh)


def test_samples_and_margins():
    assert _sample(5, None, (0,)) == _sample(5, 9, (0,)) == [0, 1, 2, 3, 4]
    assert _sample(100, 4, (0, 1)) == _sample(100, 4, (0, 1)) != _sample(100, 4, (0, 2))
    gaps = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert _margin(gaps, 3) == 0.0
    assert _margin(gaps[:1], 3) is None
    assert _margin(gaps, 10**9) == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
