"""Gram matrices ``G = X X^T / tokens`` of the inputs of a block's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .models import PrunableLayer


@dataclass(frozen=True)
class Gram:
    """The inputs that a layer saw.

    Attributes
    ----------
    matrix
        float64 ``[d, d]``, ``X X^T / tokens``; zero if it saw no token.
    tokens
        How many.
    """

    matrix: Tensor
    tokens: int


class GramCollector:
    """Hooks that accumulate Gram matrices, one per distinct input tensor.

    Layers that are given the same tensor (query, key and value; gate and up) share one matrix.
    Products are taken in float32 per batch and summed in float64.
    """

    def __init__(self, layers: Sequence[PrunableLayer]) -> None:
        self._layers = list(layers)
        self._owner: dict[str, str] = {}
        self._sum: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Accumulate during one forward of the block."""
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer.name)) for layer in self._layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def gram(self, layer: PrunableLayer) -> Gram:
        """The matrix of a layer.

        Raises
        ------
        InvalidInput
            If an activation was NaN or infinite, or overflowed.
        """
        owner = self._owner.get(layer.name)
        if owner is None:
            d = layer.weight.shape[1]
            return Gram(torch.zeros(d, d, dtype=torch.float64, device=layer.weight.device), 0)
        total = self._sum[owner]
        if not bool(torch.isfinite(total).all()):
            raise InvalidInput(
                f"The inputs of layer {layer.name} are NaN, infinite or overflow; "
                "try another dtype, such as bfloat16 or float32."
            )
        return Gram(total / self._tokens[owner], self._tokens[owner])

    def _hook(self, name: str) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0]
            # The tensor is kept with its id, so that the id is not given to another meanwhile.
            owner = self._seen.setdefault(id(inputs), (name, inputs))[0]
            if self._owner.setdefault(name, owner) != owner:
                raise InvalidInput(
                    f"Layer {name} shares its input with different layers from batch to batch."
                )
            if owner == name:
                self._add(name, inputs)

        return before

    def _add(self, name: str, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        product = (x.T @ x).double()
        if name in self._sum:
            self._sum[name] += product
        else:
            self._sum[name] = product
        self._tokens[name] = self._tokens.get(name, 0) + len(x)
