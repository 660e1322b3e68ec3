"""Branch and bound whose nodes are Frank-Wolfe relaxations solved in batches."""

from .solver import BranchAndBound

__all__ = ["BranchAndBound"]
