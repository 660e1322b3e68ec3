"""What is done when nothing is said about how to choose masks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .surrogate import Tokens


@dataclass(frozen=True)
class Method:
    """How masks and weights are chosen, as the command line names it.

    Attributes
    ----------
    solver, update, shrink, centre, tokens, row_groups, allocate
        The options.
    reason
        Why, where it was not the user who chose; else empty.
    """

    solver: str = "swap"
    update: str = "none"
    shrink: float = 0.0
    centre: float = 0.0
    tokens: Tokens = "equal"
    row_groups: int = 1
    allocate: str | None = None
    reason: str = ""

    def options(self) -> dict[str, Any]:
        """By name, those that are in force."""
        named = asdict(replace(self, reason=""))
        return {name: value for name, value in named.items() if value not in (None, "")}


PLAIN = Method()
"""Where one of the choices is made by the user, the others are these."""

BEST = Method(
    solver="alps",
    update="least_squares",
    reason="Chosen by default: masks by ALPS, then least squares for the weights that are kept. Of "
    "the methods compared by benchmarks/study.py on the embedded GPT, none had a lower perplexity "
    "by more than the error, per row and at 2:4. (--grams sequential --targets stream:0.5 kept the "
    "predictions nearer to the dense model's, at about that perplexity, and takes several times as "
    "long.) With --solver, --option, --start, --update, --shrink, --centre or --tokens, what they "
    "say is done (the solver is swap), and weights that are kept stay as they are.",
)
"""Where none is: by ``benchmarks/results/study.json``, the least perplexity, within its error."""

BEST_SHARED = replace(
    BEST,
    allocate="integer_program",
    reason=f"{BEST.reason} An integer program shares out the sparsity among the layers, which "
    "helps the model more and makes the run about four times as long; "
    "--allocate uniform gives every layer the same.",
)
"""The same where there is a sparsity to share out."""

BEST_IN_TIME = Method(
    solver="joint",
    update="least_squares",
    reason="Chosen for a time budget: masks by ALPS, swaps on the loss after least squares while "
    "there is time, and least squares for the weights that are kept. With --start, --update, "
    "--shrink, --centre or --tokens the solver is chain: Frank-Wolfe, then tabu search, which "
    "takes all the time.",
)
"""The same within a time budget: from ALPS's masks on, swaps judged after least squares."""

SEARCH_IN_TIME = "chain"
"""The solver within a time budget where other choices are the user's: Frank-Wolfe, then tabu
search, which takes all the time there is."""


def chosen_method(
    solver: str | None,
    update: str | None,
    shrink: float | None,
    centre: float | None,
    allocate: str | None = None,
    *,
    tokens: Tokens | None = None,
    row_groups: int | None = None,
    more_said: bool,
    in_time: bool = False,
    shareable: bool = False,
) -> Method:
    """The method that the options mean.

    ``more_said``: whether others shape the masks too; ``in_time``: whether there is a time budget;
    ``shareable``: whether there is a sparsity that the layers may share out.
    """
    said = (solver, update, shrink, centre, tokens, row_groups)
    if all(one is None for one in said) and not more_said:
        if in_time:
            return replace(BEST_IN_TIME, allocate=allocate)
        if allocate is not None:
            return replace(BEST, allocate=allocate)
        return BEST_SHARED if shareable else BEST
    plain = SEARCH_IN_TIME if in_time else PLAIN.solver
    return Method(
        plain if solver is None else solver,
        PLAIN.update if update is None else update,
        PLAIN.shrink if shrink is None else shrink,
        PLAIN.centre if centre is None else centre,
        PLAIN.tokens if tokens is None else tokens,
        PLAIN.row_groups if row_groups is None else row_groups,
        allocate,
    )
