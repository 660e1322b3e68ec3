"""One option of a layer step that is left open, to be chosen by the loss on held-out windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from solvers import InvalidInput

from .layer_step import LayerStep

ChoiceScope = Literal["layer", "model"]

_OF_SURROGATE = ("shrink", "centre", "damping")
_OF_UPDATE = "update_damping"


@dataclass(frozen=True)
class Choice:
    """Values of one option, of which the one of least held-out loss is taken.

    Parameters
    ----------
    option
        "shrink", "centre" or "damping" of `Surrogate`, "update_damping" of `LayerStep`, or an
        option of the run's solver, such as "fixed".
    values
        Two or more that differ.
    scope
        "layer": every layer takes its own; "model": all take the one of least loss summed over
        the layers, measured before the run on inputs of the dense model.
    """

    option: str
    values: tuple[Any, ...]
    scope: ChoiceScope = "layer"

    def __post_init__(self) -> None:
        if self.scope not in get_args(ChoiceScope):
            raise InvalidInput(
                f"A value is chosen for each layer or for the model, not for '{self.scope}'; give "
                f"{' or '.join(get_args(ChoiceScope))}."
            )
        if len(self.values) < 2 or len(set(map(repr, self.values))) < len(self.values):
            raise InvalidInput(
                f"There is nothing to choose for '{self.option}'; give at least two values that "
                "differ."
            )

    @classmethod
    def parse(cls, text: str, scope: ChoiceScope = "layer") -> Choice:
        """``NAME=VALUE,VALUE,...``; values are JSON where they can be, else text."""
        option, _, values = text.partition("=")
        if not option.strip() or not values.strip():
            raise InvalidInput(
                f"Choice '{text}' is not of the form NAME=VALUE,VALUE, such as shrink=0,0.5."
            )
        return cls(option.strip(), tuple(map(_value, values.split(","))), scope)

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
        return {"option": self.option, "values": list(self.values), "scope": self.scope}

    def made(self, losses: Sequence[float]) -> Chosen:
        """The value of least loss, the first of equals."""
        return Chosen(self.option, self.values[_least(losses)], list(losses))


@dataclass(frozen=True)
class Chosen:
    """A choice that was made.

    Attributes
    ----------
    option, value
        What was chosen.
    losses
        Held-out loss (with the weights as they were written) of every value, in order; empty if
        nothing was held out.
    """

    option: str
    value: Any
    losses: list[float]

    @property
    def place(self) -> int:
        """Where the value is among those of the choice."""
        return _least(self.losses) if self.losses else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def _least(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


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


def step_chosen(layer_step: LayerStep, chosen: dict[str, Any] | None) -> LayerStep:
    """A layer step with what a record says was chosen for the layer, or for the model."""
    if chosen is None or "value" not in chosen:
        return layer_step
    return layer_step_with(layer_step, chosen["option"], chosen["value"]) or layer_step


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()
