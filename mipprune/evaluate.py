"""Perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from .capture import forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .calibration import Windows


@dataclass(frozen=True)
class Perplexity:
    """Exponential of the mean negative log-likelihood (nats) of the predicted tokens."""

    perplexity: float
    predicted_tokens: int


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Windows, batch_size: int = 8) -> Perplexity:
    """Perplexity over windows that do not overlap; each predicts all its tokens but the first.

    Parameters
    ----------
    model
        In evaluation mode.
    windows
        ``[windows, length]`` token ids.
    batch_size
        Windows per forward; the result is summed in float64.
    """
    total, count = 0.0, 0
    for batch in torch.split(windows.tokens, batch_size):
        logits = forward(model, batch)[:, :-1].float()
        targets = batch[:, 1:].to(logits.device)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += float(losses.double().sum())
        count += targets.numel()
    return Perplexity(math.exp(total / count), count)
