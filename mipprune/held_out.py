"""Calibration windows that no mask is chosen on: what a layer loses on them, beside its own loss.

A mask, or a weight update, that fits the calibration text too closely loses more on other text of
the same kind. Here a share of the windows is kept apart and runs through the same pruned blocks,
so that this is seen in every layer; and where an option of the masks is left open, the value with
the least loss there is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from solvers import InvalidInput

from .calibration import Windows
from .choice import Choice
from .gram import Gram
from .layer import LayerSolver, loss_as_written
from .models import PrunableLayer
from .record import PrunedLayer
from .walk import BlockStep, BlockWalk


def split_windows(windows: Windows, share: float) -> tuple[Windows, Windows]:
    """Calibration windows, and the last ``share`` of them kept apart; at least one of each.

    Raises
    ------
    InvalidInput
        If there is only one.
    """
    count = len(windows.tokens)
    if count < 2:
        raise InvalidInput("One calibration window leaves none to hold out; give more --samples.")
    first = min(max(count - round(count * share), 1), count - 1)
    return (
        Windows(windows.tokens[:first], windows.source, windows.origin),
        Windows(windows.tokens[first:], windows.source, windows.origin),
    )


def together(
    walk: BlockWalk, apart: BlockWalk | None, propagate: bool
) -> Iterator[tuple[BlockStep, BlockStep | None]]:
    """Steps of a walk beside those of one over held-out windows, through the same blocks.

    The first of two walks to go on changes the block before the second one leaves it, if that is
    the walk whose steps are told to prune. So it goes first where inputs come from pruned blocks,
    and last where they come from dense ones.
    """
    if apart is None:
        for step in walk:
            yield step, None
    elif propagate:
        yield from zip(walk, apart, strict=True)
    else:
        for held_out, step in zip(apart, walk, strict=True):
            yield step, held_out


@dataclass(frozen=True)
class Judged:
    """Solves a layer and looks at the result on held-out windows.

    Attributes
    ----------
    solvers
        One, or one for each value of the choice.
    choice
        What is left open, if anything is.
    """

    solvers: Sequence[LayerSolver]
    choice: Choice | None

    def __call__(self, layer: PrunableLayer, gram: Gram, apart: Gram | None) -> PrunedLayer:
        """A layer's result; of several values' the one of least held-out loss, the first of equals.

        A layer that saw no held-out token has the choice's first value.
        """
        if apart is None or apart.tokens == 0:
            return self._named(self.solvers[0](layer, gram), 0, [])
        found = [_judged(layer, solve(layer, gram), apart) for solve in self.solvers]
        losses = [one.result.held_out_updated_loss or 0.0 for one in found]
        best = min(range(len(losses)), key=losses.__getitem__)
        return self._named(found[best], best, losses)

    def _named(self, pruned: PrunedLayer, at: int, losses: list[float]) -> PrunedLayer:
        if self.choice is None:
            return pruned
        chosen = {"option": self.choice.option, "value": self.choice.values[at], "losses": losses}
        return replace(pruned, result=replace(pruned.result, choice=chosen))


def _judged(layer: PrunableLayer, pruned: PrunedLayer, apart: Gram) -> PrunedLayer:
    mask = pruned.mask.to(layer.weight.device)
    masked = layer.weight.masked_fill(~mask, 0.0)
    new = masked if pruned.weight is None else pruned.weight
    result = replace(
        pruned.result,
        held_out_loss=loss_as_written(layer, apart, masked, None),
        held_out_updated_loss=loss_as_written(layer, apart, new, pruned.bias),
    )
    return replace(pruned, result=result)
