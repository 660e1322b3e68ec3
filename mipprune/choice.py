"""One option of a layer step that is left open, to be chosen by the loss on held-out windows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from solvers import InvalidInput

from .layer_step import LayerStep

_OF_SURROGATE = ("shrink", "centre", "damping")
_OF_UPDATE = "update_damping"


@dataclass(frozen=True)
class Choice:
    """Values of one option, of which every layer takes the one of least held-out loss.

    Parameters
    ----------
    option
        "shrink", "centre" or "damping" of `Surrogate`, "update_damping" of `LayerStep`, or an
        option of the run's solver, such as "fixed".
    values
        Two or more that differ.
    """

    option: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2 or len(set(map(repr, self.values))) < len(self.values):
            raise InvalidInput(
                f"There is nothing to choose for '{self.option}'; give at least two values that "
                "differ."
            )

    @classmethod
    def parse(cls, text: str) -> Choice:
        """``NAME=VALUE,VALUE,...``; values are JSON where they can be, else text."""
        option, _, values = text.partition("=")
        if not option.strip() or not values.strip():
            raise InvalidInput(
                f"Choice '{text}' is not of the form NAME=VALUE,VALUE, such as shrink=0,0.5."
            )
        return cls(option.strip(), tuple(map(_value, values.split(","))))

    def applied(
        self, value: Any, layer_step: LayerStep, solver_options: dict[str, Any]
    ) -> tuple[LayerStep, dict[str, Any]]:
        """Layer step and solver options with one of the values."""
        step = layer_step_with(layer_step, self.option, value)
        if step is not None:
            return step, solver_options
        return layer_step, {**solver_options, self.option: value}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"option": self.option, "values": list(self.values)}


def layer_step_with(layer_step: LayerStep, option: str, value: Any) -> LayerStep | None:
    """A layer step with another value of one of its options; None if it has no such option."""
    if option not in (*_OF_SURROGATE, _OF_UPDATE):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInput(f"'{value}' is no value of {option}; give a number.")
    if option == _OF_UPDATE:
        return replace(layer_step, update_damping=value)
    changed: dict[str, Any] = {option: value}
    return replace(layer_step, surrogate=replace(layer_step.surrogate, **changed))


def step_of_layer(layer_step: LayerStep, chosen: dict[str, Any] | None) -> LayerStep:
    """A layer's own step, from a run's and what its record says was chosen for this layer."""
    if chosen is None:
        return layer_step
    return layer_step_with(layer_step, chosen["option"], chosen["value"]) or layer_step


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
