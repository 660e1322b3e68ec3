"""Frank-Wolfe on the relaxation (SparseFW, arXiv 2510.13713)."""

from .solver import FrankWolfe, relaxed_mask

__all__ = ["FrankWolfe", "relaxed_mask"]
