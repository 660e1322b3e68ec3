"""Prune large language models by optimisation, layer by layer.

`prune` prunes a transformers model in place; `solvers` holds the problems and the solvers.
"""

import solvers as _solvers

if getattr(_solvers, "DISTRIBUTION", None) != "mipprune":
    raise ImportError(
        "mipprune needs its own package 'solvers', but 'import solvers' finds "
        f"{getattr(_solvers, '__file__', None) or list(_solvers.__path__)}; "
        "rename that file or run from another folder."
    )

from solvers import InvalidInput

from .allocate import Allocation
from .calibration import Windows
from .checkpoint import load_masks, load_order, save
from .choice import Choice
from .evaluate import Estimate, Perplexity, SideBySide, perplexity, side_by_side
from .layer_step import LayerStep
from .masks import StartMasks, apply_masks, keep_zeros, zero_pattern
from .models import LoadedModel, load_model
from .observer import Observer
from .permute import apply_order
from .prune import layer_problem, prune
from .record import LayerResult, PruneReport
from .rules import Rules
from .settings import Settings
from .structured import Latency, Method, ShrinkReport, Shrunk, shrink
from .surrogate import Surrogate

__all__ = [
    "Allocation",
    "Choice",
    "Estimate",
    "InvalidInput",
    "Latency",
    "LayerResult",
    "LayerStep",
    "LoadedModel",
    "Method",
    "Observer",
    "Perplexity",
    "PruneReport",
    "Rules",
    "Settings",
    "ShrinkReport",
    "Shrunk",
    "SideBySide",
    "StartMasks",
    "Surrogate",
    "Windows",
    "apply_masks",
    "apply_order",
    "keep_zeros",
    "layer_problem",
    "load_masks",
    "load_model",
    "load_order",
    "perplexity",
    "prune",
    "save",
    "shrink",
    "side_by_side",
    "zero_pattern",
]
