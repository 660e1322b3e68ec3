"""Structured pruning: neurons and attention groups removed, the model smaller."""

from .choice import GroupResult, Method
from .report import ShrinkReport
from .shrink import Shrunk, shrink

__all__ = ["GroupResult", "Method", "ShrinkReport", "Shrunk", "shrink"]
