"""Branch and bound over the convex hull of integer points, for convex functions and any oracle.

Give `minimize` a convex function with its gradient, and a domain with a linear minimisation
oracle under bounds.
"""

from .domain import (
    Birkhoff,
    Box,
    Domain,
    Dual,
    Hypersimplex,
    Lagrangian,
    ReverseKnapsack,
    Simplex,
    SumRange,
    UnitSimplex,
)
from .knapsack import Knapsack
from .mixed_integer import MixedInteger
from .objective import Quadratic
from .solution import HullProgress, HullSolution
from .tree import minimize

__all__ = [
    "Birkhoff",
    "Box",
    "Domain",
    "Dual",
    "HullProgress",
    "HullSolution",
    "Hypersimplex",
    "Knapsack",
    "Lagrangian",
    "MixedInteger",
    "Quadratic",
    "ReverseKnapsack",
    "Simplex",
    "SumRange",
    "UnitSimplex",
    "minimize",
]
