"""The whole job: a model's name in, a folder with the pruned model out.

The model is opened as its size asks for, the run is kept in a work folder, and the output
appears when everything is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from solvers import Pattern

from .allocate import Allocation
from .calibration import Windows, window_length
from .checkpoint import Shards, save_beside
from .choice import Choice
from .estimate import Plan, choose_batch, plan
from .folder import ModelFolder, NotStreamable, build_empty
from .journal import NO_JOURNAL
from .layer_step import LayerStep
from .masks import StartMasks
from .models import DType, ModelDescription, describe_model, load_model, resolve_device
from .observer import Observer
from .placement import OUTSIDE, FromFolder, FromHost, Placement
from .prune import calibration_windows, prune
from .ranks import Ranks, own_device, ranks_of_environment
from .record import PruneReport
from .rules import Rules
from .settings import Grams, Settings
from .share_out import feasible
from .walk import HOST_BYTES
from .work import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST_OF_MEMORY = 0.5
"""A model that would take a larger share of the available host memory is read block by block."""


@dataclass(frozen=True)
class OpenedModel:
    """A model to prune, wherever its weights are.

    Attributes
    ----------
    placement
        Holds the model.
    tokenizer
        Its tokenizer.
    stored_dtype
        Type that the weights are stored in.
    """

    placement: Placement
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype

    @property
    def model(self) -> PreTrainedModel:
        """The model; its parameters may be on the meta device."""
        return self.placement.model


def open_model(
    source: str,
    device: torch.device,
    dtype: DType = "auto",
    *,
    trust_remote_code: bool = False,
    stream: bool | None = None,
    blocks: str | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> OpenedModel:
    """Open a model for a run that needs one block at a time.

    Parameters
    ----------
    source, device, dtype, trust_remote_code
        As of `load_model`.
    stream
        Whether weights are read from the folder block by block, and never all held; None does
        so for models that would take more than half of the available host memory.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    warn
        Told if a large model has to be held in memory as a whole.

    Raises
    ------
    InvalidInput
        If there is no such model, or its weights cannot be streamed though asked for.
    """
    if stream is not False:
        try:
            described = describe_model(source, dtype, trust_remote_code)
            opened = _open_streamed(described, device, stream is None, blocks)
        except NotStreamable as error:
            if stream:
                raise NotStreamable(
                    f"{error} Give --no-stream (in Python: stream=False) to hold the whole model "
                    "in memory."
                ) from error
            warn(f"{error} The whole model is loaded into memory.")
            opened = None
        if opened is not None:
            return opened
    loaded = load_model(source, device, dtype, trust_remote_code, at=torch.device("cpu"))
    placement = (
        FromHost(loaded.model, device, blocks)
        if device.type == "cuda"
        else Placement(loaded.model, blocks)
    )
    return OpenedModel(placement, loaded.tokenizer, loaded.stored_dtype)


def _open_streamed(
    described: ModelDescription, device: torch.device, only_if_large: bool, blocks: str | None
) -> OpenedModel | None:
    model = build_empty(described.config, described.dtype or torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if only_if_large and size < _MOST_OF_MEMORY * available_memory():
        return None
    folder = ModelFolder(local_folder(described.path), model)
    stored = folder.dtype(folder.names[0])
    wanted = described.dtype or (torch.float32 if device.type == "cpu" else stored)
    return OpenedModel(
        FromFolder(model, folder, device, wanted, blocks), described.tokenizer, stored
    )


def local_folder(path: str) -> Path:
    """A model's folder; one on the hub is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def available_memory() -> float:
    """Bytes of host memory that can be had without swapping; infinite where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def prune_to_folder(
    source: str,
    out: str | Path,
    calibration: str | Windows | None,
    pattern: Pattern | Rules,
    solver: str = "swap",
    start: str | StartMasks | None = None,
    *,
    device: str = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    stream: bool | None = None,
    blocks: str | None = None,
    resume: bool = False,
    ranks: Ranks | None = None,
    recipe: dict[str, Any] | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> PruneReport | None:
    """Prune a model into a new folder.

    Parameters
    ----------
    source, device, dtype, trust_remote_code, stream, blocks
        See `open_model`.
    out
        Appears when everything is written. Until then ``out.partial`` holds what is finished.
    calibration, pattern, solver, start, **settings
        See `mipprune.prune`.
    resume
        Go on with the interrupted run in ``out.partial``, if there is one. The output is what it
        would have been, bit by bit but for the times.
    ranks
        The processes that share the run; None asks the environment. The first one writes.
    recipe
        The command's options, for the record.
    observer
        Told about progress.

    Returns
    -------
    PruneReport or None
        None if an interrupted run had been finished already, but for its last rename.

    Raises
    ------
    InvalidInput
        If the input cannot be worked with (nothing is left behind), or the run cannot go on for
        lack of memory or disk (what is finished is kept).
    """
    observer = observer or Observer()
    at = own_device(resolve_device(device))
    named = {
        "model": source,
        "calibration": calibration if isinstance(calibration, str) else None,
        "dtype": dtype,
    }

    def run(ranks: Ranks, work: WorkFolder | None) -> tuple[OpenedModel, PruneReport]:
        observer.phase(f"reading {source}")
        opened = open_model(
            source,
            at,
            dtype,
            trust_remote_code=trust_remote_code,
            stream=stream,
            blocks=blocks,
            warn=observer.warning,
        )
        if work is not None and isinstance(opened.placement, FromFolder):
            opened.placement.sink = _writer(opened.placement, _shards(opened.placement, work))
        report = prune(
            opened.model,
            opened.tokenizer,
            calibration,
            pattern,
            solver,
            start,
            placement=opened.placement,
            journal=work.journal(named) if work is not None else NO_JOURNAL,
            ranks=ranks,
            observer=observer,
            **settings,
        )
        report.settings.update(named)
        report.recipe = recipe or {}
        return opened, report

    with nullcontext(ranks) if ranks else ranks_of_environment(at) as all_ranks:
        if not all_ranks.first:  # the first process alone has to do with files
            finished = all_ranks.gather_objects(False)[0]
            return None if finished else run(all_ranks, None)[1]
        work = WorkFolder(out, resume)
        if all_ranks.gather_objects(work.finished)[0]:
            return None
        with work.kept_on_failure():
            opened, report = run(all_ranks, work)
            observer.phase("writing")
            _write(opened, report, work)
            work.publish()
        return report


def _shards(placement: FromFolder, work: WorkFolder) -> Shards:
    return Shards(work.model, len(placement.blocks) + 1)


def _writer(placement: FromFolder, shards: Shards) -> Callable[[int, dict[str, Tensor]], None]:
    return lambda index, tensors: shards.write(index, placement.folder.as_stored(tensors))


def _write(opened: OpenedModel, report: PruneReport, work: WorkFolder) -> None:
    placement, model, folder = opened.placement, opened.model, work.model
    if isinstance(placement, FromFolder):
        shards = _shards(placement, work)
        with placement.block(OUTSIDE):
            _writer(placement, shards)(len(placement.blocks), placement.stored(OUTSIDE))
        shards.write_index()
        model.config.dtype = opened.stored_dtype
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        model.to(opened.stored_dtype).save_pretrained(folder)
    save_beside(folder, opened.tokenizer, report)


def plan_job(
    source: str,
    calibration: str | Windows | None,
    pattern: Pattern | Rules,
    solver: str = "swap",
    start: str | StartMasks | None = None,
    *,
    device: str = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    stream: bool | None = None,
    blocks: str | None = None,
    samples: int = 128,
    seqlen: int = 2048,
    batch_size: int | None = None,
    grams: Grams = "pruned",
    seed: int = 0,
    solver_options: dict[str, Any] | None = None,
    token_cache: str | Path | None = None,
    layer_step: LayerStep | None = None,
    allocation: Allocation | None = None,
    time_budget: float | None = None,
    held_out: float | None = None,
    choice: Choice | None = None,
    host_bytes: float = HOST_BYTES,
    observer: Observer | None = None,
) -> Plan:
    """What `prune_to_folder` with the same arguments would need; nothing is written."""
    began = time.perf_counter()
    observer = observer or Observer()
    observer.phase(f"reading {source}")
    opened = open_model(
        source,
        resolve_device(device),
        dtype,
        trust_remote_code=trust_remote_code,
        stream=stream,
        blocks=blocks,
        warn=observer.warning,
    )
    placement, model = opened.placement, opened.model
    batch_size = batch_size or choose_batch(placement, window_length(model.config, seqlen))
    rules = pattern if isinstance(pattern, Rules) else Rules(pattern)
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
        feasible(allocation, rules, placement, observer.warning),
        time_budget,
        held_out,
        choice,
    )
    windows = calibration_windows(
        model, opened.tokenizer, calibration, samples, seqlen, seed, token_cache
    )
    observer.phase("first block")
    return plan(placement, windows, settings, host_bytes, before=time.perf_counter() - began)
