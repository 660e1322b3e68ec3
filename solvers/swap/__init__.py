"""1-swap local search (SparseSwaps, arXiv 2512.10922), to a proven 1-swap optimum."""

from .search import Swap

__all__ = ["Swap"]
