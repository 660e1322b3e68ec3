"""The dense model beside the pruned one: what its layers would see on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    """Gram matrices with what dense targets need: `Gram.cross` and, if asked for, `Gram.gap`.

    Every forward of the dense block (`dense`) is followed by one of the pruned block on the same
    text (`collecting`). Products are taken and summed as those of the Gram matrices. An expert
    sees other tokens in the two models; it has neither matrix.

    Parameters
    ----------
    layers, ranks
        As of `GramCollector`.
    block
        Theirs, if its stream of hidden states is to be followed for `Gram.gap`.
    """

    def __init__(
        self,
        layers: Sequence[PrunableLayer],
        ranks: Ranks = ALONE,
        block: nn.Module | None = None,
    ) -> None:
        super().__init__(layers, ranks)
        self._block, self._whole = block, 0
        self._wanted: dict[str, list[Tensor]] = {}
        self._added: dict[str, Tensor] = {}
        self._met: dict[int, tuple[str, Tensor]] = {}
        self._now: dict[_Key, _Products] = {}
        self._all: dict[_Key, _Products] = {}
        self._apart: set[str] = set()

    @contextmanager
    def dense(self, tokens: int) -> Iterator[None]:
        """Note the inputs of the next batch, of so many tokens, during a dense forward."""
        self._whole = tokens
        self._wanted.clear()
        self._added.clear()
        # copies, since a model may go on to write into a tensor
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def note(name: str, inputs: Tensor) -> None:
            copy = copies.setdefault(id(inputs), (inputs, inputs.flatten(0, -2).clone()))[1]
            self._wanted.setdefault(name, []).append(copy)

        def note_stream(name: str, _: Tensor, stream: Tensor) -> None:
            self._added[name] = stream.flatten(0, -2).clone()

        with self._hooked(note), self._stream_seen(note_stream):
            yield

    @contextmanager
    def collecting(
        self, windows: slice = slice(None), hidden: Tensor | None = None
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for held in (self._met, self._now, self._wanted, self._added):
                stack.callback(held.clear)
            stack.enter_context(super().collecting(windows, hidden))
            with self._hooked(self._multiply), self._stream_seen(self._multiply_stream):
                yield

    def commit(self) -> None:
        super().commit()
        rounds = self._ranks.gather_objects((set(self._now), self._apart))
        self._apart = set().union(*(apart for _, apart in rounds))
        for layer in self._layers:
            rows, d = layer.weight.shape
            keys: dict[_Key, int] = {(layer.name, "cross"): d, (layer.name, "gap"): rows}
            for key, height in keys.items():
                there = [key in products for products, _ in rounds]
                if not any(there):
                    continue
                none = _Products.none(height, d, layer.weight.device)
                own = self._now.pop(key, none)
                squares, totals = self._ranks.gather(own.square), self._ranks.gather(own.total)
                for counts, square, total in zip(there, squares, totals, strict=True):
                    if counts:
                        _add(self._all, key, _Products(square.double(), total))

    def gram(self, layer: PrunableLayer) -> Gram:
        gram, owner = super().gram(layer), self._owner.get(layer.name, "")
        if gram.tokens == 0:
            return gram
        cross, gap = self._all.get((owner, "cross")), self._all.get((layer.name, "gap"))
        if owner in self._apart or cross is None:
            return replace(gram, note="; ".join(filter(None, [gram.note, _ROUTED])))
        for found in filter(None, (cross, gap)):
            if not bool(torch.isfinite(found.square).all()):
                raise InvalidInput(
                    f"What layer {layer.name} sees in the dense model is NaN, infinite or "
                    "overflows; try another dtype, such as bfloat16 or float32."
                )
        tokens = gram.tokens
        gram = replace(gram, cross=cross.square / tokens, cross_mean=cross.total / tokens)
        if gap is None:
            return gram
        return replace(gram, gap=gap.square / tokens, gap_mean=gap.total / tokens)

    def release(self, layer: PrunableLayer) -> None:
        owner = self._owner.get(layer.name, "")
        super().release(layer)
        self._all.pop((layer.name, "gap"), None)
        if owner not in self._owner.values():
            self._all.pop((owner, "cross"), None)

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

    @contextmanager
    def _stream_seen(self, told: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Be told a layer, its input, and the hidden states that its output is added to."""
        if self._block is None:
            yield
            return
        watch = StreamWatch(told)
        with ExitStack() as stack:
            handle = self._block.register_forward_pre_hook(watch.begin, with_kwargs=True)
            stack.callback(handle.remove)
            for layer in self._layers:
                if layer.fused is None:
                    handle = layer.module.register_forward_hook(watch.layer(layer.name))
                    stack.callback(handle.remove)
            stack.enter_context(watch)
            yield

    def _multiply(self, name: str, inputs: Tensor) -> None:
        if self._met.setdefault(id(inputs), (name, inputs))[0] != name:
            return  # another layer's product is of the same two inputs
        x, wanted = inputs.flatten(0, -2), self._wanted.get(name, [])
        if not wanted or len(x) != self._whole or len(wanted[0]) != self._whole:
            self._apart.add(name)
            return
        _add(self._now, (name, "cross"), _Products.of(wanted.pop(0), x))

    def _multiply_stream(self, name: str, inputs: Tensor, stream: Tensor) -> None:
        dense = self._added.pop(name, None)
        if dense is not None:
            gap = dense.float() - stream.flatten(0, -2).float()
            _add(self._now, (name, "gap"), _Products.of(gap, inputs.flatten(0, -2)))


_Key = tuple[str, Literal["cross", "gap"]]
"""The layer, and which of its matrices."""


@dataclass(frozen=True)
class _Products:
    """``A^T X [., d]`` of two batches of vectors, and the sum of the first, float64."""

    square: Tensor
    total: Tensor

    @classmethod
    def of(cls, a: Tensor, x: Tensor) -> _Products:
        return cls(product(a, x), a.double().sum(dim=0))

    @classmethod
    def none(cls, height: int, width: int, device: torch.device) -> _Products:
        zero = torch.zeros(height, dtype=torch.float64, device=device)
        return cls(torch.zeros(height, width, device=device), zero)


def _add(held: dict[_Key, _Products], key: _Key, more: _Products) -> None:
    if key in held:
        more = _Products(held[key].square + more.square, held[key].total + more.total)
    held[key] = more


class StreamWatch(TorchFunctionMode):
    """Follows a block's stream of hidden states: its input, and sums of the stream and others.

    Tensors are told by their address, so that views are the same; all are kept meanwhile, so that
    an address is not given to another.

    Parameters
    ----------
    told
        Called with a layer, its input, and the stream before the layer's output is added to it.
    """

    def __init__(self, told: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._told = told
        self._size = 0
        self._stream: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[str, Tensor, Tensor]] = {}

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward of the block begins."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self._stream, self._outputs = {hidden.data_ptr(): hidden}, {}
        self._size = hidden.numel()

    def layer(self, name: str) -> Callable[..., None]:
        """A forward hook for a layer."""

        def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[output.data_ptr()] = (name, args[0], output)

        return after

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") not in _SUMS or len(args) != 2:
            return func(*args, **(kwargs or {}))
        pair = [one for one in args if isinstance(one, Tensor)]
        streams = [one for one in pair if self._flows(one)]
        if len(pair) == 2 and pair[0].shape == pair[1].shape and len(streams) == 1 and not kwargs:
            other = pair[1] if streams[0] is pair[0] else pair[0]
            name, inputs, output = self._outputs.get(other.data_ptr(), ("", other, other))
            if name and output.numel() == other.numel():
                self._told(name, inputs, streams[0])
        found = func(*args, **(kwargs or {}))
        if streams and isinstance(found, Tensor):
            self._stream[found.data_ptr()] = found
        return found

    def _flows(self, tensor: Tensor) -> bool:
        # Addresses are asked for last: not every tensor that is added has one.
        return tensor.numel() == self._size and tensor.data_ptr() in self._stream


_SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")
