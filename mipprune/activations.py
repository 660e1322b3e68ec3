"""Hidden states of all batches between two blocks, kept off the device while they wait."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


class Activations:
    """A list of hidden states, one tensor per batch.

    They wait in host memory (pinned, if the device is a GPU) up to a bound, and beyond it in
    files without a name, which vanish with the process. With a GPU, the next batch is on its way
    while one is worked on.

    Parameters
    ----------
    device
        Where they are used.
    limit
        Most bytes in host memory.
    folder
        For the files.
    """

    def __init__(self, device: torch.device, limit: float, folder: Path | None = None) -> None:
        self._device, self._limit, self._folder = device, limit, folder
        self._waiting: list[_InMemory | _OnDisk] = []
        self._coming: tuple[int, Tensor] | None = None
        self._side = side_stream(device)

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, hidden: Tensor) -> None:
        """Add a batch at the end."""
        size = hidden.nbytes
        if self.bytes_in_memory + size <= self._limit:
            self._waiting.append(_InMemory(hidden, pinned=self._side is not None))
        else:
            self._waiting.append(_OnDisk(hidden, self._folder))

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._waiting[batch].write(hidden)

    def __getitem__(self, batch: int) -> Tensor:
        """A batch on the device."""
        hidden = self._arrived(batch)
        if self._side is not None and batch + 1 < len(self):
            self._fetch(batch + 1)
        return hidden

    def split(self, sizes: Sequence[int]) -> Activations:
        """The same windows in batches of other sizes."""
        if self._side is not None:
            torch.cuda.synchronize(self._device)
        windows = torch.cat([one.read() for one in self._waiting])
        parts = Activations(self._device, self._limit, self._folder)
        for part in torch.split(windows, list(sizes)):
            parts.append(part)
        return parts

    @property
    def bytes_in_memory(self) -> int:
        """Bytes in host memory."""
        return sum(one.nbytes for one in self._waiting if isinstance(one, _InMemory))

    @property
    def bytes_on_disk(self) -> int:
        """Bytes in files."""
        return sum(one.nbytes for one in self._waiting if isinstance(one, _OnDisk))

    def _arrived(self, batch: int) -> Tensor:
        if self._coming is not None and self._coming[0] == batch:
            hidden = self._coming[1]
            self._coming = None
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side)  # type: ignore[arg-type]
            hidden.record_stream(current)
            return hidden
        return self._waiting[batch].read().to(self._device)

    def _fetch(self, batch: int) -> None:
        # a write to this batch may still be under way on the current stream
        self._side.wait_stream(torch.cuda.current_stream(self._device))  # type: ignore[union-attr]
        with torch.cuda.stream(self._side):
            hidden = self._waiting[batch].read().to(self._device, non_blocking=True)
        self._coming = (batch, hidden)


class _InMemory:
    def __init__(self, hidden: Tensor, pinned: bool) -> None:
        self._host = hidden
        if pinned:
            self._host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
            self._host.copy_(hidden)
        self._pinned = pinned
        self.nbytes = hidden.nbytes

    def write(self, hidden: Tensor) -> None:
        if self._pinned:
            self._host.copy_(hidden, non_blocking=True)
        else:
            self._host = hidden

    def read(self) -> Tensor:
        return self._host


class _OnDisk:
    def __init__(self, hidden: Tensor, folder: Path | None) -> None:
        self._file: IO[Any] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives with self)
        self._shape, self._dtype = hidden.shape, hidden.dtype
        self.nbytes = hidden.nbytes
        self.write(hidden)

    def __del__(self) -> None:
        self._file.close()

    def write(self, hidden: Tensor) -> None:
        self._file.seek(0)
        self._file.write(memoryview(_bytes(hidden.cpu().contiguous())))
        self._file.flush()

    def read(self) -> Tensor:
        hidden = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(0)
        self._file.readinto(memoryview(_bytes(hidden)))  # type: ignore[attr-defined]
        return hidden


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies beside the work on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()
