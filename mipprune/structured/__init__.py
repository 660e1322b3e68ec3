"""Structured pruning: neurons and attention groups removed, the model smaller."""

from .choice import GroupResult, Method
from .latency import Latency
from .report import ShrinkReport
from .shrink import Shrunk, shrink

__all__ = ["GroupResult", "Latency", "Method", "ShrinkReport", "Shrunk", "shrink"]
