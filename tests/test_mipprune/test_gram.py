import pytest
import torch
from models import tiny_model, tiny_tokens
from torch import nn

from mipprune.gram import GramCollector
from mipprune.models import PrunableLayer, find_blocks, prunable_layers
from mipprune.placement import Placement
from mipprune.walk import BlockWalk
from solvers import InvalidInput


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gram_is_that_of_the_layers_inputs(family):
    model = tiny_model(family)
    name, blocks = find_blocks(model)
    tokens = tiny_tokens()
    seen = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, key=layer.name: seen.setdefault(key, []).append(args[0])
        )
        for i, block in enumerate(blocks)
        for layer in prunable_layers(block, f"{name}.{i}")
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for step in BlockWalk(Placement(model), tokens, batch_size=2):
        for layer in step.layers:
            x = torch.cat(seen[layer.name]).reshape(-1, layer.weight.shape[1]).double()
            gram = step.grams.gram(layer)
            assert gram.tokens == len(x) == tokens.numel()
            assert torch.allclose(gram.matrix, x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_layers_with_one_input_share_one_matrix():
    model = tiny_model("llama")
    step = next(iter(BlockWalk(Placement(model), tiny_tokens(), batch_size=5)))
    grams = step.grams
    owners = {layer.name.rpartition(".")[2]: grams._owner[layer.name] for layer in step.layers}
    assert owners["q_proj"] == owners["k_proj"] == owners["v_proj"]
    assert owners["gate_proj"] == owners["up_proj"]
    assert len(set(owners.values())) == 4


def test_a_layer_without_tokens_has_a_zero_matrix():
    layer = PrunableLayer("unused", nn.Linear(4, 2))
    gram = GramCollector([layer]).gram(layer)
    assert gram.tokens == 0
    assert not bool(gram.matrix.any())


def test_an_overflow_is_named():
    layer = PrunableLayer("wide", nn.Linear(4, 2))
    grams = GramCollector([layer])
    with grams.collecting(), torch.no_grad():
        layer.module(torch.full((3, 4), 1e30))
    with pytest.raises(InvalidInput, match="inputs of layer wide are NaN, infinite or overflow"):
        grams.gram(layer)


def test_no_gradients_are_kept():
    step = next(iter(BlockWalk(Placement(tiny_model("llama")), tiny_tokens(), batch_size=5)))
    gram = step.grams.gram(step.layers[0])
    assert not gram.matrix.requires_grad
    assert not gram.mean.requires_grad
