"""The dense model beside the pruned one: what its layers would see on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from solvers import InvalidInput

from .activations import Activations
from .gram import Gram, GramCollector, product
from .models import PrunableLayer
from .ranks import ALONE, Ranks

_ROUTED = "is given tokens by a router: its targets are its own outputs, not the dense model's"


class DenseSide:
    """Hidden states of the dense model, and the weights of the block at work before its changes.

    Parameters
    ----------
    activations
        Inputs of the first block, of a model that is still dense.
    """

    def __init__(self, activations: Activations) -> None:
        self.activations = activations
        self._weights: dict[int, tuple[torch.nn.Parameter, Tensor]] = {}

    def keep(self, layer: PrunableLayer) -> None:
        """Remember a layer as it is, before it is changed for the first time."""
        for parameter in layer.parameters:
            if id(parameter) not in self._weights:
                self._weights[id(parameter)] = (parameter, parameter.data.clone())

    @contextmanager
    def block(self) -> Iterator[None]:
        """While this lasts, the block at work has its dense weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def leave(self) -> None:
        """Forget the block's weights; another one comes."""
        self._weights.clear()

    def _exchange(self) -> None:
        for key, (parameter, other) in self._weights.items():
            self._weights[key] = (parameter, parameter.data)
            parameter.data = other


class TargetCollector(GramCollector):
    """Gram matrices with `Gram.cross`, ``E x_dense x^T``, of layers that see all tokens.

    Every forward of the dense block (`dense`) is followed by one of the pruned block on the same
    text (`collecting`). Products are taken and summed as those of the Gram matrices. An expert
    sees other tokens in the two models; it has no such matrix.
    """

    def __init__(self, layers: Sequence[PrunableLayer], ranks: Ranks = ALONE) -> None:
        super().__init__(layers, ranks)
        self._whole = 0
        self._wanted: dict[str, list[Tensor]] = {}
        self._met: dict[int, tuple[str, Tensor]] = {}
        self._now: dict[str, _Products] = {}
        self._all: dict[str, _Products] = {}
        self._apart: set[str] = set()

    @contextmanager
    def dense(self, tokens: int) -> Iterator[None]:
        """Note the inputs of the next batch, of so many tokens, during a dense forward."""
        self._whole = tokens
        self._wanted.clear()
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def note(name: str, inputs: Tensor) -> None:
            # a copy, since a model may go on to write into the tensor
            copy = copies.setdefault(id(inputs), (inputs, inputs.flatten(0, -2).clone()))[1]
            self._wanted.setdefault(name, []).append(copy)

        with self._hooked(note):
            yield

    @contextmanager
    def collecting(
        self, windows: slice = slice(None), hidden: Tensor | None = None
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for held in (self._met, self._now, self._wanted):
                stack.callback(held.clear)
            stack.enter_context(self._hooked(self._multiply))
            stack.enter_context(super().collecting(windows, hidden))
            yield

    def commit(self) -> None:
        super().commit()
        rounds = self._ranks.gather_objects((set(self._now), self._apart))
        self._apart = set().union(*(apart for _, apart in rounds))
        for layer in self._layers:
            there = [layer.name in products for products, _ in rounds]
            if any(there):
                own = self._now.pop(layer.name, None) or _Products.none(layer)
                crosses, totals = self._ranks.gather(own.cross), self._ranks.gather(own.total)
                for counts, cross, total in zip(there, crosses, totals, strict=True):
                    if counts:
                        _add(self._all, layer.name, _Products(cross.double(), total))

    def gram(self, layer: PrunableLayer) -> Gram:
        gram, owner = super().gram(layer), self._owner.get(layer.name, "")
        if gram.tokens == 0:
            return gram
        if owner in self._apart or owner not in self._all:
            return replace(gram, note="; ".join(filter(None, [gram.note, _ROUTED])))
        found = self._all[owner]
        if not bool(torch.isfinite(found.cross).all()):
            raise InvalidInput(
                f"The dense inputs of layer {layer.name} are NaN, infinite or overflow; "
                "try another dtype, such as bfloat16 or float32."
            )
        tokens = gram.tokens
        return replace(gram, cross=found.cross / tokens, cross_mean=found.total / tokens)

    def release(self, layer: PrunableLayer) -> None:
        owner = self._owner.get(layer.name, "")
        super().release(layer)
        if owner not in self._owner.values():
            self._all.pop(owner, None)

    @contextmanager
    def _hooked(self, told: Callable[[str, Tensor], None]) -> Iterator[None]:
        def hook(name: str) -> Any:
            return lambda _, args: told(name, args[0])

        with ExitStack() as stack:
            for layer in self._layers:
                if layer.fused is None:
                    handle = layer.module.register_forward_pre_hook(hook(layer.name))
                    stack.callback(handle.remove)
            yield

    def _multiply(self, name: str, inputs: Tensor) -> None:
        if self._met.setdefault(id(inputs), (name, inputs))[0] != name:
            return  # another layer's product is of the same two inputs
        x, wanted = inputs.flatten(0, -2), self._wanted.get(name, [])
        if not wanted or len(x) != self._whole or len(wanted[0]) != self._whole:
            self._apart.add(name)
            return
        dense = wanted.pop(0)
        _add(self._now, name, _Products(product(dense, x), dense.double().sum(dim=0)))


@dataclass(frozen=True)
class _Products:
    """``X_dense X^T [d, d]``, and the sum of the dense inputs, float64 ``[d]``."""

    cross: Tensor
    total: Tensor

    @classmethod
    def none(cls, layer: PrunableLayer) -> _Products:
        d, device = layer.weight.shape[1], layer.weight.device
        zero = torch.zeros(d, dtype=torch.float64, device=device)
        return cls(torch.zeros(d, d, device=device), zero)


def _add(sums: dict[str, _Products], name: str, more: _Products) -> None:
    if name in sums:
        more = _Products(sums[name].cross + more.cross, sums[name].total + more.total)
    sums[name] = more
