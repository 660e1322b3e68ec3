"""What a run will need, before it is run: blocks, Gram matrices, peak memory, time.

A few windows are run through the first block, which shows what layers share an input and how long
a block takes; some rows of each of its layers are solved. Memory follows from shapes. The time is
that of the first block times the number of blocks, on a machine that is as busy as it is now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration import Windows
from .capture import Call, answering, capture
from .gram import Gram, GramCollector, WeightOf
from .layer import LayerSolver
from .models import PrunableLayer, coverage, prunable_layers
from .placement import OUTSIDE, FromFolder, FromHost, Placement
from .settings import Settings
from .surrogate import TokenWeighted

DOUBLE, SINGLE = 8, 4
_SAMPLE_ROWS = 256
_SAMPLE_TOKENS = 1024
_LOADS = 3
"""Times that a run needs each block: for the dense model, for its replay, and to prune it."""
_BACKWARD = 4
"""Forwards that a backward pass takes: one, one more with gradients, and these as two."""
TIME_FACTOR = 3.0
"""The run takes between the estimated time divided by this and multiplied by this: measured on the
embedded model on a machine that others kept busy, which is most of the error."""
_SEARCH_GRAMS, _SEARCH_WEIGHTS = 1.5, 6.0
"""Copies that a search makes of a layer's Gram matrix and weight, in float64."""


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes
    ----------
    blocks, layers, weights
        Blocks, layers in a block, and prunable weights in all.
    grams
        Inputs of each Gram matrix of a block, with the layers that share it.
    placement
        Where the weights are meanwhile.
    phases
        Most bytes at once in each phase, on the device where blocks are run.
    resting
        Bytes of host memory besides, if that device is not the host.
    seconds
        Estimated time of the whole run; see `TIME_FACTOR`.
    """

    blocks: int
    layers: int
    weights: int
    grams: dict[str, int]
    placement: str
    phases: dict[str, float]
    resting: float
    seconds: float

    @property
    def peak(self) -> float:
        """Estimated peak memory in bytes, on the device where blocks are run."""
        return max(self.phases.values())


def plan(
    placement: Placement,
    windows: Windows,
    settings: Settings,
    host_bytes: float = float("inf"),
    before: float = 0.0,
) -> Plan:
    """Estimate a run's memory and time.

    Parameters
    ----------
    placement
        The model; nothing of it is changed.
    windows
        Calibration tokens.
    settings
        Of the run.
    host_bytes
        Activations beyond this wait on disk.
    before
        Seconds that were spent on what a run does too: reading the model and the text.
    """
    few = -(-_SAMPLE_TOKENS // windows.tokens.shape[1])
    first = _FirstBlock.run(
        placement, windows.tokens[: min(few, settings.windows_at_once)], settings
    )
    seconds = before + _seconds(first, placement, windows, settings)
    shapes = [tuple(layer.weight.shape) for layer in first.layers]
    blocks, (count, length) = len(placement.blocks), windows.tokens.shape
    covered = coverage(placement.blocks_name, placement.blocks)
    phases, resting = _memory(
        placement, first, shapes, settings, (count, length), covered.prunable, host_bytes
    )
    return Plan(
        blocks=blocks,
        layers=len(shapes),
        weights=covered.prunable,
        grams=first.shared_inputs(),
        placement=_PLACES[type(placement)],
        phases=phases,
        resting=resting,
        seconds=seconds,
    )


_PLACES = {
    Placement: "all in memory",
    FromHost: "in host memory, one block at a time on the device",
    FromFolder: "in the folder, one block at a time in memory",
}


@dataclass(frozen=True)
class _FirstBlock:
    """The first block with some windows run through it."""

    layers: list[PrunableLayer]
    weights: dict[str, Tensor]
    grams: dict[str, Gram]
    owners: dict[str, str]
    hidden: Tensor
    load_seconds: float
    forward_seconds: float
    collect_seconds: float

    @classmethod
    @torch.no_grad()
    def run(cls, placement: Placement, windows: Tensor, settings: Settings) -> _FirstBlock:
        began = time.perf_counter()
        with placement.block(0) as block:
            loaded = time.perf_counter() - began
            given: list[object] = []
            handle = block.register_forward_hook(lambda _, __, output: given.append(output))
            others = answering(placement.blocks[1:], lambda *_: given[-1])
            with placement.block(OUTSIDE), others:
                record = capture(placement.model, nn.ModuleList([block]), [windows])
            handle.remove()
            hidden, call = record.hidden[0], record.calls[0][0]
            layers = prunable_layers(block, f"{placement.blocks_name}.0")
            ones = _Ones.of(settings, layers)
            collector = GramCollector(layers, weights=ones)
            forward = _timed(lambda: call.run(block, hidden))
            collect = _timed(lambda: _collect(collector, call, block, hidden))
            owners = collector.owners
            grams = {
                x.name: _first_group(collector.gram(x))
                for x in layers
                if owners.get(x.name) == x.name
            }
            weights = {layer.name: layer.weight[:_SAMPLE_ROWS].clone() for layer in layers}
        return cls(layers, weights, grams, owners, hidden, loaded, forward, collect)

    def shared_inputs(self) -> dict[str, int]:
        """Inputs of each Gram matrix, by the layers that share it."""
        shared: dict[str, list[str]] = {}
        for name, owner in self.owners.items():
            shared.setdefault(owner, []).append(name.rpartition(".")[2])
        return {", ".join(shared[owner]): len(gram.matrix) for owner, gram in self.grams.items()}


def _collect(collector: GramCollector, call: Call, block: nn.Module, hidden: Tensor) -> None:
    with collector.collecting(hidden=hidden):
        call.run(block, hidden)


class _Ones:
    """Token weights that cost what a run's do."""

    def __init__(self, shared: bool, groups: int, layers: frozenset[str]) -> None:
        self.shared, self._groups, self._layers = shared, groups, layers

    @classmethod
    def of(cls, settings: Settings, layers: Sequence[PrunableLayer]) -> _Ones | None:
        surrogate = settings.layer_step.surrogate
        if surrogate.tokens == "equal":
            return None
        chosen = [one.name for one in layers if settings.rules.pattern_for(one.name) is not None]
        return cls(surrogate.tokens != "fisher", surrogate.row_groups, frozenset(chosen))

    def of_batch(self, windows: slice, hidden: Tensor) -> WeightOf:
        ones = torch.ones(self._groups, hidden.numel() // hidden.shape[-1], device=hidden.device)
        return lambda layer: ones if layer in self._layers else None


def _first_group(gram: Gram) -> Gram:
    """With the weighted statistics of one group of rows, which do for all."""
    if gram.weighted is None:
        return gram
    one = TokenWeighted(gram.weighted.gram[:1], gram.weighted.mean[:1])
    return replace(gram, weighted=one)


def _seconds(
    first: _FirstBlock, placement: Placement, windows: Windows, settings: Settings
) -> float:
    """Blocks times what the first one takes; layers by a sample of their rows, or as budgeted."""
    rounds = len(windows.tokens) / len(first.hidden)
    stages = len(first.grams) if settings.grams == "sequential" else 1
    models = 1 if settings.targets == "own" else 2
    per_block = rounds * (
        stages * (first.collect_seconds + (models - 1) * first.forward_seconds)
        + models * first.forward_seconds
    )
    per_block += _LOADS * first.load_seconds
    if settings.layer_step.surrogate.tokens == "fisher":
        batches = len(windows.tokens) / settings.windows_at_once
        per_block += _BACKWARD * rounds * first.forward_seconds + 2 * batches * first.load_seconds
    if settings.time_budget is not None:
        return max(settings.time_budget, len(placement.blocks) * per_block)
    searches, choice = len(settings.candidates()), settings.choice
    if choice is not None and choice.scope == "model":  # one pass more, over the dense model
        searches += 1
        per_block += rounds * (first.collect_seconds + first.forward_seconds)
        per_block += _LOADS * first.load_seconds
    known: dict[tuple[object, ...], float] = {}
    for layer in first.layers:
        pattern = settings.rules.pattern_for(layer.name)
        gram = first.grams.get(first.owners.get(layer.name, ""))
        if gram is None or pattern is None:
            continue
        rows, kind = layer.weight.shape[0], (tuple(layer.weight.shape), pattern)
        if kind not in known:
            weight = first.weights[layer.name]
            known[kind] = _layer_seconds(layer.name, weight, gram, rows, settings)
        per_block += known[kind] * searches
    return len(placement.blocks) * per_block


def _layer_seconds(name: str, weight: Tensor, gram: Gram, rows: int, settings: Settings) -> float:
    """Time of a layer's step with so many rows, by two samples of them."""
    # Masks that are given are for all rows; those of a solver take as long to start from.
    settings = settings.candidates()[0]
    start = settings.start if settings.start in settings.solvers else None
    step = settings.layer_step
    step = replace(step, surrogate=replace(step.surrogate, row_groups=1))
    solver = LayerSolver(replace(settings, start=start, layer_step=step))

    def solved(count: int) -> float:
        part = nn.Linear(weight.shape[1], count, bias=False, device="meta")
        part.weight = nn.Parameter(weight[:count], requires_grad=False)
        return _timed(lambda: solver(PrunableLayer(name, part), gram))

    most = len(weight)
    few = max(1, most // 4)
    solved(few)  # imports and compilation are not part of the time
    once, again = solved(few), solved(most)
    per_row = max(0.0, again - once) / max(1, most - few)
    return again + per_row * (rows - most)


def _memory(
    placement: Placement,
    first: _FirstBlock,
    shapes: list[tuple[int, ...]],
    settings: Settings,
    windows: tuple[int, int],
    prunable: int,
    host_bytes: float,
) -> tuple[dict[str, float], float]:
    """Bytes at once in each phase on the device, and bytes resting on the host besides."""
    count, length = windows
    item = first.hidden.element_size()
    on_host = placement.device.type == "cpu"
    whole = type(placement) is Placement
    model = sum(p.numel() for p in placement.model.parameters()) * item
    block = sum(p.numel() for p in placement.blocks[0].parameters()) * item
    outside = model - len(placement.blocks) * block
    models = 1 if settings.targets == "own" else 2
    hidden = min(models * count * length * first.hidden.shape[-1] * item, host_bytes)
    masks = prunable / 8
    vocabulary = getattr(placement.model.config, "vocab_size", 0)
    widest = max(rows + inputs for rows, inputs in shapes)
    batch = settings.windows_at_once * length * (widest + 4 * first.hidden.shape[-1]) * item
    batch *= models
    squares = sum(models * len(gram.matrix) ** 2 for gram in first.grams.values())
    surrogate, token_weights = settings.layer_step.surrogate, 0.0
    if surrogate.tokens == "inverse_norm":
        squares *= 2
    elif surrogate.tokens == "fisher":
        groups = [min(surrogate.row_groups, rows) for rows, _ in shapes]
        squares += sum(n * shape[1] ** 2 for n, shape in zip(groups, shapes, strict=True))
        token_weights = SINGLE * sum(groups) * len(placement.blocks) * count * length
    largest = max(first.grams.values(), key=lambda gram: len(gram.matrix), default=None)
    d = 0 if largest is None else len(largest.matrix)
    weight = max(rows * inputs for rows, inputs in shapes)
    checking = (3 + 1) * DOUBLE * d**2
    searching: float = DOUBLE * d**2
    if settings.start is not None:
        searching += DOUBLE * (_SEARCH_GRAMS * d**2 + _SEARCH_WEIGHTS * weight)
    evaluating = 3 * DOUBLE * weight + DOUBLE * d**2
    base = _resident_now() if on_host else 0.0
    here = base + (hidden if on_host else 0.0)
    here += model if whole and not on_host else 0.0
    loaded = 0.0 if whole else (block if on_host else 2 * block)
    loaded += (models - 1) * block  # as it was before it was pruned
    phases = {
        "replay check": base + (0 if whole else outside) + loaded + 2 * length * vocabulary * item,
        "Gram matrices": here + loaded + batch + (DOUBLE + SINGLE) * squares,
        "solving": here
        + loaded
        + DOUBLE * squares
        + max(checking, searching, evaluating)
        + (masks if on_host else 0),
        "writing": base + 2 * masks + (2 * outside if isinstance(placement, FromFolder) else 0),
    }
    if surrogate.tokens == "fisher":
        # What a block's layers take and give is kept for its backward pass, and gradients of it.
        kept = 2 * settings.windows_at_once * length * sum(map(sum, shapes)) * item
        logits = 3 * SINGLE * length * vocabulary
        phases["token weights"] = here + max(loaded + kept, outside + logits)
        if on_host:
            phases["token weights"] += token_weights
            phases["Gram matrices"] += token_weights
            phases["solving"] += token_weights
    if not on_host:
        del phases["writing"]
    resting = 0.0 if on_host else _resident_now() + hidden + masks + token_weights
    return phases, resting


def _resident_now() -> float:
    """Bytes of host memory that this process has now; 0 where it is not told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def choose_batch(placement: Placement, length: int) -> int:
    """Windows per forward by the free memory of the GPU, a power of two; 8 on the CPU.

    A block's weights (and the next one's, on their way), its Gram matrices and the widest
    activations have to fit in 80 % of what is free.
    """
    if placement.device.type != "cuda":
        return DEFAULT_BATCH
    shapes = [layer.weight.shape for layer in prunable_layers(placement.blocks[0], "")]
    item = next(placement.model.parameters()).element_size()
    block = sum(p.numel() for p in placement.blocks[0].parameters()) * item
    squares = sum(d**2 for d in {d for _, d in shapes}) + max(d for _, d in shapes) ** 2
    free = 0.8 * torch.cuda.mem_get_info(placement.device)[0]
    free -= 2 * block + (DOUBLE + SINGLE) * squares
    window = length * sum(rows + inputs for rows, inputs in shapes) * item
    batch = 1
    while batch < MOST_BATCH and 2 * batch * window <= free:
        batch *= 2
    return batch


DEFAULT_BATCH, MOST_BATCH = 8, 64
