"""The part of a run that shares out its sparsity among the layers, before any is pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from solvers import InvalidInput, PerLayer, PerRow

from .allocate import Allocation
from .calibration import Windows
from .dense_walk import DenseWalk
from .gram import Gram, TokenWeights
from .layer import LayerSolver
from .loss_curves import Prune
from .models import PrunableLayer, all_layers
from .observer import Observer
from .placement import FromFolder, Placement
from .ranks import ALONE, Ranks
from .rules import Rules
from .settings import Settings
from .walk import HOST_BYTES

MOST_LAYERS = 1000
"""An optional allocation that costs several forwards of the model for every layer leaves models
with more layers alone."""


def feasible(
    allocation: Allocation | None,
    rules: Rules,
    placement: Placement,
    warn: Callable[[str], None] = lambda _: None,
) -> Allocation | None:
    """The allocation, if it can be followed; an optional one that cannot is dropped.

    Raises
    ------
    InvalidInput
        If it cannot, and is not optional: nothing is to be shared out, or not of a model that is
        read block by block.
    """
    if allocation is None:
        return None
    try:
        _check(allocation, rules, placement)
    except InvalidInput as error:
        if not allocation.optional:
            raise
        warn(f"All layers get the same sparsity. {error}")
        return None
    return allocation


def _check(allocation: Allocation, rules: Rules, placement: Placement) -> None:
    allocation.check(rules)
    if not allocation.forwards:
        return
    layers = all_layers(placement.blocks_name, placement.blocks)
    pruned = sum(rules.pattern_for(layer.name) is not None for layer in layers)
    if allocation.optional and pruned > MOST_LAYERS:
        raise InvalidInput(
            f"An allocation takes several forwards of the model for each of {pruned} layers; "
            "--allocate integer_program does so nevertheless."
        )
    if isinstance(placement, FromFolder):
        raise InvalidInput(
            "An allocation by integer program runs the whole model several times for every layer, "
            "which is too slow for one that is read block by block; give --no-stream, or "
            "--allocate owl."
        )


def shared_out(
    settings: Settings,
    placement: Placement,
    windows: Windows,
    *,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
    weights: TokenWeights | None = None,
) -> Rules:
    """The settings' rules with a sparsity for each layer, by their allocation.

    Takes a pass over the dense model, which is left as it was. All processes end with the same.
    ``weights`` are those of the settings' surrogate.
    """
    assert settings.allocation is not None, "there is an allocation to follow"
    walk = DenseWalk(
        placement,
        windows,
        settings.rules,
        settings.windows_at_once,
        host_bytes=host_bytes,
        ranks=ranks,
        observer=observer,
        weights=weights,
    )
    rules = settings.allocation.rules(walk, settings.rules, _pruned_as_in(settings, ranks))
    return ranks.gather_objects(rules)[0]


def _pruned_as_in(settings: Settings, ranks: Ranks) -> Prune:
    """Layers pruned as the run prunes them, but at another sparsity and by no search in time."""
    if settings.time_budget is not None:
        settings = replace(
            settings, solver="wanda", start=None, solver_options={}, time_budget=None
        )

    def prune(layer: PrunableLayer, gram: Gram, pattern: PerRow) -> Tensor:
        chosen: PerRow | PerLayer = pattern
        if settings.rules.default.coupled:
            rows, inputs = layer.weight.shape
            chosen = PerLayer(keep=rows * pattern.kept_per_cell((rows, inputs)))
        solve = LayerSolver(replace(settings, rules=Rules(chosen), allocation=None), ranks)
        pruned = solve(layer, gram)
        if pruned.weight is not None:
            return pruned.weight
        return layer.weight.masked_fill(~pruned.mask.to(layer.weight.device), 0.0)

    return prune
