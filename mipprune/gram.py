"""Gram matrices ``G = X X^T / tokens`` of the inputs of a block's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers import InvalidInput

from .experts import FusedWeight, watched
from .models import PrunableLayer
from .ranks import ALONE, Ranks
from .surrogate import Inputs


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
        Said if the matrix is not that of its tokens alone; empty otherwise.
    cross
        float64 ``[d, d]``, ``E x_dense x^T`` where ``x_dense`` is what the layer would see in the
        dense model; None if that was not collected.
    cross_mean
        float64 ``[d]``, ``E x_dense``; None likewise.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int
    note: str = ""
    cross: Tensor | None = None
    cross_mean: Tensor | None = None

    @property
    def inputs(self) -> Inputs:
        """What masks are judged by."""
        return Inputs(self.matrix, self.mean, self.cross, self.cross_mean)


class GramCollector:
    """Hooks that accumulate Gram matrices, one per distinct input tensor.

    Layers that are given the same tensor (query, key and value; gate and up) share one matrix.
    Products are taken in float32 per batch and summed in float64, in the order of the batches.
    With several processes, each runs its own batches and all sum all products in that same
    order, so that each ends with the matrix that one process alone would have. An expert's matrix
    is that of the tokens routed to it.
    """

    def __init__(self, layers: Sequence[PrunableLayer], ranks: Ranks = ALONE) -> None:
        self._layers, self._ranks = list(layers), ranks
        fused = {layer.fused.name: layer.fused for layer in layers if layer.fused}
        self._fused = list(fused.values())
        self._owner: dict[str, str] = {}
        self._sum: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._complete: set[str] = set()
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._batch: dict[str, _Seen] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Accumulate during one forward of the block; nothing, if the forward fails."""
        with ExitStack() as stack:
            stack.callback(self._seen.clear)
            stack.callback(self._batch.clear)
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
        rounds = self._ranks.gather_objects((self._owner, mine))
        for owners, _ in rounds:
            self._owner.update(owners)
        for layer in self._layers:
            counts = [counts.get(layer.name, 0) for _, counts in rounds]
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
            return Gram(gram, mean, tokens)
        share = tokens / d
        unit = gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
        note = f"saw {tokens} tokens for {d} inputs: its Gram matrix is shrunk towards the identity"
        return Gram(share * gram + (1 - share) * unit, mean, tokens, note)

    def release(self, layer: PrunableLayer) -> None:
        """Free a layer's matrix, unless another layer still waits for it."""
        owner = self._owner.pop(layer.name, None)
        if owner is not None and owner not in self._owner.values():
            del self._sum[owner], self._total[owner]

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
        if owner != name:
            return
        x = inputs.reshape(-1, inputs.shape[-1])
        tokens = int(x.any(dim=1).sum()) if nonzero else len(x)
        seen = _Seen(_square(x), x.double().sum(dim=0), tokens)
        self._batch[name] = self._batch[name] + seen if name in self._batch else seen

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
