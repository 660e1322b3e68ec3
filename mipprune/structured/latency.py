"""Time of a forward pass as a budget: measured on the device at hand, before and afterwards.

A pass is what lies outside the blocks (embedding, norms, head), and the blocks one after the other.
Before anything is removed, one block of every shape is timed with several counts of groups, whole
and smaller in turn; what is saved is taken to add up over blocks and kinds. Afterwards the whole
smaller model is timed against the large one, which shows whether it did.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from solvers import InvalidInput

from ..calibration import window_length
from ..capture import answering, capture, forward, hidden_output
from ..placement import OUTSIDE, Placement
from .coupling import WORDS, Kind, Options, empty_model
from .smaller import cut_block

POINTS = 8
"""Counts that are timed besides the whole, at most."""

FEWEST, MOST, SECONDS = 9, 51, 10.0
"""A measurement is repeated as often as there is time for, within limits; what is compared takes
turns, and medians are taken."""

PARTS = 10_000
"""Savings are whole parts of the dense model's time, rounded down."""


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass that the smaller model may take.

    Parameters
    ----------
    share
        Of the dense model's time at most, in (0, 1).
    tokens
        Of a sequence; 1 is a step of decoding without a cache.
    batch
        Sequences at a time.
    clock
        Gives seconds.
    """

    share: float
    tokens: int = 256
    batch: int = 1
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput(f"Share {self.share} of the time is outside (0, 1).")
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name}={getattr(self, name)} is below 1.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"share": self.share, "tokens": self.tokens, "batch": self.batch}

    def sequences(self, text: Tensor, model: nn.Module) -> Tensor:
        """The tokens of a pass, int64 ``[batch, tokens]``, out of a text, over again if need be.

        Raises
        ------
        InvalidInput
            If the model has not so many positions.
        """
        config: Any = model.config
        most = window_length(config.get_text_config(), self.tokens)
        if most < self.tokens:
            raise InvalidInput(
                f"The model has {most} positions; give --latency-tokens {most} or less."
            )
        size = self.batch * self.tokens
        flat = text.flatten()
        return flat.repeat(-(-size // len(flat)))[:size].view(self.batch, self.tokens)


@dataclass(frozen=True)
class TimeCurves:
    """What was measured before anything was removed.

    Attributes
    ----------
    dense, outside
        Seconds of the whole model's pass, and of what lies outside the blocks in it.
    counts
        By kind: the counts timed, most first.
    saved
        By kind: seconds that each count saves in all blocks together, never less than a larger
        one.
    """

    dense: float
    outside: float
    counts: dict[Kind, tuple[int, ...]]
    saved: dict[Kind, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        curves = {
            kind: {"counts": list(counts), "saved_seconds": list(self.saved[kind])}
            for kind, counts in self.counts.items()
        }
        return {"dense_seconds": self.dense, "outside_seconds": self.outside, "curves": curves}

    def parts(self, kind: Kind, counts: Sequence[int]) -> list[int]:
        """What any counts save, in `PARTS` of the dense model's time; linear in between."""
        known, saved = self.counts[kind][::-1], self.saved[kind][::-1]
        found = np.interp(counts, known, saved) / self.dense * PARTS
        return [int(one) for one in found]


@torch.no_grad()
def time_curves(
    placement: Placement, tokens: Tensor, options: dict[Kind, Options], latency: Latency
) -> TimeCurves:
    """Time a dense model with fewer groups in its blocks.

    Parameters
    ----------
    placement
        Holds the model, which is left as it is.
    tokens
        Of a pass, see `Latency.sequences`.
    options
        Counts to consider, of which `POINTS` are timed.
    latency
        How.
    """
    model: Any = placement.model
    one_pass = Pass(placement, tokens, latency.clock)
    with one_pass.outside() as work:
        outside = float(np.median(one_pass.rounds([work])))
    counts = {kind: _spread(one.counts) for kind, one in options.items()}
    saved = {kind: np.zeros(len(some)) for kind, some in counts.items()}
    dense = outside
    for alike in _alike(placement.blocks):
        index = alike[0]
        name = f"{placement.blocks_name}.{index}"
        with placement.block(index) as block:
            works, columns = [one_pass.work(index, block)], {}
            for kind, some in counts.items():
                couplings = options[kind].couplings[index]
                if not couplings:
                    continue
                columns[kind] = [0, *range(len(works), len(works) + len(some) - 1)]
                for count in some[1:]:
                    made = empty_model(model, {kind: count}).get_submodule(name)
                    cut_block(made, block, couplings, {kind: torch.arange(some[0]) < count})
                    works.append(one_pass.work(index, made))
            rounds = np.array(one_pass.rounds(works))
        dense += len(alike) * float(np.median(rounds[:, 0]))
        for kind, own in columns.items():
            saved[kind] += len(alike) * np.median(rounds[:, :1] - rounds[:, own], axis=0)
    return TimeCurves(
        dense, outside, counts, {kind: _monotone(values) for kind, values in saved.items()}
    )


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
def compared(dense: Placement, smaller: Placement, tokens: Tensor, latency: Latency) -> Compared:
    """Time whole passes of two models in turn."""
    passes = [Pass(one, tokens, latency.clock) for one in (dense, smaller)]
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

    def __init__(self, placement: Placement, tokens: Tensor, clock: Callable[[], float]) -> None:
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


def needed(share: float) -> int:
    """What has to be saved, in `PARTS`."""
    return math.ceil((1 - share) * PARTS - 1e-6)


def check_reachable(latency: Latency, most: int, kinds: Sequence[Kind]) -> None:
    """Raise `InvalidInput` if ``most`` `PARTS` saved are too few; it names the smallest share."""
    if needed(latency.share) <= most:
        return
    what = " and ".join(WORDS[kind] for kind in kinds)
    size = f"{latency.batch} x {latency.tokens} tokens"
    least = math.ceil((PARTS - most) / 10) / 1000
    if least >= 1:
        raise InvalidInput(
            f"A pass of {size} takes no less time here with fewer {what}; give more "
            "--latency-tokens, or shares to remove."
        )
    raise InvalidInput(
        f"With the fewest {what}, a pass of {size} still takes {1 - most / PARTS:.1%} of the dense "
        f"model's time here; give at least {least:.3f}."
    )


def _alike(blocks: nn.ModuleList) -> list[list[int]]:
    """Numbers of the blocks of each shape."""
    found: dict[Any, list[int]] = {}
    for index, block in enumerate(blocks):
        shapes = tuple((name, tuple(one.shape)) for name, one in block.named_parameters())
        found.setdefault((type(block), shapes), []).append(index)
    return list(found.values())


def _spread(counts: Sequence[int]) -> tuple[int, ...]:
    """The counts to time, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(counts) - 1, min(len(counts), POINTS + 1)).round().astype(int)
    return tuple(counts[place] for place in places)


def _repeated(one_round: Callable[[], list[float]]) -> list[list[float]]:
    """Seconds of rounds, after one that tells how many there is time for."""
    spent = sum(one_round())
    count = MOST if spent * MOST <= SECONDS else max(FEWEST, int(SECONDS / spent))
    return [one_round() for _ in range(count)]


def _monotone(values: Any) -> tuple[float, ...]:
    """The nearest sequence that never falls, by least squares; from zero, and not below.

    ``max_{i <= k} min_{j >= k} mean(v_i .. v_j)``, the min-max formula of isotonic regression.
    """
    summed = np.concatenate([[0.0], np.cumsum(values)])
    places = range(len(values))
    fitted = [
        max(
            min((summed[j + 1] - summed[i]) / (j + 1 - i) for j in places[k:])
            for i in places[: k + 1]
        )
        for k in places
    ]
    return (0.0, *(max(float(one), 0.0) for one in fitted[1:]))


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
