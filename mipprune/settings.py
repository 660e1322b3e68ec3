"""What a run is asked to do, checked before a model is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from solvers import InvalidInput, get_solver
from solvers.registry import DEFAULT_START

from .allocate import Allocation
from .layer_step import LayerStep
from .masks import StartMasks
from .rules import Rules

Grams = Literal["pruned", "dense"]

CURRENT = "current"
"""As a start: the mask of the weights that are not zero, for a model that is sparse already."""


@dataclass(frozen=True)
class Settings:
    """The choices that decide a run's masks. Field by field as in `mipprune.prune`.

    Raises
    ------
    InvalidInput
        If a name or an option is unknown.
    """

    rules: Rules
    solver: str = "swap"
    start: str | StartMasks | None = None
    solver_options: dict[str, Any] = field(default_factory=dict)
    grams: Grams = "pruned"
    samples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    seed: int = 0
    layer_step: LayerStep = field(default_factory=LayerStep)
    allocation: Allocation | None = None

    def __post_init__(self) -> None:
        chosen = get_solver(self.solver, **self.solver_options)
        if self.start is None and chosen.needs_start:
            object.__setattr__(self, "start", DEFAULT_START)
        for name in self.solvers:
            get_solver(name)
        if self.layer_step.surrogate.dense_targets:
            raise InvalidInput(
                "A run collects no products of dense and pruned inputs; leave them out."
            )
        if self.grams not in ("pruned", "dense"):
            raise InvalidInput(f"Grams are taken from 'pruned' or 'dense', not '{self.grams}'.")
        if self.batch_size < 1:
            raise InvalidInput(f"batch_size={self.batch_size} runs nothing; give at least 1.")

    @property
    def solvers(self) -> list[str]:
        """Names of the solvers that take part."""
        named = isinstance(self.start, str) and self.start != CURRENT
        return [self.solver, str(self.start)] if named else [self.solver]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        masks = self.start if isinstance(self.start, StartMasks) else None
        return {
            "solver": self.solver,
            "start": self.start if masks is None else masks.source,
            "start_sha256": None if masks is None else masks.digest,
            "solver_options": self.solver_options,
            "layer_step": self.layer_step.to_dict(),
            "allocation": self.allocation and self.allocation.to_dict(),
            "pattern": self.rules.default.to_dict(),
            "rules": self.rules.to_dict(),
            "grams": self.grams,
            "samples": self.samples,
            "seqlen": self.seqlen,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
