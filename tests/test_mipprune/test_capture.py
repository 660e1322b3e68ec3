import pytest
import torch
from models import FAMILIES, tiny_model, tiny_tokens
from torch import nn

from mipprune.capture import ReplayMismatch, _split, capture, check_replay
from mipprune.models import find_blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_replay_gives_the_logits_of_the_forward(family):
    model = tiny_model(family)
    _, blocks = find_blocks(model)
    assert len(blocks) == 3
    assert check_replay(model, blocks, tiny_tokens()) == 0.0


@pytest.mark.parametrize("family", ["qwen2 sliding", "gemma2", "gemma3_text"])
def test_blocks_keep_their_own_arguments(family):
    """Replaying with block 0's arguments, as other tools do, must be caught."""
    model = tiny_model(family)
    _, blocks = find_blocks(model)
    record = capture(model, blocks, [tiny_tokens()])
    hidden = record.hidden[0]
    with torch.no_grad():
        own = record.calls[0][0].run(blocks[0], hidden)
        right = record.calls[1][0].run(blocks[1], own)
        wrong = record.calls[0][0].run(blocks[1], own)
    assert not torch.allclose(right, wrong)


def test_equal_arguments_are_stored_once():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    record = capture(model, blocks, tiny_tokens(windows=8).split(2))
    kept = {id(call.kwargs["position_embeddings"][0]) for calls in record.calls for call in calls}
    assert len(kept) == 1
    assert len(record.hidden) == 4


def test_a_block_whose_replay_differs_is_named():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)

    class Drifting(nn.Module):
        """A block with a state: it answers differently when it is run again."""

        def __init__(self, block):
            super().__init__()
            self.block, self.calls = block, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.block(*args, **kwargs) * self.calls

    blocks[1] = Drifting(blocks[1])
    with pytest.raises(ReplayMismatch, match="Block 1 replayed alone differs"):
        check_replay(model, blocks, tiny_tokens())


def test_a_block_that_runs_twice_is_refused():
    model = tiny_model("llama")
    _, blocks = find_blocks(model)
    original = blocks[0].forward

    class Twice(nn.Module):
        def forward(self, *args, **kwargs):
            return blocks[2](original(*args, **kwargs), **kwargs)

    blocks[0] = Twice()
    with pytest.raises(ReplayMismatch, match="ran 2 times for 1 batches"):
        capture(model, blocks, [tiny_tokens()])


def test_hidden_states_may_come_by_name():
    hidden = torch.zeros(1)
    found, call = _split((), {"hidden_states": hidden, "mask": 3})
    assert found is hidden
    assert call.kwargs == {"mask": 3}
