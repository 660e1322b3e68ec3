"""Quadratic convex reformulation: a part of a problem made ready for a tree search.

Replacing ``x_i^2`` by ``x_i`` with the multipliers of the semidefinite dual gives a convex form
that equals the loss at binary points and whose relaxed minimum is the semidefinite bound
(Billionnet, Elloumi and Plateau 2009): `scip` minimises it instead of the loss. Subtracting
multiples of cuts as well raises that minimum, but leaves the form below the loss at some binary
points: good enough to bound nodes in `branch_and_bound`, which evaluates the points itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ascent import Effort, strengthen
from .cuts import Array
from .program import BinaryProgram
from .witness import ConvexForm


@dataclass(frozen=True)
class Reformulation:
    """A convex form of a program, and what finding it has shown.

    Attributes
    ----------
    form
        Of the program's loss divided by ``unit``: nowhere above it at allowed binary points, and
        equal to it there, up to rounding, without cuts.
    relaxed
        About where the form is least over the relaxed masks, ``[d]`` (1 = pruned); only nearly
        feasible.
    bound
        No allowed x costs less, in the program's own units; ``-inf`` if nothing is proven.
    """

    form: ConvexForm
    relaxed: Array
    bound: float


def reformulate(
    program: BinaryProgram,
    incumbent: float,
    effort: Effort,
    *,
    unit: float,
    rel_gap: float,
    relaxed: Array | None = None,
    improved: Callable[[Array], float] | None = None,
) -> Reformulation:
    """Reformulate a program by its semidefinite dual.

    Parameters
    ----------
    program
        A row, or a small layer with one budget.
    incumbent
        Loss of the best ``x`` known.
    effort, rel_gap, relaxed, improved
        When the dual ascent stops, and what it does on its way: see `strengthen`.
    unit
        Loss that counts as 1 in the form.
    """
    found = strengthen(
        program, incumbent, effort, rel_gap=rel_gap, relaxed=relaxed, improved=improved
    )
    multipliers = found.witness.multipliers.scaled(1 / unit)
    form = ConvexForm.of(program.scaled(1 / unit), multipliers)
    return Reformulation(form, found.relaxed, found.bound)
