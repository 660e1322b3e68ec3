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
from .choice import Choice, Chosen
from .gram import Gram
from .layer import LayerSolver, loss_as_written
from .models import PrunableLayer
from .observer import Observer
from .ranks import ALONE, Ranks
from .record import PrunedLayer
from .settings import Settings
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
            pruned, chosen = self.solvers[0](layer, gram), None
            if self.choice is not None:
                chosen = Chosen(self.choice.option, self.choice.values[0], [])
            return _named(pruned, chosen)
        found = [judged(layer, solve(layer, gram), apart) for solve in self.solvers]
        if self.choice is None:
            return found[0]
        chosen = self.choice.made([one.result.held_out_updated_loss or 0.0 for one in found])
        return _named(found[chosen.place], chosen)


def chosen_for_model(
    settings: Settings,
    walk: BlockWalk,
    apart: BlockWalk,
    *,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Chosen:
    """The value of a run's choice with the least held-out loss of all layers together.

    Every layer is pruned alone, with every value, on inputs of the dense model, which is left as
    it was.

    Parameters
    ----------
    settings
        Of the run.
    walk, apart
        Over the run's windows and those held out, not begun; they are used up.
    ranks
        The processes that share the batches. All end with the same.
    observer
        Told about progress.
    """
    assert settings.choice is not None, "there is something to choose"
    observer = observer or Observer()
    candidates = settings.candidates()
    solvers = [LayerSolver(one, ranks, observer.warning) for one in candidates]
    losses = [0.0] * len(solvers)
    for step, held_out in zip(walk, apart, strict=True):
        for layer in step.layers:
            if settings.rules.pattern_for(layer.name) is None:
                continue
            observer.phase(f"choice of {settings.choice.option}: {layer.name}")
            gram, gram_apart = step.grams.gram(layer), held_out.grams.gram(layer)
            for at, solve in enumerate(solvers):
                pruned = judged(layer, solve(layer, gram), gram_apart)
                losses[at] += pruned.result.held_out_updated_loss or 0.0
            step.grams.release(layer)
            held_out.grams.release(layer)
    return ranks.gather_objects(settings.choice.made(losses))[0]


def _named(pruned: PrunedLayer, chosen: Chosen | None) -> PrunedLayer:
    if chosen is None:
        return pruned
    return replace(pruned, result=replace(pruned.result, choice=chosen.to_dict()))


def judged(layer: PrunableLayer, pruned: PrunedLayer, apart: Gram) -> PrunedLayer:
    """A layer's result with what it loses on held-out windows."""
    mask = pruned.mask.to(layer.weight.device)
    masked = layer.weight.masked_fill(~mask, 0.0)
    new = masked if pruned.weight is None else pruned.weight
    result = replace(
        pruned.result,
        held_out_loss=loss_as_written(layer, apart, masked, None),
        held_out_updated_loss=loss_as_written(layer, apart, new, pruned.bias),
    )
    return replace(pruned, result=result)
