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

from .calibration import Windows
from .checkpoint import load_masks, save
from .evaluate import Perplexity, perplexity
from .models import LoadedModel, load_model
from .prune import LayerResult, Observer, PruneReport, layer_problem, prune

__all__ = [
    "InvalidInput",
    "LayerResult",
    "LoadedModel",
    "Observer",
    "Perplexity",
    "PruneReport",
    "Windows",
    "layer_problem",
    "load_masks",
    "load_model",
    "perplexity",
    "prune",
    "save",
]
