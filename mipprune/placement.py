"""Where a model's weights are: all on the device, or one block at a time.

The run asks for one block, works on it, says whether it changed, and lets it go. Whatever lies
outside the blocks (embeddings, final norm, head) is asked for likewise while inputs are captured.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .activations import side_stream
from .folder import ModelFolder
from .models import find_blocks

OUTSIDE = -1
"""Stands for the weights outside all blocks where a block's number is asked for."""


class Placement:
    """A model that is on its device as a whole, and changed in place.

    Parameters
    ----------
    model
        In evaluation mode.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    """

    def __init__(self, model: nn.Module, blocks: str | None = None) -> None:
        self.model = model
        self.blocks_name, self.blocks = find_blocks(model, blocks)

    @property
    def device(self) -> torch.device:
        """Where blocks are run."""
        return next(self.model.parameters()).device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block ``index`` on the device, or what is `OUTSIDE` the blocks."""
        yield self.model if index == OUTSIDE else self.blocks[index]

    def keep(self, index: int) -> None:
        """Make the changes to block ``index`` permanent, while it is on the device."""

    def settle(self) -> None:
        """Wait until no other block is on its way to the device, so that none disturbs a timing."""

    @torch.no_grad()
    def reorder(self, name: str, dim: int, index: Tensor) -> None:
        """Put entries ``index`` of a parameter's dimension in their places, between blocks."""
        parameter = self.model.get_parameter(name)
        parameter.copy_(parameter.index_select(dim, index.to(parameter.device)))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """While this lasts, the model may be run as a whole; blocks come and go as they run."""
        yield


class _Streamed(Placement, ABC):
    """A model of which one block at a time is on the device."""

    def __init__(self, model: nn.Module, device: torch.device, blocks: str | None = None) -> None:
        super().__init__(model, blocks)
        self._device = device
        self._slots = _slots(model)
        prefixes = [f"{self.blocks_name}.{index}." for index in range(len(self.blocks))]
        self._names: dict[int, list[str]] = {OUTSIDE: []}
        self._names.update({index: [] for index in range(len(self.blocks))})
        for name in self._slots:
            of = [index for index, prefix in enumerate(prefixes) if name.startswith(prefix)]
            self._names[of[0] if of else OUTSIDE].append(name)
        self._uses = dict.fromkeys(self._names, 0)
        for name, buffer in model.named_buffers():
            _set(model, name, buffer.to(device))
        self._coming: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._side = side_stream(device)

    @abstractmethod
    def _fetch(self, name: str) -> Tensor:
        """A weight on the device."""

    @abstractmethod
    def _resting(self, name: str) -> Tensor:
        """What stands in the model for a weight that is not on the device."""

    @property
    def device(self) -> torch.device:
        return self._device

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        self._load(index)
        try:
            yield self.model if index == OUTSIDE else self.blocks[index]
        finally:
            self._drop(index)

    @contextmanager
    def forward(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.block(OUTSIDE))
            for index, block in enumerate(self.blocks):
                before = block.register_forward_pre_hook(
                    lambda *_, index=index: self._load(index), prepend=True
                )
                after = block.register_forward_hook(
                    lambda *_, index=index: self._drop(index), always_call=True
                )
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def settle(self) -> None:
        if self._coming is not None:
            wait([self._coming[1]])

    def _load(self, index: int) -> None:
        self._uses[index] += 1
        if self._uses[index] > 1:
            return
        for name, tensor in self._arrived(index).items():
            self._put(name, tensor)
        if self._reader is not None and 0 <= index < len(self.blocks) - 1:
            self._coming = (index + 1, self._reader.submit(self._fetch_all, index + 1))

    def _drop(self, index: int) -> None:
        self._uses[index] -= 1
        if self._uses[index] > 0:
            return
        for name in self._names[index]:
            self._put(name, self._resting(name))

    def _put(self, name: str, tensor: Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, attribute in self._slots[name]:
            module._parameters[attribute] = parameter

    def _arrived(self, index: int) -> Mapping[str, Tensor]:
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != index:
            return self._fetch_all(index)
        tensors = coming[1].result()
        for tensor in tensors.values():
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensors

    def _fetch_all(self, index: int) -> dict[str, Tensor]:
        if self._side is None:
            return {name: self._fetch(name) for name in self._names[index]}
        with torch.cuda.stream(self._side):
            tensors = {name: self._fetch(name) for name in self._names[index]}
        self._side.synchronize()
        return tensors


class FromHost(_Streamed):
    """A model in host memory (pinned, if the device is a GPU), whose blocks visit the device.

    Between blocks it is an ordinary model in host memory.
    """

    def __init__(self, model: nn.Module, device: torch.device, blocks: str | None = None) -> None:
        super().__init__(model, device, blocks)
        self._host: dict[str, Tensor] = {}
        for name, ((module, attribute), *_) in self._slots.items():
            tensor = module._parameters[attribute].data  # type: ignore[union-attr]
            self._host[name] = tensor.pin_memory() if device.type == "cuda" else tensor
            self._put(name, self._host[name])

    def keep(self, index: int) -> None:
        for name in self._names[index]:
            module, attribute = self._slots[name][0]
            self._host[name].copy_(module._parameters[attribute])  # type: ignore[arg-type]

    def _fetch(self, name: str) -> Tensor:
        return self._host[name].to(self._device, non_blocking=True, copy=True)

    def _resting(self, name: str) -> Tensor:
        return self._host[name]


class FromFolder(_Streamed):
    """A model whose weights are read from its folder, block by block, and never all held.

    Parameters
    ----------
    model
        With parameters on the meta device.
    folder
        The stored weights, by the model's own names.
    device
        Where blocks are run.
    dtype
        That they are computed in.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    sink
        Given a block's number and its weights, in the stored types, when it is finished.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: ModelFolder,
        device: torch.device,
        dtype: torch.dtype,
        blocks: str | None = None,
        sink: Callable[[int, dict[str, Tensor]], None] | None = None,
    ) -> None:
        super().__init__(model, device, blocks)
        self.folder, self._dtype, self.sink = folder, dtype, sink
        self._moved: dict[str, list[tuple[int, Tensor]]] = {}
        # Those in the state are no function of the configuration, though few models store any.
        own = model.state_dict(keep_vars=True)
        self._stored_buffers = [name for name in own if not isinstance(own[name], nn.Parameter)]
        for name in set(self._stored_buffers).intersection(folder.names):
            _set(model, name, folder.read(name).to(device, own[name].dtype))

    def keep(self, index: int) -> None:
        if self.sink is not None:
            self.sink(index, self.stored(index))

    def _drop(self, index: int) -> None:
        super()._drop(index)
        return_free_memory()

    def stored(self, index: int) -> dict[str, Tensor]:
        """A block's weights as they are on the device now, in host memory and the stored types.

        Buffers that are stored are with what is `OUTSIDE`.
        """
        tensors = {}
        for name in self._names[index]:
            module, attribute = self._slots[name][0]
            now: Any = module._parameters[attribute]
            tensors[name] = now.data.to("cpu", self.folder.dtype(name))
        if index == OUTSIDE:
            buffers = self.model.state_dict()
            tensors.update({name: buffers[name].cpu() for name in self._stored_buffers})
        return tensors

    def reorder(self, name: str, dim: int, index: Tensor) -> None:
        self._moved.setdefault(name, []).append((dim, index))

    def _fetch(self, name: str) -> Tensor:
        stored = self.folder.read(name)
        for dim, index in self._moved.get(name, []):
            stored = stored.index_select(dim, index)
        return stored.to(self._device, self._dtype)

    def _resting(self, name: str) -> Tensor:
        module, attribute = self._slots[name][0]
        shape = module._parameters[attribute].shape  # type: ignore[union-attr]
        return torch.empty(shape, dtype=self._dtype, device="meta")


def return_free_memory() -> None:
    """Give what was freed back to the operating system, where the C library can be told to."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _slots(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every parameter by its (first) name, with all modules that hold it."""
    first: dict[int, str] = {}
    slots: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                own = f"{path}.{attribute}" if path else attribute
                name = first.setdefault(id(parameter), own)
                slots.setdefault(name, []).append((module, attribute))
    return slots


def _set(model: nn.Module, name: str, buffer: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._buffers[attribute] = buffer
