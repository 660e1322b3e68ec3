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
    """

    matrix: Tensor
    mean: Tensor
    tokens: int
    note: str = ""


class GramCollector:
    """Hooks that accumulate Gram matrices, one per distinct input tensor.

    Layers that are given the same tensor (query, key and value; gate and up) share one matrix.
    Products are taken in float32 per batch and summed in float64; a constant input of 1 besides
    makes the last row the sum of the inputs. An expert's matrix is that of the tokens routed to
    it.
    """

    def __init__(self, layers: Sequence[PrunableLayer]) -> None:
        self._layers = [layer for layer in layers if layer.fused is None]
        fused = {layer.fused.name: layer.fused for layer in layers if layer.fused}
        self._fused = list(fused.values())
        self._owner: dict[str, str] = {}
        self._sum: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Accumulate during one forward of the block."""
        with ExitStack() as stack:
            stack.callback(self._seen.clear)
            for layer in self._layers:
                hook = layer.module.register_forward_pre_hook(self._hook(layer.name))
                stack.callback(hook.remove)
            stack.enter_context(watched(self._fused, self._routed))
            yield

    def gram(self, layer: PrunableLayer) -> Gram:
        """The matrix of a layer.

        A layer that saw only a part of the block's tokens (an expert), and fewer than it has
        inputs d, has a singular matrix of few samples, which is shrunk towards the identity: with
        n tokens, ``(n/d) G + (1 - n/d) (tr G / d) I``. That is magnitude pruning for n = 0.

        Raises
        ------
        InvalidInput
            If an activation was NaN or infinite, or overflowed.
        """
        tokens = self._tokens.get(self._owner.get(layer.name, ""), 0)
        d = layer.weight.shape[1]
        if tokens == 0:
            zeros = torch.zeros(d, d, dtype=torch.float64, device=layer.weight.device)
            return Gram(zeros, zeros[0], 0)
        total = self._sum[self._owner[layer.name]]
        if not bool(torch.isfinite(total).all()):
            raise InvalidInput(
                f"The inputs of layer {layer.name} are NaN, infinite or overflow; "
                "try another dtype, such as bfloat16 or float32."
            )
        gram, mean = total[:-1, :-1] / tokens, total[-1, :-1] / tokens
        if tokens >= min(d, max(self._tokens.values())):
            return Gram(gram, mean, tokens)
        share = tokens / d
        unit = gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
        note = f"saw {tokens} tokens for {d} inputs: its Gram matrix is shrunk towards the identity"
        return Gram(share * gram + (1 - share) * unit, mean, tokens, note)

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
        if owner == name:
            self._add(name, inputs, nonzero)

    def _add(self, name: str, inputs: Tensor, nonzero: bool) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        tokens = int(x.any(dim=1).sum()) if nonzero else len(x)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        product = (x.T @ x).double()
        if name in self._sum:
            self._sum[name] += product
        else:
            self._sum[name] = product
        self._tokens[name] = self._tokens.get(name, 0) + tokens
