"""Several processes on one run, as torchrun starts them.

Batches of calibration text are dealt out in turn, and so are the rows of a layer; every process
ends with the same Gram matrices and the same masks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """A process's place among all.

    Attributes
    ----------
    rank, size
        Its number, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape, in the order of the ranks."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return parts

    def gather_objects(self, value: _T) -> list[_T]:
        """Every process's (small, picklable) value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()


def is_first_process() -> bool:
    """Whether this process is the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: torch.device) -> torch.device:
    """Of GPUs that were not told apart, the one that is this process's own."""
    if device.type != "cuda" or ":" in str(device):
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    torch.cuda.set_device(own)
    return own


@contextmanager
def ranks_of_environment(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, connected while the block runs; else `ALONE`.

    NCCL connects GPUs, gloo everything else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # Its functions have the group of the time of import for a default. Imported later on (with a
    # model's code), they would hold it, and with it its threads, beyond its end.
    import torch.distributed.nn.functional

    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
        torch.distributed.barrier()  # nobody hangs up while another still listens
    finally:
        torch.distributed.destroy_process_group()
