"""Mask and weights together: swaps on the loss that least squares leaves."""

from .search import Joint

__all__ = ["Joint"]
