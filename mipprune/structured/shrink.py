"""The run: MLP neurons and key-value groups of every block removed, the model made smaller."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from solvers import InvalidInput, removed_count
from solvers.structured import expand

from ..calibration import Windows, calibration_windows, window_length
from ..environment import model_environment
from ..estimate import choose_batch
from ..observer import Observer
from ..placement import FromFolder, FromHost, Placement
from ..surrogate import Inputs
from ..walk import HOST_BYTES, BlockStep, BlockWalk
from .budget import Decision, counts_within
from .choice import Chosen, Method, choose
from .coupling import WORDS, Coupling, Kind, Structure, find_structure, group_count
from .latency import Latency
from .passes import compared
from .report import ShrinkReport
from .savings import Parameters
from .smaller import Kept, Smaller

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Grams = Literal["pruned", "dense"]

PROBE = 8
"""Calibration windows that the divergences of a budget are measured on."""


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, an ordinary one of its family, and what was done to get it."""

    model: PreTrainedModel
    report: ShrinkReport


@torch.no_grad()
def shrink(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    *,
    neurons: float = 0.0,
    kv_groups: float = 0.0,
    parameters: float | None = None,
    latency: Latency | None = None,
    method: Method | None = None,
    multiple_of: int = 1,
    grams: Grams = "pruned",
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int | None = None,
    seed: int = 0,
    blocks: str | None = None,
    token_cache: str | Path | None = None,
    placement: Placement | None = None,
    host_bytes: float = HOST_BYTES,
    observer: Observer | None = None,
) -> Shrunk:
    """Remove MLP neurons and attention groups for good, block by block.

    Every block loses as many, since a configuration names one number for all; what comes out is a
    model of the same family that transformers loads like any other.

    Parameters
    ----------
    model, tokenizer, calibration
        As in `mipprune.prune`. The model is used up: it is left with zeros in place of what was
        removed, and shares weights with the smaller one.
    neurons
        Share of the neurons of every MLP to remove, in [0, 1).
    kv_groups
        Share of the key-value heads of every attention to remove, each with the queries that read
        it; without grouped queries these are the heads.
    parameters
        In place of both: share of the whole model's parameters to keep at most, in (0, 1). How many
        neurons and KV groups go is then chosen by `mipprune.structured.budget`.
    latency
        In place of these: the time of a forward pass. It is measured here and now, so that a
        repeat may choose other counts; the report's say which were chosen.
    method
        How groups are chosen and weights fitted; None for the default one.
    multiple_of
        The number of neurons left is rounded up to a multiple of this, as kernels and tensor
        parallelism like it.
    grams
        "pruned": a block's inputs, and its MLP's, come from what was made smaller before; "dense":
        from the whole model.
    samples, seqlen, batch_size, seed, blocks, token_cache, placement, host_bytes, observer
        As in `mipprune.prune`.

    Raises
    ------
    InvalidInput
        If a share or a name is wrong, if the model's family cannot say that it has fewer groups or
        is not understood (the sentence says which), if a budget cannot be kept, or if the text
        cannot be worked with.
    """
    observer, method = observer or Observer(), method or Method()
    began = time.perf_counter()
    if grams not in get_args(Grams):
        raise InvalidInput(f"Grams are taken from 'pruned' or 'dense', not '{grams}'.")
    placement = placement or Placement(model, blocks)
    if isinstance(placement, FromFolder):
        raise InvalidInput("A model that is read block by block cannot be made smaller; load it.")
    if sum([bool(neurons or kv_groups), parameters is not None, latency is not None]) > 1:
        raise InvalidInput(
            "Give one of these: shares to remove, a share of the parameters to keep, or a share "
            "of the time to take."
        )
    budget = latency if parameters is None else Parameters(parameters)
    decision = Decision({}, [], {})
    if budget is None:
        decision = replace(decision, counts=counts_left(model, neurons, kv_groups, multiple_of))
        _structure(placement, decision.counts, method)  # refused before the text is read
    model.eval()
    observer.phase("calibration text")
    windows = calibration_windows(model, tokenizer, calibration, samples, seqlen, seed, token_cache)
    if batch_size is None:
        batch_size = choose_batch(placement, window_length(model.config, seqlen))

    def walk(watched: set[str], propagate: bool) -> BlockWalk:
        observer.phase("replay check and capture")
        return BlockWalk(
            placement,
            windows.tokens,
            batch_size,
            propagate=propagate,
            host_bytes=host_bytes,
            warn=observer.warning,
            watched=watched,
        )

    if budget is not None:
        observer.phase("what counts save")
        decision = counts_within(
            placement,
            budget,
            partial(walk, propagate=False),
            windows.tokens[:PROBE],
            batch_size,
            multiple_of=multiple_of,
            damping=method.damping,
            add_biases=method.bias == "add",
        )
    counts = decision.counts
    structure = _structure(placement, counts, method)
    watched = {one.reader.name for block in structure.couplings for one in block}
    before = number_of_parameters(model)
    small = Smaller(structure, placement.blocks_name, _home(placement))
    observer.begin(
        len(placement.blocks),
        sum(one.reader.weight.numel() for block in structure.couplings for one in block),
    )
    report = ShrinkReport(
        settings={
            "neurons": neurons,
            "kv_groups": kv_groups,
            "parameters": parameters,
            "latency": None if latency is None else latency.to_dict(),
            "multiple_of": multiple_of,
            **method.to_dict(),
            "grams": grams,
            "samples": samples,
            "seqlen": seqlen,
            "batch_size": batch_size,
            "seed": seed,
            "blocks": placement.blocks_name,
        },
        calibration={
            "source": windows.source,
            "windows": len(windows.tokens),
            "length": windows.tokens.shape[1],
            "sha256": windows.digest,
            **windows.origin,
        },
        environment=model_environment(model, placement.device),
        counts={kind: (group_count(model.config, kind), left) for kind, left in counts.items()},
        parameters_before=before,
        curves=[one.to_dict() for one in decision.curves],
    )

    if len(windows.tokens) < samples:
        report.warnings.append(
            f"The text gave {len(windows.tokens)} windows of {windows.tokens.shape[1]} tokens, "
            f"not {samples}."
        )
    for kind in counts:
        having = sum(any(one.kind == kind for one in block) for block in structure.couplings)
        if having < len(structure.couplings):
            report.warnings.append(
                f"Only {having} of {len(structure.couplings)} blocks have {WORDS[kind]} to remove."
            )

    def chosen(step: BlockStep, coupling: Coupling) -> Chosen:
        observer.phase(f"{step.index}: {WORDS[coupling.kind]}")
        gram = step.grams.gram(coupling.reader)
        inputs = Inputs(gram.matrix, gram.mean)
        return choose(coupling, inputs, gram.tokens, counts[coupling.kind], method, seed)

    before_all: dict[str, Chosen] = {}
    if grams == "dense":
        for step in walk(watched, propagate=False):
            for coupling in structure.couplings[step.index]:
                before_all[coupling.reader.name] = chosen(step, coupling)
    for step in walk(watched, propagate=True):
        block = placement.blocks[step.index]
        couplings = small.understood(
            step.index, block, structure.couplings[step.index], counts, step.output, seed
        )
        kept: Kept = {}
        for coupling in couplings:
            found = before_all.pop(coupling.reader.name, None) or chosen(step, coupling)
            kept[coupling.kind] = found.kept
            silence(step, coupling, found)
            report.add(found.result, found.kept)
        difference = small.put(step.index, block, couplings, kept, step.output)
        report.difference = max(report.difference, difference)
        observer.phase(f"{step.index}: outputs")
    made = small.finish(model)
    report.parameters_after = number_of_parameters(made)
    if latency is not None:
        observer.phase("time of a pass")
        report.latency = decision.measured
        _time_again(placement, made, windows.tokens, latency, report)
    report.seconds = time.perf_counter() - began
    return Shrunk(made, report)


def _time_again(
    placement: Placement,
    made: PreTrainedModel,
    text: torch.Tensor,
    latency: Latency,
    report: ShrinkReport,
) -> None:
    """Report the smaller model's time beside that of the large one, and what was asked for."""
    model, device = placement.model, placement.device
    small = (
        Placement(made, placement.blocks_name)
        if type(placement) is Placement
        else FromHost(made, device, placement.blocks_name)
    )
    found = compared(placement, small, latency.sequences(text, model), latency.clock)
    for buffer in made.buffers():
        buffer.data = buffer.data.to(_home(placement))
    report.latency = {**(report.latency or {}), **latency.to_dict(), "measured": found.to_dict()}
    least, most = found.interval
    if least > latency.share:
        report.warnings.append(
            f"A pass takes {found.ratio:.3f} ({least:.3f} to {most:.3f}) of the dense model's "
            f"time, more than the {latency.share} that was asked for; ask for less."
        )


def silence(step: BlockStep, coupling: Coupling, found: Chosen) -> None:
    """Put zeros in place of the groups that go, and the fitted weights in place of the others."""
    rows = len(coupling.reader.weight)
    mask = expand(found.kept[None].cpu(), coupling.of_inputs(), rows)
    step.prune(coupling.reader, mask, found.weight)
    if found.shift is not None:
        shift_bias(coupling.reader.module, found.shift)
    step.refresh()


def shift_bias(module: nn.Module, shift: torch.Tensor) -> None:
    """Add to a layer's bias, which it is given if it lacks one."""
    bias: Any = module.bias
    if bias is None:
        weight: Any = module.weight
        module.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    else:
        bias.data.copy_((bias.double() + shift).to(bias.dtype))


def counts_left(
    model: PreTrainedModel, neurons: float, kv_groups: float, multiple_of: int = 1
) -> dict[Kind, int]:
    """Groups to keep in every block, of the kinds that lose some; ``K - removed_count(K, share)``.

    Raises
    ------
    InvalidInput
        If a share is outside [0, 1), or nothing would be removed, or nothing kept.
    """
    if multiple_of < 1:
        raise InvalidInput(f"multiple_of={multiple_of} is no number of neurons; give 1 or more.")
    shares: dict[Kind, float] = {"kv_groups": kv_groups, "neurons": neurons}
    counts: dict[Kind, int] = {}
    for kind in get_args(Kind):
        share = shares[kind]
        if not 0 <= share < 1:
            raise InvalidInput(f"Share {share} of the {WORDS[kind]} is outside [0, 1).")
        if share == 0:
            continue
        count = group_count(model.config, kind)
        unit = multiple_of if kind == "neurons" else 1
        left = math.ceil((count - removed_count(count, share)) / unit) * unit
        if left >= count:
            rounded = f", rounded to multiples of {unit}," if unit > 1 else ""
            raise InvalidInput(
                f"A share of {share} of {count} {WORDS[kind]}{rounded} removes none; give a "
                "larger share."
            )
        counts[kind] = left
    if not counts:
        raise InvalidInput(
            "Nothing is to be removed; give a share of the neurons (such as 0.25), of the KV "
            "groups, or of both."
        )
    return counts


def share_removed(count: int, left: int) -> float:
    """A share, of few digits, that leaves ``left`` of ``count`` groups in `counts_left`."""
    gone, scale = count - left, 10_000
    share = math.ceil(gone / count * scale) / scale
    while removed_count(count, share) != gone:
        scale *= 10
        share = math.ceil(gone / count * scale) / scale
    return share


def number_of_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(one.numel() for one in model.parameters())


def _structure(placement: Placement, counts: dict[Kind, int], method: Method) -> Structure:
    """What to cut; `InvalidInput` if that cannot be found, or a reader's weights are not finite."""
    biases: tuple[Kind, ...] = tuple(counts) if method.bias == "add" else ()
    model: Any = placement.model
    structure = find_structure(model, placement.blocks_name, counts, biases)
    for one in (one for block in structure.couplings for one in block):
        if not bool(torch.isfinite(one.reader.weight).all()):
            raise InvalidInput(
                f"Layer {one.reader.name} has NaN or infinite weights; mend the model first."
            )
    return structure


def _home(placement: Placement) -> torch.device:
    """Where the smaller model's blocks lie: where the large one's do between visits."""
    return placement.device if type(placement) is Placement else torch.device("cpu")
