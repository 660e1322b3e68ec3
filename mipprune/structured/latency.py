"""Time of a forward pass as a budget: measured on the device at hand, before and afterwards.

Before anything is removed, one block of every shape is timed with several counts of groups, whole
and smaller in turn; what is saved is taken to add up over blocks and kinds. Afterwards the whole
smaller model is timed against the large one, which shows whether it did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from solvers import InvalidInput

from ..calibration import window_length
from ..placement import Placement
from .coupling import WORDS, Kind, Options, empty_model
from .passes import Clock, Pass
from .savings import Savings
from .smaller import cut_block

POINTS = 8
"""Counts that are timed besides the whole, at most."""

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
    clock: Clock = field(default=time.perf_counter, repr=False, compare=False)

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

    Raises
    ------
    InvalidInput
        If a block does not run with fewer groups.
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
            try:
                rounds = np.array(one_pass.rounds(works))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # shapes that do not go together
                kinds = " and ".join(WORDS[kind] for kind in columns)
                raise InvalidInput(
                    f"Block {index} of a model of type {model.config.model_type} does not run with "
                    f"fewer {kinds}; its structure is not understood, and nothing was written."
                ) from error
        dense += len(alike) * float(np.median(rounds[:, 0]))
        for kind, own in columns.items():
            saved[kind] += len(alike) * np.median(rounds[:, :1] - rounds[:, own], axis=0)
    return TimeCurves(
        dense, outside, counts, {kind: _monotone(values) for kind, values in saved.items()}
    )


def time_savings(
    placement: Placement, tokens: Tensor, options: dict[Kind, Options], latency: Latency
) -> Savings:
    """What a bound on the time of a pass asks for, measured.

    Parameters
    ----------
    placement
        Holds the model.
    tokens
        int64, of any text.
    options
        Counts to consider.
    latency
        The bound.

    Raises
    ------
    InvalidInput
        If it cannot be reached, or the model has too few positions.
    """
    found = time_curves(placement, latency.sequences(tokens, placement.model), options, latency)
    amounts = {kind: found.parts(kind, one.counts) for kind, one in options.items()}
    most = sum(of_kind[-1] for of_kind in amounts.values())
    _check_reachable(latency, most, list(options))
    return Savings(_needed(latency.share), amounts, found.to_dict())


def _needed(share: float) -> int:
    """What has to be saved, in `PARTS`."""
    return math.ceil((1 - share) * PARTS - 1e-6)


def _check_reachable(latency: Latency, most: int, kinds: Sequence[Kind]) -> None:
    """Raise `InvalidInput` if ``most`` `PARTS` saved are too few; it names the smallest share."""
    if _needed(latency.share) <= most:
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


def _monotone(values: Any) -> tuple[float, ...]:
    """The nearest sequence that never falls, by least squares; from zero, and not below."""
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression(values).x
    return (0.0, *(max(float(one), 0.0) for one in fitted[1:]))
