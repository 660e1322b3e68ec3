"""Mask selection for linear layers as an optimisation problem, and solvers for it.

State the problem once (`MaskProblem`), choose a pattern, and `solve` it by name; `available`
lists the solvers. This package knows rows, Gram matrices and patterns, and no transformer.
"""

from . import structured
from .alps import Alps
from .branch_and_bound import BranchAndBound
from .compose import BestOf, Chain, Restarts
from .convex import Cvxpy
from .dsnot import DSnoT
from .errors import InvalidInput, NoMask
from .frank_wolfe import FrankWolfe
from .hull import Domain, HullSolution, minimize
from .input_order import InputOrder, order_inputs, saliency_lost
from .joint import Joint
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
    removed_count,
)
from .presets import SparseFW, SparseSwaps
from .problem import MaskProblem
from .registry import SolverInfo, available, get_solver, prepare, register, solve
from .saliency import RIA, Magnitude, Wanda
from .scip import Scip
from .semidefinite import Semidefinite
from .solution import Evidence, MaskSolution, Status, TracePoint
from .solver import Outcome, Progress, Solver
from .sparsegpt import SparseGPT, SparseGPTUpdate
from .swap import Swap
from .tabu import Tabu
from .update import LeastSquares, unbiased_gain, updated_loss

DISTRIBUTION = "mipprune"
"""The distribution this package belongs to; `import mipprune` checks it."""

__all__ = [
    "NM",
    "RIA",
    "Alps",
    "BestOf",
    "BranchAndBound",
    "CellPattern",
    "Chain",
    "Constraints",
    "Cvxpy",
    "DSnoT",
    "Domain",
    "Evidence",
    "FrankWolfe",
    "HullSolution",
    "InputOrder",
    "InvalidInput",
    "Joint",
    "LeastSquares",
    "Linear",
    "Magnitude",
    "MaskProblem",
    "MaskSolution",
    "Neighbourhood",
    "NoMask",
    "Outcome",
    "Pattern",
    "PerLayer",
    "PerRow",
    "Progress",
    "Restarts",
    "Scip",
    "Semidefinite",
    "Solver",
    "SolverInfo",
    "SparseFW",
    "SparseGPT",
    "SparseGPTUpdate",
    "SparseSwaps",
    "Status",
    "Swap",
    "Tabu",
    "TracePoint",
    "Wanda",
    "available",
    "get_solver",
    "minimize",
    "order_inputs",
    "pattern_from_dict",
    "prepare",
    "register",
    "removed_count",
    "saliency_lost",
    "solve",
    "structured",
    "unbiased_gain",
    "updated_loss",
]
