import math

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import Windows, perplexity, side_by_side
from solvers import NM, InvalidInput


def log_chances(model, window):
    with torch.no_grad():
        return model(input_ids=window[None]).logits[0].double().log_softmax(dim=-1)


def test_perplexity_is_its_definition():
    model, tokens = tiny_model("llama"), tiny_tokens()
    means = []
    for window in tokens:
        chances = log_chances(model, window)
        losses = [-float(chances[i, window[i + 1]]) for i in range(len(window) - 1)]
        means.append(sum(losses) / len(losses))
    mean = sum(means) / len(means)
    spread = math.sqrt(sum((one - mean) ** 2 for one in means) / (len(means) - 1))
    for batch_size in (1, 2, 8):
        result = perplexity(model, Windows(tokens, "x"), batch_size)
        assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
        assert result.predicted_tokens == tokens.shape[0] * (tokens.shape[1] - 1)
        assert result.nll.standard_error == pytest.approx(spread / math.sqrt(len(means)), rel=1e-4)
        assert result.method == "5 windows of 24 tokens, not overlapping"
    assert perplexity(model, Windows(tokens[:1], "x")).nll.standard_error is None


@pytest.mark.parametrize("stride", [1, 5, 23])
def test_strided_perplexity_predicts_every_token_once(stride):
    model, tokens = tiny_model("llama"), tiny_tokens()
    text, length = tokens.flatten(), tokens.shape[1]
    total, position = 0.0, 1
    for begin in range(0, len(text) - length + 1, stride):
        chances = log_chances(model, text[begin : begin + length])
        while position < begin + length:
            total -= float(chances[position - begin - 1, text[position]])
            position += 1
    result = perplexity(model, Windows(tokens, "x"), batch_size=3, stride=stride)
    assert result.predicted_tokens == position - 1
    assert result.perplexity == pytest.approx(math.exp(total / (position - 1)), rel=1e-6)
    assert f"stride {stride}: at least {length - stride} tokens before" in result.method


def test_a_stride_outside_the_window_is_refused():
    for stride in (0, 24):
        with pytest.raises(InvalidInput, match=r"outside 1\.\.23"):
            perplexity(tiny_model("llama"), Windows(tiny_tokens(), "x"), stride=stride)


@pytest.mark.parametrize("stride", [None, 7])
def test_side_by_side_is_its_definition(stride):
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    windows = Windows(tiny_tokens(), "x")
    mipprune.prune(pruned, None, windows, NM(2, 4), "wanda")
    both = side_by_side(dense, pruned, windows, batch_size=2, stride=stride)
    assert both.dense == perplexity(dense, windows, 2, stride)
    assert both.pruned == perplexity(pruned, windows, 2, stride)
    difference = both.pruned.nll.mean - both.dense.nll.mean
    assert both.nll_increase.mean == pytest.approx(difference, abs=1e-9)
    assert both.nll_increase.standard_error < both.dense.nll.standard_error
    if stride is None:
        kl, same = [], []
        for window in windows.tokens:
            p, q = (log_chances(model, window)[:-1] for model in (dense, pruned))
            kl.append(float((p.exp() * (p - q)).sum(dim=1).mean()))
            same.append(float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean()))
        for estimate, values in ((both.kl, kl), (both.agreement, same)):
            values = torch.tensor(values, dtype=torch.float64)
            assert estimate.mean == pytest.approx(float(values.mean()), rel=1e-6)
            expected = float(values.std()) / math.sqrt(len(values))
            assert estimate.standard_error == pytest.approx(expected, rel=1e-6)


def test_a_model_beside_itself_does_not_differ():
    model = tiny_model("gpt2")
    both = side_by_side(model, model, Windows(tiny_tokens(), "x"))
    assert both.kl.mean == both.nll_increase.mean == 0.0
    assert both.agreement.mean == 1.0


def test_another_vocabulary_is_refused():
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    other.resize_token_embeddings(97, mean_resizing=False)
    with pytest.raises(InvalidInput, match="predict 96 and 97 tokens"):
        side_by_side(model, other, Windows(tiny_tokens(), "x"))
