"""Bounds from the dual of a row's semidefinite relaxation, with lazily added cuts.

`program` states one row, `cuts` the valid inequalities, `dual` improves multipliers, `witness`
turns multipliers into a bound that stands on its own, and `solver` offers it all by name.
"""

from .program import BinaryProgram
from .solver import Semidefinite
from .witness import ConvexForm, Witness

__all__ = ["BinaryProgram", "ConvexForm", "Semidefinite", "Witness"]
