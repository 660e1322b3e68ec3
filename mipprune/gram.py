"""Gram matrices ``G = X X^T / tokens`` of the inputs of a block's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers import InvalidInput

from .experts import FusedWeight, watched
from .models import PrunableLayer
from .ranks import ALONE, Ranks
from .surrogate import Inputs, TokenWeighted

WeightOf = Callable[[str], Tensor | None]
"""By a layer's name: what each token of a batch counts, float32 ``[groups, tokens]``; or None."""


class TokenWeights(Protocol):
    """What tokens count, in each of several groups of a layer's rows."""

    @property
    def shared(self) -> bool:
        """Whether it is the same for layers with one input."""

    def of_batch(self, windows: slice, hidden: Tensor) -> WeightOf:
        """Weights of a batch's tokens.

        Parameters
        ----------
        windows
            The batch's place among this process's windows.
        hidden
            Residual stream at the block's input, ``[windows, length, d]``.
        """


@dataclass(frozen=True)
class Gram:
    """The inputs that a layer saw.

    Attributes
    ----------
    matrix
        float64 ``[d, d]``, ``X X^T / tokens``; zero if it saw no token.
    mean
        float64 ``[d]``, of the inputs; zero if it saw no token.
    tokens
        How many.
    note
        Said if a matrix is not that of its tokens alone; empty otherwise.
    cross
        float64 ``[d, d]``, ``E x_dense x^T`` where ``x_dense`` is what the layer would see in the
        dense model; None if that was not collected.
    cross_mean
        float64 ``[d]``, ``E x_dense``; None likewise.
    weighted
        The same with token weights; None if there are none.
    gap, gap_mean
        float64 ``[rows, d]`` and ``[rows]``, ``E (r_dense - r) x^T`` and ``E (r_dense - r)`` where
        the layer's output is added to the stream ``r`` of hidden states; None if not, or likewise.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int
    note: str = ""
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    weighted: TokenWeighted | None = None
    gap: Tensor | None = None
    gap_mean: Tensor | None = None

    @property
    def inputs(self) -> Inputs:
        """What masks are judged by."""
        return Inputs(
            self.matrix,
            self.mean,
            self.cross,
            self.cross_mean,
            self.weighted,
            self.gap,
            self.gap_mean,
        )


class GramCollector:
    """Hooks that accumulate Gram matrices, one per distinct input tensor.

    Layers that are given the same tensor (query, key and value; gate and up) share one matrix.
    Products are taken in float32 per batch and summed in float64, in the order of the batches.
    With several processes, each runs its own batches and all sum all products in that same
    order, so that each ends with the matrix that one process alone would have. An expert's matrix
    is that of the tokens routed to it.

    Matrices in which tokens count by their weights are summed likewise, beside the plain ones.
    """

    def __init__(
        self,
        layers: Sequence[PrunableLayer],
        ranks: Ranks = ALONE,
        weights: TokenWeights | None = None,
    ) -> None:
        self._layers, self._ranks, self._weights = list(layers), ranks, weights
        fused = {layer.fused.name: layer.fused for layer in layers if layer.fused}
        self._fused = list(fused.values())
        self._owner: dict[str, str] = {}
        self._sum: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._complete: set[str] = set()
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._batch: dict[str, _Seen] = {}
        self._weight_of: WeightOf | None = None
        self._weighted: dict[str, _Weighted] = {}
        self._weighted_batch: dict[str, _Weighted] = {}

    @contextmanager
    def collecting(
        self, windows: slice = slice(None), hidden: Tensor | None = None
    ) -> Iterator[None]:
        """Accumulate during one forward of the block; nothing, if the forward fails.

        Token weights ask for what is run, see `TokenWeights.of_batch`.
        """
        with ExitStack() as stack:
            stack.callback(self._seen.clear)
            stack.callback(self._batch.clear)
            stack.callback(self._weighted_batch.clear)
            if self._weights is not None:
                assert hidden is not None, "token weights are of tokens at a place"
                self._weight_of = self._weights.of_batch(windows, hidden)
            for layer in self._layers:
                if layer.fused is None:
                    hook = layer.module.register_forward_pre_hook(self._hook(layer.name))
                    stack.callback(hook.remove)
            stack.enter_context(watched(self._fused, self._routed))
            yield
            self._seen.clear()
            self.commit()

    def commit(self) -> None:
        """Add what the current forward of every process gave, in the order of the processes."""
        mine = {name: seen.tokens for name, seen in self._batch.items()}
        rounds = self._ranks.gather_objects((self._owner, mine, self._groups()))
        for owners, _, _ in rounds:
            self._owner.update(owners)
        for layer in self._layers:
            counts = [counts.get(layer.name, 0) for _, counts, _ in rounds]
            groups = max(groups.get(layer.name, 0) for _, _, groups in rounds)
            if groups:
                self._add_weighted(layer, groups)
            if any(counts):
                own = self._taken(layer)
                squares = self._ranks.gather(own.square)
                totals = self._ranks.gather(own.total)
                for seen in map(_Seen, squares, totals, counts):
                    self._add(layer.name, seen)

    @property
    def owners(self) -> dict[str, str]:
        """By layer that saw tokens: the first layer with the same input."""
        return dict(self._owner)

    def gram(self, layer: PrunableLayer) -> Gram:
        """The matrix of a layer, when all batches have been run.

        A layer that saw only a part of the block's tokens (an expert), and fewer than it has
        inputs d, has a singular matrix of few samples, which is shrunk towards the identity: with
        n tokens, ``(n/d) G + (1 - n/d) (tr G / d) I``. That is magnitude pruning for n = 0.

        Raises
        ------
        InvalidInput
            If an activation was NaN or infinite, or overflowed.
        """
        owner = self._owner.get(layer.name, "")
        tokens = self._tokens.get(owner, 0)
        d = layer.weight.shape[1]
        if tokens == 0:
            zeros = torch.zeros(d, d, dtype=torch.float64, device=layer.weight.device)
            return Gram(zeros, zeros[0], 0)
        gram = self._sum[owner]
        if not bool(torch.isfinite(gram).all()):
            raise InvalidInput(
                f"The inputs of layer {layer.name} are NaN, infinite or overflow; "
                "try another dtype, such as bfloat16 or float32."
            )
        if owner not in self._complete:
            gram /= tokens
            self._total[owner] /= tokens
            self._complete.add(owner)
        mean = self._total[owner]
        if tokens >= min(d, max(self._tokens.values())):
            weighted, note = self._token_weighted(layer, gram, mean)
            return Gram(gram, mean, tokens, note, weighted=weighted)
        share = tokens / d
        unit = gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
        note = f"saw {tokens} tokens for {d} inputs: its Gram matrix is shrunk towards the identity"
        return Gram(share * gram + (1 - share) * unit, mean, tokens, note)

    def release(self, layer: PrunableLayer) -> None:
        """Free a layer's matrix, unless another layer still waits for it."""
        owner = self._owner.pop(layer.name, None)
        if owner is not None and owner not in self._owner.values():
            del self._sum[owner], self._total[owner]
            self._weighted.pop(owner, None)
        if self._weights is not None and not self._weights.shared:
            self._weighted.pop(layer.name, None)

    def _hook(self, name: str) -> Any:
        return lambda _, args: self._observe(name, args[0])

    def _routed(self, fused: FusedWeight, expert: int, inputs: Tensor) -> None:
        # Some models give every expert all tokens, with zeros for those routed elsewhere.
        self._observe(f"{fused.name}[{expert}]", inputs, nonzero=True)

    def _observe(self, name: str, inputs: Tensor, nonzero: bool = False) -> None:
        # The tensor is kept with its id, so that the id is not given to another meanwhile.
        owner = self._seen.setdefault(id(inputs), (name, inputs))[0]
        if self._owner.setdefault(name, owner) != owner:
            raise InvalidInput(
                f"Layer {name} shares its input with different layers from batch to batch."
            )
        x = inputs.reshape(-1, inputs.shape[-1])
        self._observe_weighted(name, owner, x)
        if owner != name:
            return
        tokens = int(x.any(dim=1).sum()) if nonzero else len(x)
        seen = _Seen(_square(x), x.double().sum(dim=0), tokens)
        self._batch[name] = self._batch[name] + seen if name in self._batch else seen

    def _observe_weighted(self, name: str, owner: str, x: Tensor) -> None:
        if self._weights is None or (self._weights.shared and name != owner):
            return
        assert self._weight_of is not None, "token weights are known while inputs are collected"
        weights = self._weight_of(name)
        if weights is None:
            return
        if weights.shape[1] != len(x) or name in self._weighted_batch:
            raise InvalidInput(
                f"Layer {name} does not see every token once, as an expert's do not; token weights "
                "are for layers that do. Leave such layers dense (--ignore), or give --tokens "
                "equal."
            )
        self._weighted_batch[name] = _Weighted.of(x, weights)

    def _groups(self) -> dict[str, int]:
        """By layer, of the current forward: groups of rows with token weights."""
        return {name: len(seen.weight) for name, seen in self._weighted_batch.items()}

    def _add_weighted(self, layer: PrunableLayer, groups: int) -> None:
        name, device = layer.name, layer.weight.device
        own = self._weighted_batch.pop(name, None)
        if own is None:
            own = _Weighted.zero(groups, layer.weight.shape[1], device)
        squares = self._ranks.gather(own.square)
        totals = self._ranks.gather(own.total)
        for seen in map(_Weighted, squares, totals, self._ranks.gather(own.weight)):
            if name in self._weighted:
                self._weighted[name].add(seen)
            else:
                self._weighted[name] = _Weighted(seen.square.double(), seen.total, seen.weight)

    def _token_weighted(
        self, layer: PrunableLayer, gram: Tensor, mean: Tensor
    ) -> tuple[TokenWeighted | None, str]:
        """A layer's weighted statistics, and a note if a group of rows has no weights."""
        if self._weights is None:
            return None, ""
        seen = self._weighted.get(self._owner[layer.name] if self._weights.shared else layer.name)
        if seen is None:
            return None, ""
        if not bool(torch.isfinite(seen.square).all() and torch.isfinite(seen.weight).all()):
            raise InvalidInput(
                f"The token weights of layer {layer.name} overflow; try another dtype, such as "
                "bfloat16 or float32."
            )
        none = seen.weight == 0
        weight = seen.weight.masked_fill(none, 1.0)
        matrices, means = seen.square / weight[:, None, None], seen.total / weight[:, None]
        matrices[none], means[none] = gram, mean
        note = ""
        if bool(none.any()):
            note = (
                f"has no token weights in {int(none.sum())} of {len(none)} groups of rows: all "
                "tokens count the same there"
            )
        return TokenWeighted(matrices, means), note

    def _taken(self, layer: PrunableLayer) -> _Seen:
        if layer.name in self._batch:
            return self._batch.pop(layer.name)
        d, device = layer.weight.shape[1], layer.weight.device
        total = torch.zeros(d, dtype=torch.float64, device=device)
        return _Seen(torch.zeros(d, d, device=device), total, 0)

    def _add(self, name: str, seen: _Seen) -> None:
        if seen.tokens and name in self._sum:
            self._sum[name] += seen.square
            self._total[name] += seen.total
        elif seen.tokens:
            self._sum[name], self._total[name] = seen.square.double(), seen.total
        self._tokens[name] = self._tokens.get(name, 0) + seen.tokens


@dataclass(frozen=True)
class _Seen:
    """Inputs of one forward: ``X X^T`` in float32, their sum in float64, and how many."""

    square: Tensor
    total: Tensor
    tokens: int

    def __add__(self, other: _Seen) -> _Seen:
        return _Seen(
            self.square + other.square, self.total + other.total, self.tokens + other.tokens
        )


@dataclass(frozen=True)
class _Weighted:
    """Inputs with token weights ``f``, by group of rows.

    ``sum f x x^T`` (of one forward float32, of all float64), and in float64 ``sum f x`` and
    ``sum f``.
    """

    square: Tensor
    total: Tensor
    weight: Tensor

    @classmethod
    def of(cls, x: Tensor, weights: Tensor) -> _Weighted:
        """Of inputs ``[tokens, d]`` with weights ``[groups, tokens]``."""
        scaled = (x.float() * root[:, None] for root in weights.sqrt())
        square = torch.stack([_square(one) for one in scaled])
        return cls(square, weights.double() @ x.double(), weights.double().sum(dim=1))

    @classmethod
    def zero(cls, groups: int, d: int, device: torch.device) -> _Weighted:
        """Of no inputs."""
        none = torch.zeros(groups, d, dtype=torch.float64, device=device)
        return cls(torch.zeros(groups, d, d, device=device), none, none.sum(dim=1))

    def add(self, other: _Weighted) -> None:
        """Add another's sums."""
        for mine, its in (
            (self.square, other.square), (self.total, other.total), (self.weight, other.weight)
        ):  # fmt: skip
            mine.add_(its)


def _square(x: Tensor) -> Tensor:
    """``X^T X`` of inputs ``[tokens, d]``, see `product`."""
    return product(x, x)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``A^T B`` of inputs ``[tokens, d]``, accumulated in float32 ``[d, d]``.

    Products of half-precision numbers are exact in float32, so a GPU may take them on its tensor
    cores at no loss.
    """
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.float().T @ b.float()
