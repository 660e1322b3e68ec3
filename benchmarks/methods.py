"""The methods that benchmarks of whole models compare, as options of `mipprune.prune`."""

from __future__ import annotations

from typing import Any

from mipprune.allocate import Allocation
from mipprune.choice import Choice
from mipprune.layer_step import LayerStep, Update
from mipprune.surrogate import Surrogate

PUBLISHED = ("magnitude", "wanda", "ria", "dsnot", "sparsefw", "sparseswaps", "sparsegpt", "alps")
"""Each as its paper describes it."""


def method(
    solver: str,
    update: Update = "none",
    damping: float = 1e-2,
    *,
    allocated: bool = False,
    permuted: str | None = None,
    sequential: bool = False,
    options: dict[str, Any] | None = None,
    choice: Choice | None = None,
    **surrogate: Any,
) -> dict[str, Any]:
    """Options of a run; ``surrogate`` are those of `Surrogate`.

    What is left to a choice is chosen by the loss on a quarter of the windows, held out.
    """
    return {
        "solver": solver,
        "solver_options": options or {},
        "layer_step": LayerStep(Surrogate(**surrogate), update, damping),
        "allocation": Allocation() if allocated else None,
        "permute": permuted,
        "grams": "sequential" if sequential else "pruned",
        "choice": choice,
        "held_out": None if choice is None else 0.25,
    }


SQUARES: Update = "least_squares"
HALF: dict[str, Any] = {"shrink": 0.5}
INVERSE: dict[str, Any] = {"shrink": 0.5, "tokens": "inverse_norm"}
SHRINKS = ("shrink", (0.0, 0.25, 0.5, 0.75))
STREAM: dict[str, Any] = {"sequential": True, "dense_targets": 0.5, "stream": True}

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": method("magnitude"),
    "wanda": method("wanda"),
    "ria": method("ria"),
    "dsnot": method("dsnot"),
    "sparsefw": method("sparsefw"),
    "sparseswaps": method("sparseswaps"),
    "swap": method("swap"),
    "tabu": method("chain", options={"stages": [["tabu", {"iterations": 4000}]]}),
    "swap, shrink 0.5": method("swap", **HALF),
    "swap, shrink 0.5, fisher": method("swap", tokens="fisher", **HALF),
    "swap, shrink 0.5, fisher, 8 groups": method("swap", tokens="fisher", row_groups=8, **HALF),
    "swap, shrink 0.5, inverse norm": method("swap", **INVERSE),
    "swap, shrink by held-out loss, per layer": method("swap", choice=Choice(*SHRINKS)),
    "swap, shrink by held-out loss, per model": method("swap", choice=Choice(*SHRINKS, "model")),
    "swap, shrink 0.5, allocated": method("swap", allocated=True, **HALF),
    "swap, shrink 0.5, inverse norm, allocated": method("swap", allocated=True, **INVERSE),
    "wanda, permuted": method("wanda", permuted="neurons"),
    "ria, permuted": method("ria", permuted="neurons"),
    "swap, shrink 0.5, permuted": method("swap", permuted="neurons", **HALF),
    "wanda, all permuted": method("wanda", permuted="all"),
    "ria, all permuted": method("ria", permuted="all"),
    "swap, all permuted": method("swap", permuted="all"),
    "swap, shrink 0.5, all permuted": method("swap", permuted="all", **HALF),
    "swap, shrink 0.5, inverse norm, all permuted": method("swap", permuted="all", **INVERSE),
    "wanda + gain": method("wanda", "gain"),
    "ria + gain": method("ria", "gain"),
    "swap, shrink 0.5 + gain": method("swap", "gain", **HALF),
    "swap, shrink 0.5, inverse norm + gain": method("swap", "gain", **INVERSE),
    "swap, shrink 0.5, allocated + gain": method("swap", "gain", allocated=True, **HALF),
    "sparsegpt": method("sparsegpt", "sparsegpt"),
    "wanda + least squares": method("wanda", SQUARES),
    "swap + least squares": method("swap", SQUARES),
    "swap, shrink 0.5 + least squares": method("swap", SQUARES, **HALF),
    "alps": method("alps", SQUARES),
    "alps, damping 0.1": method("alps", SQUARES, 0.1),
    "alps, permuted": method("alps", SQUARES, permuted="neurons"),
    "alps, all permuted": method("alps", SQUARES, permuted="all"),
    "alps, sequential": method("alps", SQUARES, sequential=True),
    "alps, dense targets": method("alps", SQUARES, dense_targets=1.0),
    "alps, sequential, dense targets": method("alps", SQUARES, sequential=True, dense_targets=1.0),
    "alps, sequential, half stream targets": method("alps", SQUARES, **STREAM),
    "alps, sequential, half stream targets, permuted": method(
        "alps", SQUARES, permuted="neurons", **STREAM
    ),
    "alps, allocated": method("alps", SQUARES, allocated=True),
    "alps, allocated, damping 0.1": method("alps", SQUARES, 0.1, allocated=True),
    "alps, allocated, sequential, half stream targets": method(
        "alps", SQUARES, allocated=True, **STREAM
    ),
    "joint": method("joint", SQUARES),
    "joint, allocated": method("joint", SQUARES, allocated=True),
    "joint, sequential, half stream targets": method("joint", SQUARES, **STREAM),
}
