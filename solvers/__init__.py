"""Mask selection for linear layers as an optimisation problem, and solvers for it.

State the problem once (`MaskProblem`), choose a pattern, and `solve` it by name; `available`
lists the solvers. This package knows rows, Gram matrices and patterns, and no transformer.
"""

from . import structured
from .branch_and_bound import BranchAndBound
from .convex import Cvxpy
from .errors import InvalidInput
from .frank_wolfe import FrankWolfe
from .hull import Domain, HullSolution, minimize
from .linear import Linear
from .pattern import (
    NM,
    CellPattern,
    Constraints,
    Neighbourhood,
    Pattern,
    PerLayer,
    PerRow,
    pattern_from_dict,
)
from .problem import MaskProblem
from .registry import SolverInfo, available, get_solver, register, solve
from .saliency import RIA, Magnitude, Wanda
from .scip import Scip
from .semidefinite import Semidefinite
from .solution import MaskSolution, Status, TracePoint
from .solver import Outcome, Progress, Solver
from .swap import Swap

DISTRIBUTION = "mipprune"
"""The distribution this package belongs to; `import mipprune` checks it."""

__all__ = [
    "NM",
    "RIA",
    "BranchAndBound",
    "CellPattern",
    "Constraints",
    "Cvxpy",
    "Domain",
    "FrankWolfe",
    "HullSolution",
    "InvalidInput",
    "Linear",
    "Magnitude",
    "MaskProblem",
    "MaskSolution",
    "Neighbourhood",
    "Outcome",
    "Pattern",
    "PerLayer",
    "PerRow",
    "Progress",
    "Scip",
    "Semidefinite",
    "Solver",
    "SolverInfo",
    "Status",
    "Swap",
    "TracePoint",
    "Wanda",
    "available",
    "get_solver",
    "minimize",
    "pattern_from_dict",
    "register",
    "solve",
    "structured",
]
