"""The time of a model's forward pass, taken in pieces.

A pass is what lies outside the blocks (embedding, norms, head), and the blocks one after the other.
So it can be timed where one block at a time is on the device, and blocks can be timed alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..capture import answering, capture, forward, hidden_output
from ..placement import OUTSIDE, Placement

Clock: TypeAlias = Callable[[], float]
"""Gives seconds."""

FEWEST, MOST, SECONDS = 9, 51, 10.0
"""A measurement is repeated as often as there is time for, within limits; what is compared takes
turns, and medians are taken."""


class Pass:
    """A model's forward pass in pieces, each of which can be timed on the device.

    Parameters
    ----------
    placement
        Holds the model. Where one block at a time is on the device, its way there is not timed.
    tokens
        int64 ``[batch, length]``.
    clock
        Gives seconds.
    """

    def __init__(self, placement: Placement, tokens: Tensor, clock: Clock) -> None:
        self._placement, self._tokens, self._clock = placement, tokens, clock
        self._outputs: list[Any] = []
        with ExitStack() as stack:
            stack.enter_context(placement.forward())
            for block in placement.blocks:
                hook = block.register_forward_hook(lambda _, __, out: self._outputs.append(out))
                stack.callback(hook.remove)
            record = capture(placement.model, placement.blocks, [tokens], forward)
        self._calls = [calls[0] for calls in record.calls]
        self._inputs = [record.hidden[0], *map(hidden_output, self._outputs[:-1])]

    def work(self, index: int, block: nn.Module) -> Callable[[], object]:
        """Runs a block in the place of block ``index``."""
        return partial(self._calls[index].run, block, self._inputs[index])

    @contextmanager
    def outside(self) -> Iterator[Callable[[], object]]:
        """While this lasts, runs all but the blocks."""
        placement = self._placement
        answers = answering(placement.blocks, lambda index, _: self._outputs[index])
        with placement.block(OUTSIDE), answers:
            yield partial(forward, placement.model, self._tokens)

    def seconds(self) -> float:
        """Of one whole pass."""
        with self.outside() as work:
            total = self._timed(work)
        for index in range(len(self._calls)):
            with self._placement.block(index) as block:
                total += self._timed(self.work(index, block))
        return total

    def rounds(self, works: Sequence[Callable[[], object]]) -> list[list[float]]:
        """Seconds of each, round by round."""
        return _repeated(lambda: [self._timed(work) for work in works])

    def _timed(self, work: Callable[[], object]) -> float:
        device = self._placement.device
        self._placement.settle()
        _finish(device)
        began = self._clock()
        work()
        _finish(device)
        return self._clock() - began


@dataclass(frozen=True)
class Compared:
    """A smaller model's pass against the large one's, in turns.

    Attributes
    ----------
    dense, smaller
        Median seconds.
    ratio
        Median of the rounds' ratios.
    interval
        Where the median of the ratio lies with a probability of 95 % or more (order statistics,
        for which no distribution is assumed).
    rounds
        How many.
    """

    dense: float
    smaller: float
    ratio: float
    interval: tuple[float, float]
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "dense_seconds": self.dense,
            "seconds": self.smaller,
            "of_dense": self.ratio,
            "interval": list(self.interval),
            "rounds": self.rounds,
        }


@torch.no_grad()
def compared(
    dense: Placement, smaller: Placement, tokens: Tensor, clock: Clock = time.perf_counter
) -> Compared:
    """Time whole passes of two models in turn."""
    passes = [Pass(one, tokens, clock) for one in (dense, smaller)]
    both = _repeated(lambda: [one.seconds() for one in passes])
    ratios = sorted(b / a for a, b in both)
    rank = _median_rank(len(ratios))
    return Compared(
        statistics.median(a for a, _ in both),
        statistics.median(b for _, b in both),
        statistics.median(ratios),
        (ratios[rank], ratios[-1 - rank]),
        len(ratios),
    )


def _repeated(one_round: Callable[[], list[float]]) -> list[list[float]]:
    """Seconds of rounds, after one that tells how many there is time for."""
    spent = sum(one_round())
    count = MOST if spent * MOST <= SECONDS else max(FEWEST, int(SECONDS / spent))
    return [one_round() for _ in range(count)]


def _median_rank(count: int) -> int:
    """Largest r with P(Binomial(count, 1/2) <= r) <= 2.5 %; for six or more."""
    rank, below = 0, 1 / 2**count
    while below + math.comb(count, rank + 1) / 2**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) / 2**count
    return rank


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
