"""What 2:4 sparsity gains at run time, measured layer by layer and batch by batch.

No gain is promised: sparse kernels need a GPU of compute capability 8.0, half precision and
layers of suitable sizes, and are often slower than dense ones at the batches of decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from solvers import NM, InvalidInput

from .checkpoint import load_masks

BATCHES = (1, 8, 64, 512, 4096)
"""Tokens at a time: decoding one sequence, several, and prompts."""

_MULTIPLES = (32, 64)
"""Outputs and inputs of a layer have to be multiples of these for the sparse kernels."""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a layer's product, dense and 2:4.

    Attributes
    ----------
    outputs, inputs
        Size of the layer.
    layers
        How many layers of the model have it.
    batch
        Tokens at a time.
    dense, sparse
        Milliseconds.
    """

    outputs: int
    inputs: int
    layers: int
    batch: int
    dense: float
    sparse: float

    @property
    def ratio(self) -> float:
        """Dense over sparse: above 1, the sparse product is the quicker one."""
        return self.dense / self.sparse


def shapes_2to4(folder: str | Path) -> dict[tuple[int, int], tuple[Tensor, int]]:
    """Sizes of a pruned model's 2:4 layers that sparse kernels take, with a mask and their number.

    Raises
    ------
    InvalidInput
        If the folder has no masks, or none that follow 2:4 in a suitable size.
    """
    pattern = NM(keep=2, group=4)
    found: dict[tuple[int, int], tuple[Tensor, int]] = {}
    for mask in load_masks(folder).values():
        outputs, inputs = mask.shape
        suitable = outputs % _MULTIPLES[0] == 0 and inputs % _MULTIPLES[1] == 0
        if suitable and pattern.is_feasible(mask):
            first, count = found.get((outputs, inputs), (mask, 0))
            found[outputs, inputs] = (first, count + 1)
    if not found:
        raise InvalidInput(
            f"{folder} has no 2:4 layer whose outputs are a multiple of {_MULTIPLES[0]} and whose "
            f"inputs are one of {_MULTIPLES[1]}; prune with --pattern 2:4."
        )
    return found


def time_2to4(
    folder: str | Path,
    *,
    batches: Sequence[int] = BATCHES,
    repeats: int = 50,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
) -> list[Timing]:
    """Time the products of a pruned model's layers, dense and by PyTorch's 2:4 kernels.

    Weights are random under the masks: times do not depend on their values.

    Parameters
    ----------
    folder
        With masks that follow 2:4.
    batches
        Tokens at a time.
    repeats
        Of each measurement, after a tenth as many unmeasured ones; the median is taken.
    device
        A CUDA GPU.
    dtype
        Half precision.

    Raises
    ------
    InvalidInput
        If there is no such GPU, or no suitable layer.
    """
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        raise InvalidInput(
            "2:4 products can only be timed on a CUDA GPU, and torch sees none here; "
            "run this on a machine with one."
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise InvalidInput(
            f"{torch.cuda.get_device_name(device)} has no sparse tensor cores; "
            "2:4 needs compute capability 8.0."
        )
    from torch.sparse import to_sparse_semi_structured

    return time_layers(
        shapes_2to4(folder),
        batches,
        to_sparse_semi_structured,
        partial(_milliseconds, repeats=repeats),
        torch.device(device),
        dtype,
    )


def time_layers(
    shapes: dict[tuple[int, int], tuple[Tensor, int]],
    batches: Sequence[int],
    compress: Callable[[Tensor], Tensor],
    milliseconds: Callable[[Callable[[], Tensor]], float],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Timing]:
    """Time every size at every batch.

    Parameters
    ----------
    shapes
        From `shapes_2to4`.
    batches
        Tokens at a time.
    compress
        Makes the sparse weight of a dense one with zeros.
    milliseconds
        Times a product.
    device, dtype
        Of weights and inputs.

    Raises
    ------
    AssertionError
        If the sparse product is not the dense one.
    """
    generator = torch.Generator().manual_seed(0)
    timings = []
    for (outputs, inputs), (mask, layers) in shapes.items():
        weight = torch.randn(outputs, inputs, generator=generator) * mask
        dense = weight.to(device, dtype)
        sparse = compress(dense)
        for batch in batches:
            x = torch.randn(batch, inputs, generator=generator).to(device, dtype)
            expected, got = linear(x, dense).float(), linear(x, sparse).float()
            if float((got - expected).norm()) > 1e-2 * float(expected.norm()):
                raise AssertionError(f"the sparse product of a {outputs} x {inputs} layer is wrong")
            dense_time = milliseconds(partial(linear, x, dense))
            sparse_time = milliseconds(partial(linear, x, sparse))
            timings.append(Timing(outputs, inputs, layers, batch, dense_time, sparse_time))
    return timings


def _milliseconds(product: Callable[[], Tensor], repeats: int) -> float:
    for _ in range(max(1, repeats // 10)):
        product()
    times = []
    for _ in range(repeats):
        begin, end = _event(), _event()
        begin.record()
        product()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
