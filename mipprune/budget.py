"""A number of weights to remove of all layers together, and rules that say where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from solvers import InvalidInput, PerLayer, PerRow

from .models import PrunableLayer
from .rules import Rules

Scope = Literal["row", "layer"]
"""Whether each row of a layer has the layer's sparsity, or only the layer as a whole."""

Keeps = dict[str, tuple[int, tuple[int, int]]]
"""By layer: weights kept per row, and its shape."""


def uniform_pattern(sparsity: float, scope: Scope) -> PerRow | PerLayer:
    """The pattern of every layer where none is told apart."""
    if scope not in get_args(Scope):
        raise InvalidInput(f"Scope '{scope}' is none of {', '.join(get_args(Scope))}.")
    return PerRow(sparsity=sparsity) if scope == "row" else PerLayer(sparsity=sparsity)


def removed_by(uniform: PerRow | PerLayer, shapes: Iterable[tuple[int, int]]) -> int:
    """Weights that a pattern removes of all layers of these shapes."""
    per_row = isinstance(uniform, PerRow)
    return sum(
        rows * d - uniform.kept_per_cell((rows, d)) * (rows if per_row else 1) for rows, d in shapes
    )


def rules_of(keeps: Keeps, uniform: PerRow | PerLayer, ignore: tuple[str, ...]) -> Rules:
    """Rules for exactly these layers."""
    per_row = isinstance(uniform, PerRow)
    patterns = tuple(
        (name, PerRow(keep=keep) if per_row else PerLayer(keep=rows * keep))
        for name, (keep, (rows, _)) in keeps.items()
    )
    return Rules(uniform, patterns, ignore, tuple(keeps))


def shape_of(layer: PrunableLayer) -> tuple[int, int]:
    """``(rows, inputs)`` of a layer's weight."""
    rows, inputs = layer.weight.shape
    return rows, inputs
