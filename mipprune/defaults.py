"""What is done when nothing is said about how to choose masks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """How masks and weights are chosen, as the command line names it."""

    solver: str = "swap"
    update: str = "none"
    shrink: float = 0.0
    centre: float = 0.0


PLAIN = Method()
"""Where one of the choices is made by the user, the others are these."""

BEST = Method(update="least_squares", shrink=0.5)
"""Where none is. Of the methods that take seconds per layer, it costs the model least in
``benchmarks/results/study.json``."""

REASON = (
    "Chosen by default: swaps on Gram matrices shrunk half way to their diagonals (they fit less "
    "to the calibration text), then least squares for the weights that are kept. Of the methods "
    "that need no more time, this one kept the model's predictions best in benchmarks/study.py. "
    "With --solver, --option, --start, --update, --shrink or --centre, what they say is done, "
    "and weights that are kept stay as they are."
)


def chosen_method(
    solver: str | None,
    update: str | None,
    shrink: float | None,
    centre: float | None,
    *,
    more_said: bool,
) -> Method:
    """The method that the options mean; ``more_said``: whether others shape the masks too."""
    if (solver, update, shrink, centre) == (None, None, None, None) and not more_said:
        return BEST
    return Method(
        PLAIN.solver if solver is None else solver,
        PLAIN.update if update is None else update,
        PLAIN.shrink if shrink is None else shrink,
        PLAIN.centre if centre is None else centre,
    )
