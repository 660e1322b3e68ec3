"""Perplexity, and a pruned model beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from solvers import InvalidInput

from .capture import forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .calibration import Windows

_CHUNK = 1 << 23
"""Probabilities held at a time in float64."""


@dataclass(frozen=True)
class Estimate:
    """A mean per predicted token.

    ``standard_error`` is taken over windows, which are nearly independent where tokens are not;
    None for a single window.
    """

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Perplexity:
    """Exponential of the mean negative log-likelihood of the predicted tokens.

    Attributes
    ----------
    perplexity
        Over all predicted tokens.
    predicted_tokens
        How many.
    nll
        Mean negative log-likelihood in nats.
    windows, length
        Of the text; each is one forward.
    stride
        Tokens from one window's start to the next; None if windows do not overlap.
    """

    perplexity: float
    predicted_tokens: int
    nll: Estimate
    windows: int
    length: int
    stride: int | None

    @property
    def method(self) -> str:
        """How it was measured, for people."""
        text = f"{self.windows} windows of {self.length} tokens"
        if self.stride is None:
            return f"{text}, not overlapping"
        context = self.length - self.stride
        return f"{text}, stride {self.stride}: at least {context} tokens before each predicted one"


@dataclass(frozen=True)
class SideBySide:
    """A pruned model against the dense one, on the same predictions.

    Attributes
    ----------
    dense, pruned
        Their perplexities.
    nll_increase
        Of the pruned over the dense model's negative log-likelihood, nats; its error is that of
        paired windows, much smaller than that of either.
    kl
        KL(dense ‖ pruned) of the next token's distribution, nats.
    agreement
        Share of predictions with the same most likely token.
    """

    dense: Perplexity
    pruned: Perplexity
    nll_increase: Estimate
    kl: Estimate
    agreement: Estimate


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Windows, batch_size: int = 8, stride: int | None = None
) -> Perplexity:
    """Perplexity of a model on a text.

    Parameters
    ----------
    model
        In evaluation mode.
    windows
        ``[windows, length]`` token ids.
    batch_size
        Windows per forward; sums are in float64.
    stride
        None: windows do not overlap, and each predicts all its tokens but the first. Otherwise
        the windows, which have to follow one another in the text, are cut anew every ``stride``
        tokens, and each but the first predicts only its last ``stride`` ones.

    Raises
    ------
    InvalidInput
        If the stride is not in 1..length - 1.
    """
    sums, counts = [], []
    for batch, first in _batches(windows, batch_size, stride):
        scored = _scored(batch, first)
        losses = _nll(forward(model, batch), batch)
        sums.append(_per_window(losses, scored))
        counts.append(scored.sum(dim=1))
    return _perplexity(torch.cat(sums), torch.cat(counts), windows, stride)


@torch.no_grad()
def side_by_side(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    windows: Windows,
    batch_size: int = 8,
    stride: int | None = None,
) -> SideBySide:
    """Compare two models' predictions of the same tokens; parameters are those of `perplexity`.

    Raises
    ------
    InvalidInput
        If their vocabularies differ in size, or as `perplexity` does.
    """
    sums: dict[str, list[Tensor]] = {"dense": [], "pruned": [], "kl": [], "agreement": []}
    counts = []
    for batch, first in _batches(windows, batch_size, stride):
        p, q = forward(dense, batch), forward(pruned, batch)
        if p.shape != q.shape:
            raise InvalidInput(
                f"The models predict {p.shape[-1]} and {q.shape[-1]} tokens; "
                "compare a pruned model with the dense one that it was made of."
            )
        q = q.to(p.device)
        scored = _scored(batch, first)
        counts.append(scored.sum(dim=1))
        per_token = {"dense": _nll(p, batch), "pruned": _nll(q, batch)}
        per_token["kl"], per_token["agreement"] = _divergence(p[:, :-1], q[:, :-1])
        for name, values in per_token.items():
            sums[name].append(_per_window(values, scored))
    count = torch.cat(counts)
    total = {name: torch.cat(parts) for name, parts in sums.items()}
    return SideBySide(
        dense=_perplexity(total["dense"], count, windows, stride),
        pruned=_perplexity(total["pruned"], count, windows, stride),
        nll_increase=_estimate(total["pruned"] - total["dense"], count),
        kl=_estimate(total["kl"], count),
        agreement=_estimate(total["agreement"], count),
    )


def _batches(
    windows: Windows, batch_size: int, stride: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids ``[batch, length]``, and the first position ``[batch]`` that each predicts."""
    tokens = windows.tokens
    first = torch.ones(len(tokens), dtype=torch.long)
    if stride is not None:
        length = tokens.shape[1]
        if not 1 <= stride < length:
            raise InvalidInput(
                f"Stride {stride} is outside 1..{length - 1}; windows have {length} tokens."
            )
        tokens = tokens.flatten().unfold(0, length, stride)
        first = torch.full((len(tokens),), length - stride)
        first[0] = 1
    yield from zip(torch.split(tokens, batch_size), torch.split(first, batch_size), strict=True)


def _scored(batch: Tensor, first: Tensor) -> Tensor:
    """Which of the positions 1.. count, bool ``[batch, length - 1]``."""
    return torch.arange(1, batch.shape[1]) >= first[:, None]


def _nll(logits: Tensor, batch: Tensor) -> Tensor:
    """Negative log-likelihoods ``[batch, length - 1]`` of all tokens but the first."""
    predictions = logits[:, :-1].float()
    targets = batch[:, 1:].to(logits.device)
    losses = cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def _divergence(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and whether the largest entries agree, both ``[batch, positions]``, of logits."""
    vocabulary = p.shape[-1]
    kl, same = [], []
    rows = max(1, _CHUNK // vocabulary)
    parts = (torch.split(logits.reshape(-1, vocabulary), rows) for logits in (p, q))
    for dense, pruned in zip(*parts, strict=True):
        log_p = dense.double().log_softmax(dim=-1)
        log_q = pruned.double().log_softmax(dim=-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        same.append(dense.argmax(dim=-1) == pruned.argmax(dim=-1))
    return torch.cat(kl).view(p.shape[:-1]), torch.cat(same).view(p.shape[:-1])


def _per_window(values: Tensor, scored: Tensor) -> Tensor:
    """Sums over the scored positions, float64 ``[windows]``, on the CPU."""
    return (values.double() * scored.to(values.device)).sum(dim=1).cpu()


def _perplexity(total: Tensor, count: Tensor, windows: Windows, stride: int | None) -> Perplexity:
    nll = _estimate(total, count)
    return Perplexity(
        perplexity=math.exp(nll.mean),
        predicted_tokens=int(count.sum()),
        nll=nll,
        windows=len(count),
        length=windows.tokens.shape[1],
        stride=stride,
    )


def _estimate(total: Tensor, count: Tensor) -> Estimate:
    """Mean per token, and its error as that of a ratio of window sums."""
    n, tokens = len(total), float(count.sum())
    mean = float(total.sum()) / tokens
    if n == 1:
        return Estimate(mean, None)
    residual = total - mean * count
    return Estimate(mean, math.sqrt(n / (n - 1) * float(residual.square().sum())) / tokens)
