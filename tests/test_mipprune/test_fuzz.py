"""Damaged and hostile files: each is refused in one sentence, and nothing of theirs is run."""

import json
import random
import shutil

import pytest
import torch

import mipprune
from mipprune.checkpoint import MASKS_FILE, save_masks
from mipprune.embedded import MODEL_PATH
from solvers import NM, InvalidInput

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(MODEL_PATH, tmp_path / "model")


def refused(folder, match):
    with pytest.raises(InvalidInput, match=match) as raised:
        mipprune.load_model(str(folder), CPU)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, 0.5, -1])
def test_truncated_weights(folder, length):
    content = (folder / WEIGHTS).read_bytes()
    cut = int(length * len(content)) if isinstance(length, float) else length
    (folder / WEIGHTS).write_bytes(content[:cut])
    refused(folder, "SafetensorError")


@pytest.mark.parametrize("place", [0, 3, 7, 8, 9, 60, 200])
def test_a_damaged_header_of_weights(folder, place):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] = 255
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "SafetensorError")


def test_a_missing_weight_is_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, r"lacks the weight model\.layers\.2\.mlp\.up_proj\.weight \(1 in all\)")


def test_a_weight_of_another_shape(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, "cannot be read as a causal language model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b"3"])
def test_damaged_json(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, "cannot be read as a causal language model")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": "x"},
        {"hidden_size": -1},
        {"model_type": "nonsense"},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 0},
        {"hidden_act": "nonsense"},
        {"vocab_size": 0},
    ],
)
def test_nonsense_in_the_configuration(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder, "cannot be read as a causal language model")


def test_a_pickle_in_place_of_weights_is_not_run(folder, tmp_path):
    import os
    import pickle

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    refused(folder, "cannot be read as a causal language model")
    assert not (tmp_path / "run").exists()


def test_damaged_masks_are_refused_or_read(tmp_path):
    file, chance = tmp_path / MASKS_FILE, random.Random(0)
    save_masks(file, {f"layer{i}": torch.rand(60, 13) < 0.5 for i in range(3)})
    content = file.read_bytes()
    kinds = {"refused": 0, "read": 0}
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.choice([1, 1, 4])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        file.write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            masks = mipprune.load_masks(file)
        except InvalidInput:
            kinds["refused"] += 1
        else:
            assert all(mask.dtype == torch.bool and mask.ndim == 2 for mask in masks.values())
            kinds["read"] += 1
    assert min(kinds.values()) > 10


def test_another_models_tokenizer_is_refused(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: 5000 + i for i, word in enumerate(["the", "a", "of", "x", "<unk>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    loaded = mipprune.load_model(str(folder), CPU)
    before = loaded.model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(InvalidInput, match="embeds only 2048 tokens; use the model's own"):
        mipprune.prune(loaded.model, other, None, NM(2, 4), samples=2, seqlen=16)
    assert torch.equal(loaded.model.model.layers[0].mlp.up_proj.weight, before)
