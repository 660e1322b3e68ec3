"""The run: every linear layer of every block as a `MaskProblem`, solved and written back."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from solvers import (
    InvalidInput,
    MaskProblem,
    Pattern,
    PerLayer,
    get_solver,
    solve,
    updated_loss,
)
from solvers.registry import DEFAULT_START

from .calibration import Windows, check_tokens, read_windows, window_length
from .environment import environment
from .gram import Gram
from .layer_step import LayerStep
from .masks import StartMasks, mask_digest
from .models import Coverage, PrunableLayer, coverage, find_blocks, prunable_layers
from .rules import Rules
from .surrogate import Inputs
from .walk import BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Grams = Literal["pruned", "dense"]

CURRENT = "current"
"""As a start: the mask of the weights that are not zero, for a model that is sparse already."""

REFERENCE = "wanda"
"""Every layer's loss is also given relative to this solver's mask on the same problem."""

_ZERO_TOKENS = "saw no calibration token: pruned by magnitude"


@dataclass(frozen=True)
class LayerResult:
    """What was done to one layer. Losses are squared output changes per token, float64.

    Attributes
    ----------
    name, rows, inputs
        The layer and its shape.
    tokens
        Calibration tokens it saw.
    dead_inputs
        Inputs that were always zero.
    sparsity
        Share of its weights removed.
    loss_start
        Of the mask that the solver started from; None for a solver without a start.
    loss
        Of the mask that was written, with the weights as they were.
    updated_loss
        With the weights as they were written.
    loss_reference
        Of `REFERENCE`'s mask on the same problem.
    surrogate_loss
        Of the mask, by what masks were judged by; ``loss`` if that is the plain loss.
    relative_error
        ``updated_loss`` as a share of the mean square of the dense output.
    status
        Why the solver stopped.
    seconds
        Of solving.
    stats
        The solver's own counts.
    note
        Anything out of the ordinary; empty otherwise.
    """

    name: str
    rows: int
    inputs: int
    tokens: int
    dead_inputs: int
    sparsity: float
    loss_start: float | None
    loss: float
    updated_loss: float
    loss_reference: float
    surrogate_loss: float
    relative_error: float
    status: str
    seconds: float
    stats: dict[str, Any]
    note: str = ""


@dataclass
class PruneReport:
    """Everything needed to repeat a run and to judge it."""

    settings: dict[str, Any]
    calibration: dict[str, Any]
    environment: dict[str, Any]
    coverage: Coverage
    replay_error: float
    layers: list[LayerResult] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Summed layer loss."""
        return sum(layer.loss for layer in self.layers)

    @property
    def updated_loss(self) -> float:
        """Summed layer loss with the weights as they were written."""
        return sum(layer.updated_loss for layer in self.layers)

    @property
    def loss_start(self) -> float | None:
        """Summed layer loss of the starts; None if the solver had none."""
        starts = [layer.loss_start for layer in self.layers if layer.loss_start is not None]
        return sum(starts) if len(starts) == len(self.layers) else None

    @property
    def loss_reference(self) -> float:
        """Summed layer loss of `REFERENCE` on the same problems."""
        return sum(layer.loss_reference for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share removed of all prunable weights."""
        removed = sum(layer.sparsity * layer.rows * layer.inputs for layer in self.layers)
        return removed / self.coverage.prunable

    @property
    def mask_hash(self) -> str:
        """SHA-256 over the names, shapes and packed masks of all layers."""
        return mask_digest(self.masks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, without the masks themselves."""
        return {
            "format": 1,
            "settings": self.settings,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "environment": self.environment,
            "coverage": {**asdict(self.coverage), "share": self.coverage.share},
            "replay_error": self.replay_error,
            "sparsity": self.sparsity,
            "loss_start": self.loss_start,
            "loss": self.loss,
            "updated_loss": self.updated_loss,
            "loss_reference": self.loss_reference,
            "reference": REFERENCE,
            "mask_hash": self.mask_hash,
            "warnings": self.warnings,
            "seconds": self.seconds,
            "layers": [asdict(layer) for layer in self.layers],
        }


class Observer:
    """Told how a run proceeds; methods do nothing unless overridden."""

    def begin(self, blocks: int, weights: int) -> None:
        """The model has so many blocks and prunable weights."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def layer(self, block: int, result: LayerResult) -> None:
        """A layer of block ``block`` is finished."""


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str | Windows | None,
    pattern: Pattern | Rules,
    solver: str = "swap",
    start: str | StartMasks | None = None,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 8,
    grams: Grams = "pruned",
    seed: int = 0,
    blocks: str | None = None,
    solver_options: dict[str, Any] | None = None,
    token_cache: str | Path | None = None,
    layer_step: LayerStep | None = None,
    observer: Observer | None = None,
) -> PruneReport:
    """Prune a causal language model in place, block by block.

    Parameters
    ----------
    model, tokenizer
        From transformers; the model stays on its device.
    calibration
        A text source (see `read_windows`; None is Python's documentation) or ready windows.
    pattern
        Sparsity pattern of every layer, or rules that give each layer its own or none. Embeddings
        and language-model head stay dense.
    solver, start
        Names out of `solvers.available`; a start of None leaves it to the solver. `CURRENT` starts
        from the weights that are not zero, which have to follow the pattern. A run may also start
        from masks, each moved to the nearest of its layer's pattern.
    samples, seqlen
        Calibration windows and tokens in each (at most the model's positions).
    batch_size
        Windows per forward.
    grams
        "pruned": a block's inputs come from the pruned blocks before it; "dense": from the
        unpruned model.
    seed
        Of the windows and of the solver.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    solver_options
        The solver's own options. Solvers that take the inputs' ``mean`` are given it.
    token_cache
        Folder of token files, see `read_windows`.
    layer_step
        How masks are judged and weights updated after them; None for the plain layer loss and
        weights as they are.
    observer
        Told about progress.

    Raises
    ------
    InvalidInput
        If a name, the text or the model cannot be worked with. Checks come before the first
        weight is changed, but for activations that overflow and patterns that do not fit.
    """
    observer, layer_step = observer or Observer(), layer_step or LayerStep()
    began = time.perf_counter()
    chosen = get_solver(solver, **(solver_options or {}))
    if start is None and chosen.needs_start:
        start = DEFAULT_START
    rules = pattern if isinstance(pattern, Rules) else Rules(pattern)
    if layer_step.surrogate.dense_targets:
        raise InvalidInput("A run collects no products of dense and pruned inputs; leave them out.")
    if grams not in ("pruned", "dense"):
        raise InvalidInput(f"Grams are taken from 'pruned' or 'dense', not '{grams}'.")
    blocks_name, block_list = find_blocks(model, blocks)
    covered = coverage(blocks_name, block_list, model)
    layers = all_layers(blocks_name, block_list)
    rules.check(layer.name for layer in layers)
    chosen_layers = [layer for layer in layers if rules.pattern_for(layer.name) is not None]
    for layer in chosen_layers:
        _check_layer(layer, rules, solver, start)
    model.eval()
    observer.begin(len(block_list), sum(layer.weight.numel() for layer in chosen_layers))
    observer.phase("calibration text")
    windows = calibration_windows(model, tokenizer, calibration, samples, seqlen, seed, token_cache)
    observer.phase("replay check and capture")
    walk = BlockWalk(model, blocks_name, block_list, windows.tokens, batch_size)
    report = PruneReport(
        settings={
            "solver": solver,
            "start": start.source if isinstance(start, StartMasks) else start,
            "start_sha256": start.digest if isinstance(start, StartMasks) else None,
            "solver_options": solver_options or {},
            "layer_step": layer_step.to_dict(),
            "pattern": rules.default.to_dict(),
            "rules": rules.to_dict(),
            "grams": grams,
            "samples": samples,
            "seqlen": seqlen,
            "batch_size": batch_size,
            "seed": seed,
            "blocks": blocks_name,
        },
        calibration={
            "source": windows.source,
            "windows": len(windows.tokens),
            "length": windows.tokens.shape[1],
            "sha256": windows.digest,
            **windows.origin,
        },
        environment=model_environment(model),
        coverage=covered,
        replay_error=walk.replay_error,
    )
    if covered.share < 0.95:
        left = ", ".join(covered.uncovered[:4]) + (", ..." if covered.uncovered[4:] else "")
        report.warnings.append(
            f"Only {covered.share:.0%} of the block weights are prunable; left dense: {left}."
        )
    if len(windows.tokens) < samples:
        report.warnings.append(
            f"The text gave {len(windows.tokens)} windows of {windows.tokens.shape[1]} tokens, "
            f"not {samples}."
        )
    for index in range(len(walk)):
        observer.phase(f"{index}: Gram matrices")
        step = walk.visit(index)
        for layer in step.layers:
            layer_pattern = rules.pattern_for(layer.name)
            if layer_pattern is None:
                continue
            observer.phase(layer.name.removeprefix(f"{blocks_name}."))
            gram, options = step.grams.gram(layer), solver_options or {}
            result, mask = _prune_layer(
                layer, gram, layer_pattern, solver, start, seed, options, layer_step
            )
            report.layers.append(result)
            report.masks[layer.name] = mask.cpu()
            if result.note:
                report.warnings.append(f"{layer.name} {result.note}.")
            observer.layer(index, result)
        if index + 1 < len(walk):
            walk.leave(index, rerun=grams == "pruned")
    report.seconds = time.perf_counter() - began
    return report


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str | Windows | None,
    samples: int,
    seqlen: int,
    seed: int,
    token_cache: str | Path | None = None,
) -> Windows:
    """Windows to calibrate on, no longer than the model's positions."""
    windows = calibration
    if not isinstance(windows, Windows):
        length = window_length(model.config, seqlen)
        windows = read_windows(
            windows, "calibration", tokenizer, length, samples, seed, cache=token_cache
        )
    check_tokens(model, windows)
    return windows


def layer_problem(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: str | Windows | None,
    layer: str,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    blocks: str | None = None,
) -> MaskProblem:
    """One layer of the dense model as a problem (with a placeholder pattern of 50 %).

    Parameters are those of `prune`; ``layer`` is the full name of a linear layer.

    Raises
    ------
    InvalidInput
        If there is no such layer (the sentence lists some that there are).
    """
    blocks_name, block_list = find_blocks(model, blocks)
    names = [found.name for found in all_layers(blocks_name, block_list)]
    if layer not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise InvalidInput(f"There is no prunable layer '{layer}'; the layers are {shown}")
    windows = calibration_windows(model, tokenizer, calibration, samples, seqlen, seed)
    walk = BlockWalk(model, blocks_name, block_list, windows.tokens, batch_size)
    for index in range(len(walk)):
        step = walk.visit(index)
        for found in step.layers:
            if found.name == layer:
                gram = step.grams.gram(found)
                return MaskProblem(found.weight.float(), gram.matrix, PerLayer(sparsity=0.5))
        walk.leave(index, rerun=False)
    raise AssertionError("a layer found before must be found again")


def all_layers(blocks_name: str, blocks: nn.ModuleList) -> list[PrunableLayer]:
    """The prunable layers of all blocks, in order."""
    return [
        layer
        for index, block in enumerate(blocks)
        for layer in prunable_layers(block, f"{blocks_name}.{index}")
    ]


def model_environment(model: nn.Module) -> dict[str, Any]:
    """The record's environment, with the type that the model computes in."""
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {**environment(parameter.device, ["transformers"]), "dtype": dtype}


def _check_layer(
    layer: PrunableLayer, rules: Rules, solver: str, start: str | StartMasks | None
) -> None:
    rows, inputs = layer.weight.shape
    pattern = rules.pattern_for(layer.name)
    assert pattern is not None, "only layers that are pruned are checked"
    names = [solver] if start == CURRENT or not isinstance(start, str) else [solver, start]
    for name in names:
        reason = get_solver(name).unable(pattern)
        if reason is not None:
            raise InvalidInput(reason)
    if isinstance(start, StartMasks):
        start.check(layer)
    try:
        pattern.check((rows, inputs))
    except InvalidInput as error:
        raise InvalidInput(f"Layer {layer.name}: {error}") from None
    if not bool(torch.isfinite(layer.weight).all()):
        raise InvalidInput(f"Layer {layer.name} has NaN or infinite weights; mend the model first.")
    if start == CURRENT:
        mask = layer.weight != 0
        if not pattern.is_feasible(mask):
            raise InvalidInput(
                f"Layer {layer.name} has {1 - float(mask.double().mean()):.1%} zeros, which do not "
                f"follow the pattern {pattern}; start from a solver's mask, such as wanda."
            )


def _prune_layer(
    layer: PrunableLayer,
    gram: Gram,
    pattern: Pattern,
    solver: str,
    start: str | StartMasks | None,
    seed: int,
    options: dict[str, Any],
    layer_step: LayerStep,
) -> tuple[LayerResult, Tensor]:
    """Solve one layer and write its weight into the model."""
    began = time.perf_counter()
    inputs = Inputs(gram.matrix, gram.mean)
    plain = MaskProblem(layer.weight, gram.matrix, pattern)
    problem = layer_step.problem(layer.weight, inputs, pattern)
    if "mean" in get_solver(solver).options():
        options = {"mean": gram.mean, **options}
    note = gram.note
    started: Tensor | None = None
    if gram.tokens == 0:
        note = _ZERO_TOKENS
        solution = solve(problem, "magnitude", seed=seed)
    elif start is None:
        solution = solve(problem, solver, seed=seed, **options)
    else:
        if isinstance(start, StartMasks):
            started = start.solution(layer.name, problem).mask
        elif start == CURRENT:
            started = layer.weight != 0
        else:
            started = solve(problem, start, seed=seed).mask
        solution = solve(problem, solver, start=started, seed=seed, **options)
    updated = layer_step.updated(layer.weight, inputs, solution.mask)
    seconds = time.perf_counter() - began

    loss_reference = float(plain.objective(solve(plain, REFERENCE).mask).sum())
    loss = float(plain.objective(solution.mask).sum())
    after = loss
    if not layer_step.keeps_weights:
        after = float(updated_loss(layer.weight, gram.matrix, updated).sum())
    energy = float(plain.output_energy().sum())
    rows, columns = plain.shape
    result = LayerResult(
        name=layer.name,
        rows=rows,
        inputs=columns,
        tokens=gram.tokens,
        dead_inputs=int((gram.matrix.diagonal() == 0).sum()),
        sparsity=1.0 - float(solution.mask.double().mean()),
        loss_start=None if started is None else float(plain.objective(started).sum()),
        loss=loss,
        updated_loss=after,
        loss_reference=loss_reference,
        surrogate_loss=float(solution.objective.sum()),
        relative_error=after / energy if energy > 0 else 0.0,
        status=solution.status.name,
        seconds=seconds,
        stats=solution.stats,
        note=note,
    )
    layer.weight.copy_(updated)  # last: the problem is a view of the weight
    return result, solution.mask
