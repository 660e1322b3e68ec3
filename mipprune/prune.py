"""The run: every linear layer of every block as a `MaskProblem`, solved and written back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solvers import InvalidInput, MaskProblem, Pattern, PerLayer

from .budget import shape_of
from .calibration import Windows, calibration_windows, window_length
from .environment import model_environment
from .estimate import choose_batch
from .held_out import Judged, split_windows, together
from .journal import NO_JOURNAL, Journal
from .layer import LayerSolver, check_layer
from .masks import StartMasks
from .models import Coverage, all_layers, coverage, find_blocks
from .observer import Observer
from .permute import permutable
from .placement import Placement
from .preparation import needs_preparation, prepare
from .ranks import ALONE, Ranks
from .record import PruneReport
from .rules import Rules
from .settings import Settings
from .share_out import feasible
from .stages import Stages
from .surrogate import Targets
from .time_budget import NOTE, TimeBudget
from .token_weights import check_token_weights
from .walk import HOST_BYTES, BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    pattern: Pattern | Rules,
    solver: str = "swap",
    start: str | StartMasks | None = None,
    *,
    blocks: str | None = None,
    placement: Placement | None = None,
    token_cache: str | Path | None = None,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a causal language model in place, block by block.

    Parameters
    ----------
    model, tokenizer
        From transformers; the model stays on its device. Ready windows need no tokenizer.
    calibration
        A text source (see `read_windows`; None is Python's documentation) or ready windows.
    pattern
        Sparsity pattern of every layer, or rules that give each layer its own or none. Embeddings
        and language-model head stay dense.
    solver, start
        See `Settings`.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    placement
        Where the weights are, if not all on one device.
    token_cache
        Folder of token files, see `read_windows`.
    host_bytes
        Activations beyond this wait on disk.
    ranks
        The processes that share the run, if there are several.
    observer
        Told about progress.
    **options
        The other fields of `Settings`: samples, seqlen, layer_step, allocation and so on.

    Raises
    ------
    InvalidInput
        If a name, the text or the model cannot be worked with. Checks come before the first
        weight is changed, but for activations that overflow and patterns that do not fit.
    """
    return run(
        placement or Placement(model, blocks),
        tokenizer,
        calibration,
        Settings(Rules.of(pattern), solver, start, **options),
        token_cache=token_cache,
        host_bytes=host_bytes,
        ranks=ranks,
        observer=observer,
    )


def settled(
    settings: Settings,
    placement: Placement,
    ranks: Ranks = ALONE,
    warn: Callable[[str], None] = lambda _: None,
) -> Settings:
    """Settings with nothing left open that depends on the model.

    The batch size is what the device's free memory allows; an optional allocation that cannot be
    followed is dropped.

    Raises
    ------
    InvalidInput
        If rules name no layer, or if a permutation, an allocation that is not optional, or token
        weights cannot be had.
    """
    batch_size = settings.batch_size
    if batch_size is None:
        fitting = choose_batch(placement, window_length(placement.model.config, settings.seqlen))
        batch_size = min(ranks.gather_objects(fitting))
    layers = all_layers(placement.blocks_name, placement.blocks)
    settings.rules.check(layer.name for layer in layers)
    check_token_weights(settings.layer_step.surrogate, placement, settings.layers(placement))
    if settings.permuted:
        permutable(placement, settings.rules, settings.permuted)
    allocation = feasible(settings.allocation, settings.rules, placement, warn)
    return replace(settings, batch_size=batch_size, allocation=allocation)


def run(
    placement: Placement,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    settings: Settings,
    *,
    token_cache: str | Path | None = None,
    journal: Journal = NO_JOURNAL,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> PruneReport:
    """Prune a model in place, wherever its weights are.

    Parameters
    ----------
    placement
        Holds the model.
    tokenizer, calibration, token_cache, host_bytes, ranks, observer
        As of `prune`.
    settings
        What is to be done.
    journal
        Remembers finished layers, so that an interrupted run goes on from there.

    Raises
    ------
    InvalidInput
        As `prune` does.
    """
    observer = observer or Observer()
    began = time.perf_counter()
    model = placement.model
    settings = settled(settings, placement, ranks, observer.warning)
    if settings.time_budget is not None and ranks.size > 1:
        raise InvalidInput(
            "Several processes would each end a search at another point; a time budget is for one."
        )
    covered = coverage(placement.blocks_name, placement.blocks, model)
    chosen = settings.layers(placement)
    for layer in chosen:
        check_layer(layer, settings)
    model.eval()
    observer.begin(len(placement.blocks), sum(layer.weight.numel() for layer in chosen))
    observer.phase("calibration text")
    windows = calibration_windows(
        model, tokenizer, calibration, settings.samples, settings.seqlen, settings.seed, token_cache
    )
    given, apart = len(windows.tokens), None
    if settings.held_out is not None:
        windows, apart = split_windows(windows, settings.held_out)

    stages = Stages(ranks) if settings.grams == "sequential" else None

    def captured(windows: Windows, targets: Targets = "own") -> BlockWalk:
        observer.phase("replay check and capture")
        return BlockWalk(
            placement,
            windows.tokens,
            settings.windows_at_once,
            propagate=settings.grams != "dense",
            host_bytes=host_bytes,
            ranks=ranks,
            warn=observer.warning,
            stages=stages,
            targets=targets,
        )

    walk = captured(windows, settings.targets)
    report = PruneReport(
        settings={**settings.to_dict(), "blocks": placement.blocks_name},
        calibration=_about(windows, apart),
        environment=model_environment(model, placement.device),
        coverage=covered,
        replay_error=walk.replay_error,
        warnings=_notes(settings, covered, given, windows.tokens.shape[1]),
    )
    finished = ranks.gather_objects(journal.begin(report))[0]
    if needs_preparation(settings):
        del walk  # its activations make room for those of other passes
        prepared = prepare(
            settings,
            placement,
            windows,
            apart,
            captured,
            finished,
            journal,
            host_bytes=host_bytes,
            ranks=ranks,
            observer=observer,
        )
        settings = prepared.settings
        prepared.note_in(report)
        walk = captured(windows, settings.targets)
        walk.token_weights = prepared.weights
    budget = None
    if settings.time_budget is not None:
        shapes = {layer.name: shape_of(layer) for layer in chosen}
        passed = time.perf_counter() - began
        budget = TimeBudget.going_on(settings.time_budget, passed, shapes, finished.names)
    solve_layer = Judged(
        [LayerSolver(one, ranks, observer.warning, budget) for one in settings.candidates()],
        settings.choice,
    )
    walk_apart = None if apart is None else captured(apart)
    for step, step_apart in together(walk, walk_apart, settings.grams != "dense"):
        for layer in step.layers:
            if settings.rules.pattern_for(layer.name) is None:
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
            step.prune(layer, pruned.mask, pruned.weight, pruned.bias)
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
                # The weight is a view of the model, which may be pruned later on.
                weight = found.weight.float().clone()
                return MaskProblem(weight, gram.matrix, PerLayer(sparsity=0.5), copy=False)
    raise AssertionError("a layer found before must be found again")
