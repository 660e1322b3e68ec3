import json

import pytest
import torch
from models import FAMILIES, tiny_model
from torch import nn

from mipprune.embedded import MODEL_PATH
from mipprune.models import (
    coverage,
    find_blocks,
    load_model,
    prunable_layers,
    resolve_device,
)
from solvers import InvalidInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_block_weights_are_covered(family):
    name, blocks = find_blocks(tiny_model(family))
    assert coverage(name, blocks).uncovered == ()


def test_conv1d_weights_are_views_of_the_model():
    name, blocks = find_blocks(tiny_model("gpt2"))
    layer = prunable_layers(blocks[0], f"{name}.0")[0]
    assert layer.name == "transformer.h.0.attn.c_attn"
    assert layer.weight.shape == (96, 32)
    layer.weight[5, 3] = 42.0
    assert float(layer.module.weight.data[3, 5]) == 42.0


def test_blocks_are_the_outermost_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
            self.layers = nn.ModuleList(Block() for _ in range(3))

    model = Model()
    assert find_blocks(model)[0] == "layers"
    assert find_blocks(model, "heads") == ("heads", model.heads)
    with pytest.raises(InvalidInput, match="no list of blocks named 'nonsense'"):
        find_blocks(model, "nonsense")
    with pytest.raises(InvalidInput, match="no list of equal blocks"):
        find_blocks(nn.Linear(2, 2))


def test_no_prunable_layer_is_an_error():
    blocks = nn.ModuleList([nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)])
    with pytest.raises(InvalidInput, match="no linear layer"):
        coverage("layers", blocks)


def test_shared_and_quantised_weights_are_refused_by_name():
    block = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    block[1].weight = block[0].weight
    with pytest.raises(InvalidInput, match=r"Layers b\.0 and b\.1 share one weight"):
        prunable_layers(block, "b")
    quantised = nn.Linear(2, 2, bias=False)
    quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidInput, match=r"Layer b.0 has weights of type torch.uint8"):
        prunable_layers(nn.Sequential(quantised), "b")


def test_the_embedded_model_is_stored_in_half_precision():
    loaded = load_model("embedded", CPU)
    assert loaded.stored_dtype == torch.float16
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert load_model(str(MODEL_PATH), CPU, "bfloat16").model.dtype == torch.bfloat16


def test_models_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no model folder at"):
        load_model(str(tmp_path / "missing"), CPU)
    with pytest.raises(InvalidInput, match="'nobody/nothing' cannot be read"):
        load_model("nobody/nothing", CPU)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_model(str(tmp_path), CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InvalidInput, match="holds a vit model, which is no causal language model"):
        load_model(str(tmp_path), CPU)
    with pytest.raises(InvalidInput, match="dtype 'int3' is none of"):
        load_model("embedded", CPU, "int3")


def test_code_that_a_model_brings_along_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_model(str(tmp_path), CPU)
    assert not (tmp_path / "ran").exists()


def test_devices():
    assert resolve_device("cpu") == CPU
    with pytest.raises(InvalidInput, match="unknown"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(InvalidInput, match="no CUDA GPU"):
            resolve_device("cuda")
