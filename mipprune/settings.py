"""What a run is asked to do, checked before a model is touched."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from solvers import NM, InvalidInput, get_solver
from solvers.registry import DEFAULT_START

from .allocate import Allocation
from .choice import Choice, Chosen
from .layer_step import LayerStep
from .masks import StartMasks
from .models import PrunableLayer, all_layers
from .placement import Placement
from .rules import Rules
from .surrogate import Targets

Grams = Literal["pruned", "sequential", "dense"]

Permute = Literal["neurons", "values", "residual"]
"""What can be permuted: MLP neurons, the values in each head, the residual stream."""

ALL = "all"

CURRENT = "current"
"""As a start: the mask of the weights that are not zero, for a model that is sparse already."""


@dataclass(frozen=True)
class Settings:
    """The choices that decide a run's masks and weights.

    Parameters
    ----------
    rules
        The layers' sparsity patterns.
    solver, start
        Names out of `solvers.available`; a start of None leaves it to the solver. `CURRENT` starts
        from the weights that are not zero, which have to follow the pattern. A run may also start
        from masks, each moved to the nearest of its layer's pattern.
    solver_options
        The solver's own options. Solvers that take the inputs' ``mean`` are given it.
    grams
        "pruned": a block's inputs come from the pruned blocks before it; "sequential": besides, a
        layer's come from what was pruned before it in its block (`Stages`); "dense": inputs come
        from the unpruned model.
    samples, seqlen
        Calibration windows and tokens in each (at most the model's positions).
    batch_size
        Windows per forward; None leaves it to the device's free memory.
    seed
        Of the windows and of the solver.
    layer_step
        How masks are judged and weights updated after them; by default the plain layer loss, and
        weights stay as they are.
    allocation
        Shares out the pattern's sparsity among the layers; None gives it to every layer.
    permute
        What is put in an order that suits a pattern N:M before the run, see `mipprune.permute`:
        some of `Permute`, with commas between, or "all"; None leaves the order as it is.
    time_budget
        Seconds for the run as a whole, see `TimeBudget`; None lets every search end by itself. A
        resumed run has the unfinished layers' part of it.
    held_out
        Share of the calibration windows that is kept apart; what layers lose on it is recorded.
    choice
        An option of which every layer, or the model, takes the value of least held-out loss.

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
    batch_size: int | None = None
    seed: int = 0
    layer_step: LayerStep = field(default_factory=LayerStep)
    allocation: Allocation | None = None
    permute: str | None = None
    time_budget: float | None = None
    held_out: float | None = None
    choice: Choice | None = None

    def __post_init__(self) -> None:
        chosen = get_solver(self.solver, **self.solver_options)
        if self.start is None and chosen.needs_start:
            object.__setattr__(self, "start", DEFAULT_START)
        for name in self.solvers:
            get_solver(name)
        self._check_targets()
        self._check_permute()
        if self.time_budget is not None and not self.time_budget > 0:
            raise InvalidInput(
                f"A time budget of {self.time_budget} s leaves no time; give a positive number."
            )
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise InvalidInput(
                f"held_out={self.held_out} is outside (0, 1); it is a share of the windows."
            )
        if self.choice is not None and self.held_out is None:
            raise InvalidInput(
                f"'{self.choice.option}' is chosen by the loss on held-out windows; give a share "
                "of them too, such as --held-out 0.25."
            )
        if self.choice is not None and self.time_budget is not None:
            raise InvalidInput("A time budget is for one search per layer; leave the choice out.")
        self.candidates()
        if self.grams not in get_args(Grams):
            raise InvalidInput(
                f"Grams are taken from 'pruned', 'sequential' or 'dense', not '{self.grams}'."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise InvalidInput(f"batch_size={self.batch_size} runs nothing; give at least 1.")

    def _check_targets(self) -> None:
        if self.targets == "own":
            return
        if self.grams == "dense":
            raise InvalidInput(
                "With inputs from the dense model a layer's targets are the dense model's anyway; "
                "leave dense targets out, or the dense Gram matrices."
            )
        if self.choice is not None:
            raise InvalidInput(
                f"'{self.choice.option}' is chosen by what layers lose of their own output, which "
                "is not what dense targets aim at; leave one of the two out."
            )
        if self.layer_step.targets_by_masks and get_solver(self.solver).ignores_linear:
            raise InvalidInput(
                f"Solver '{self.solver}' knows no linear term, which dense targets are where kept "
                "weights stay; give --update least_squares, or another solver such as swap."
            )

    def _check_permute(self) -> None:
        if self.permute is None:
            return
        unknown = set(self.permuted) - set(get_args(Permute))
        if unknown:
            raise InvalidInput(
                f"'{min(unknown)}' is nothing to permute; give {', '.join(get_args(Permute))}, "
                f"some of these with commas between, or {ALL}."
            )
        patterns = [self.rules.default, *(pattern for _, pattern in self.rules.rules)]
        if not any(isinstance(pattern, NM) for pattern in patterns):
            raise InvalidInput(
                f"The order of inputs matters to a keep:group pattern alone, and the pattern is "
                f"{self.rules.default}; give --pattern, such as 2:4, or leave --permute out."
            )
        if self.start == CURRENT or isinstance(self.start, StartMasks):
            raise InvalidInput(
                "Masks to start from are for the order that inputs have now; leave --start or "
                "--permute out."
            )

    def layers(self, placement: Placement) -> list[PrunableLayer]:
        """A model's layers that are pruned, in order."""
        layers = all_layers(placement.blocks_name, placement.blocks)
        return [layer for layer in layers if self.rules.pattern_for(layer.name) is not None]

    @property
    def chooses_for_model(self) -> bool:
        """Whether one value of an option is to be chosen for all layers."""
        return self.choice is not None and self.choice.scope == "model"

    @property
    def targets(self) -> Targets:
        """What layers aim at."""
        return self.layer_step.surrogate.targets

    def candidates(self) -> list[Settings]:
        """These settings with nothing left open: one for each value of the choice."""
        if self.choice is None:
            return [self]
        applied = (
            self.choice.applied(value, self.layer_step, self.solver_options)
            for value in self.choice.values
        )
        return [
            replace(self, layer_step=step, solver_options=options, choice=None)
            for step, options in applied
        ]

    def decided(self, chosen: Chosen) -> Settings:
        """These settings with the value that was chosen, and nothing left open."""
        return self.candidates()[chosen.place]

    @property
    def permuted(self) -> tuple[str, ...]:
        """What is permuted, by the names of `Permute`."""
        if self.permute is None:
            return ()
        if self.permute == ALL:
            return get_args(Permute)
        return tuple(one.strip() for one in self.permute.split(","))

    @property
    def windows_at_once(self) -> int:
        """The batch size, which is settled before a run begins."""
        assert self.batch_size is not None, "the batch size is settled by now"
        return self.batch_size

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
            "permute": self.permute,
            "time_budget": self.time_budget,
            "held_out": self.held_out,
            "choice": self.choice and self.choice.to_dict(),
            "pattern": self.rules.default.to_dict(),
            "rules": self.rules.to_dict(),
            "grams": self.grams,
            "samples": self.samples,
            "seqlen": self.seqlen,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
