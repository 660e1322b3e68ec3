"""Tabu search over 1-swaps, beyond the first local optimum."""

from .search import Tabu

__all__ = ["Tabu"]
