import math

import pytest
import torch
from models import tiny_model, tiny_tokens

from mipprune import Windows, perplexity


def test_perplexity_is_its_definition():
    model, tokens = tiny_model("llama"), tiny_tokens()
    total = 0.0
    for window in tokens:
        with torch.no_grad():
            chances = model(input_ids=window[None]).logits[0].double().log_softmax(dim=-1)
        total -= sum(float(chances[i, window[i + 1]]) for i in range(len(window) - 1))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    for batch_size in (1, 2, 8):
        result = perplexity(model, Windows(tokens, "x"), batch_size)
        assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)
        assert result.predicted_tokens == count
