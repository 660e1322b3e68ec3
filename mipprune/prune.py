"""The run: every linear layer of every block as a `MaskProblem`, solved and written back."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from solvers import InvalidInput, MaskProblem, Pattern, PerLayer

from .allocate import Allocation
from .budget import shape_of
from .calibration import Windows, check_tokens, read_windows, window_length
from .choice import Choice
from .environment import environment
from .estimate import choose_batch
from .held_out import Judged, split_windows, together
from .journal import NO_JOURNAL, Journal
from .layer import LayerSolver, check_layer
from .layer_step import LayerStep
from .masks import StartMasks
from .models import Coverage, all_layers, coverage, find_blocks
from .observer import Observer
from .placement import Placement
from .ranks import ALONE, Ranks
from .record import PruneReport
from .rules import Rules
from .settings import Grams, Settings
from .share_out import feasible, shared_out
from .time_budget import NOTE, TimeBudget
from .walk import HOST_BYTES, BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    batch_size: int | None = None,
    grams: Grams = "pruned",
    seed: int = 0,
    blocks: str | None = None,
    solver_options: dict[str, Any] | None = None,
    token_cache: str | Path | None = None,
    layer_step: LayerStep | None = None,
    allocation: Allocation | None = None,
    time_budget: float | None = None,
    held_out: float | None = None,
    choice: Choice | None = None,
    placement: Placement | None = None,
    journal: Journal = NO_JOURNAL,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
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
        Windows per forward; None chooses by the device's free memory.
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
    allocation
        Shares out the pattern's sparsity among the layers; None gives it to every layer.
    time_budget
        Seconds for the run as a whole, see `TimeBudget`; None lets every search end by itself. A
        resumed run has the unfinished layers' part of it.
    held_out
        Share of the calibration windows that is kept apart; what layers lose on it is recorded.
    choice
        An option of which every layer takes the value of least held-out loss.
    placement
        Where the weights are, if not all on one device.
    journal
        Remembers finished layers, so that an interrupted run goes on from there.
    host_bytes
        Activations beyond this wait on disk.
    ranks
        The processes that share the run, if there are several.
    observer
        Told about progress.

    Raises
    ------
    InvalidInput
        If a name, the text or the model cannot be worked with. Checks come before the first
        weight is changed, but for activations that overflow and patterns that do not fit.
    """
    observer = observer or Observer()
    began = time.perf_counter()
    placement = placement or Placement(model, blocks)
    if batch_size is None:
        fitting = choose_batch(placement, window_length(model.config, seqlen))
        batch_size = min(ranks.gather_objects(fitting))
    rules = pattern if isinstance(pattern, Rules) else Rules(pattern)
    layers = all_layers(placement.blocks_name, placement.blocks)
    rules.check(layer.name for layer in layers)
    allocation = feasible(allocation, rules, placement, observer.warning)
    settings = Settings(
        rules,
        solver,
        start,
        solver_options or {},
        grams,
        samples,
        seqlen,
        batch_size,
        seed,
        layer_step or LayerStep(),
        allocation,
        time_budget,
        held_out,
        choice,
    )
    if time_budget is not None and ranks.size > 1:
        raise InvalidInput(
            "Several processes would each end a search at another point; a time budget is for one."
        )
    covered = coverage(placement.blocks_name, placement.blocks, model)
    chosen = [layer for layer in layers if rules.pattern_for(layer.name) is not None]
    for layer in chosen:
        check_layer(layer, settings)
    model.eval()
    observer.begin(len(placement.blocks), sum(layer.weight.numel() for layer in chosen))
    observer.phase("calibration text")
    windows = calibration_windows(model, tokenizer, calibration, samples, seqlen, seed, token_cache)
    given, apart = len(windows.tokens), None
    if held_out is not None:
        windows, apart = split_windows(windows, held_out)

    def captured(windows: Windows) -> BlockWalk:
        observer.phase("replay check and capture")
        return BlockWalk(
            placement,
            windows.tokens,
            settings.batch_size,
            propagate=grams == "pruned",
            host_bytes=host_bytes,
            ranks=ranks,
            warn=observer.warning,
        )

    walk = captured(windows)
    report = PruneReport(
        settings={**settings.to_dict(), "blocks": placement.blocks_name},
        calibration=_about(windows, apart),
        environment=model_environment(model, placement.device),
        coverage=covered,
        replay_error=walk.replay_error,
        warnings=_notes(settings, covered, given, windows.tokens.shape[1]),
    )
    finished = ranks.gather_objects(journal.begin(report))[0]
    if allocation is not None:
        allocated = finished.rules
        if allocated is None:
            del walk  # its activations make room for those of the dense pass
            allocated = shared_out(
                settings, placement, windows,
                host_bytes=host_bytes, ranks=ranks, observer=observer,
            )  # fmt: skip
            journal.allocate(allocated)
            walk = captured(windows)
        rules = allocated
        settings = replace(settings, rules=rules)
        report.settings["rules"] = rules.to_dict()
    budget = None
    if time_budget is not None:
        shapes = {layer.name: shape_of(layer) for layer in chosen}
        passed = time.perf_counter() - began
        budget = TimeBudget.going_on(time_budget, passed, shapes, finished.names)
    solve_layer = Judged(
        [LayerSolver(one, ranks, observer.warning, budget) for one in settings.candidates()],
        choice,
    )
    walk_apart = None if apart is None else captured(apart)
    for step, step_apart in together(walk, walk_apart, grams == "pruned"):
        for layer in step.layers:
            if rules.pattern_for(layer.name) is None:
                continue
            pruned = finished.get(layer)
            if pruned is None:
                observer.phase(f"{step.index}: Gram matrices")
                gram = step.grams.gram(layer)
                gram_apart = None if step_apart is None else step_apart.grams.gram(layer)
                observer.phase(layer.name.removeprefix(f"{placement.blocks_name}."))
                pruned = solve_layer(layer, gram, gram_apart)
                journal.finish(layer, pruned)
                step.grams.release(layer)
                if step_apart is not None:
                    step_apart.grams.release(layer)
            step.prune(layer, pruned.mask, pruned.weight)
            report.add(pruned)
            observer.layer(step.index, pruned.result)
        observer.phase(f"{step.index}: outputs")
    report.seconds = time.perf_counter() - began
    return report


def _about(windows: Windows, apart: Windows | None) -> dict[str, Any]:
    """The record's calibration."""
    about: dict[str, Any] = {
        "source": windows.source,
        "windows": len(windows.tokens),
        "length": windows.tokens.shape[1],
        "sha256": windows.digest,
        **windows.origin,
    }
    if apart is not None:
        about["held_out"] = {"windows": len(apart.tokens), "sha256": apart.digest}
    return about


def _notes(settings: Settings, covered: Coverage, windows: int, length: int) -> list[str]:
    """What is out of the ordinary before anything is pruned."""
    notes = []
    if covered.share < 0.95:
        left = ", ".join(covered.uncovered[:4]) + (", ..." if covered.uncovered[4:] else "")
        notes.append(
            f"Only {covered.share:.0%} of the block weights are prunable; left dense: {left}."
        )
    if windows < settings.samples:
        notes.append(f"The text gave {windows} windows of {length} tokens, not {settings.samples}.")
    if settings.time_budget is not None:
        notes.append(NOTE)
    return notes


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
    for step in BlockWalk(Placement(model, blocks), windows.tokens, batch_size):
        for found in step.layers:
            if found.name == layer:
                gram = step.grams.gram(found)
                return MaskProblem(found.weight.float(), gram.matrix, PerLayer(sparsity=0.5))
    raise AssertionError("a layer found before must be found again")


def model_environment(model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """The record's environment, with the type that the model computes in."""
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {**environment(device or parameter.device, ["transformers"]), "dtype": dtype}
