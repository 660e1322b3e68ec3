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

BEST = Method(solver="alps", update="least_squares")
"""Where none is: of the methods in ``benchmarks/results/study.json``, the best for the model."""

REASON = (
    "Chosen by default: masks by ALPS, then least squares for the weights that are kept. Of the "
    "methods compared by benchmarks/study.py, this one kept the model's predictions best, per row "
    "and at 2:4. With --solver, --option, --start, --update, --shrink or --centre, what they say "
    "is done (the solver is swap), and weights that are kept stay as they are."
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
