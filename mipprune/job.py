"""The whole job: a model's name in, a folder with the pruned model out.

The model is opened as its size asks for, the run is kept in a work folder, and the output
appears when everything is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from .calibration import Windows, calibration_windows
from .checkpoint import Shards, save_beside
from .estimate import Plan, plan
from .journal import NO_JOURNAL
from .models import resolve_device
from .observer import Observer
from .opening import OpenedModel, Source
from .placement import OUTSIDE, FromFolder
from .prune import run, settled
from .ranks import Ranks, own_device, ranks_of_environment
from .record import PruneReport
from .settings import Settings
from .walk import HOST_BYTES
from .work import WorkFolder


def prune_to_folder(
    source: Source,
    out: str | Path,
    calibration: str | Windows | None,
    settings: Settings,
    *,
    token_cache: str | Path | None = None,
    host_bytes: float = HOST_BYTES,
    resume: bool = False,
    ranks: Ranks | None = None,
    recipe: dict[str, Any] | None = None,
    observer: Observer | None = None,
) -> PruneReport | None:
    """Prune a model into a new folder.

    Parameters
    ----------
    source
        The model.
    out
        Appears when everything is written. Until then ``out.partial`` holds what is finished.
    calibration, token_cache, host_bytes
        See `mipprune.prune`.
    settings
        What is to be done.
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
    at = own_device(resolve_device(source.device))
    named = {
        "model": source.model,
        "calibration": calibration if isinstance(calibration, str) else None,
        "dtype": source.dtype,
    }

    def pruned(ranks: Ranks, work: WorkFolder | None) -> tuple[OpenedModel, PruneReport]:
        observer.phase(f"reading {source.model}")
        opened = source.open(at, observer.warning)
        if work is not None and isinstance(opened.placement, FromFolder):
            opened.placement.sink = _writer(opened.placement, _shards(opened.placement, work))
        report = run(
            opened.placement,
            opened.tokenizer,
            calibration,
            settings,
            token_cache=token_cache,
            journal=work.journal(named) if work is not None else NO_JOURNAL,
            host_bytes=host_bytes,
            ranks=ranks,
            observer=observer,
        )
        report.settings.update(named)
        report.recipe = _as_done(recipe or {}, settings, report)
        return opened, report

    with nullcontext(ranks) if ranks else ranks_of_environment(at) as all_ranks:
        if not all_ranks.first:  # the first process alone has to do with files
            finished = all_ranks.gather_objects(False)[0]
            return None if finished else pruned(all_ranks, None)[1]
        work = WorkFolder(out, resume)
        if all_ranks.gather_objects(work.finished)[0]:
            return None
        with work.kept_on_failure():
            opened, report = pruned(all_ranks, work)
            observer.phase("writing")
            _write(opened, report, work)
            work.publish()
        return report


def _as_done(recipe: dict[str, Any], settings: Settings, report: PruneReport) -> dict[str, Any]:
    """A recipe that repeats the run: without an optional allocation that was dropped."""
    if recipe and settings.allocation is not None and report.settings["allocation"] is None:
        return {**recipe, "allocate": "uniform"}
    return recipe


def _shards(placement: FromFolder, work: WorkFolder) -> Shards:
    return Shards(work.model, len(placement.blocks) + 1)


def _writer(placement: FromFolder, shards: Shards) -> Callable[[int, dict[str, Tensor]], None]:
    return lambda index, tensors: shards.write(index, placement.folder.as_stored(tensors))


def _write(opened: OpenedModel, report: PruneReport, work: WorkFolder) -> None:
    placement, model, folder = opened.placement, opened.model, work.model
    if isinstance(placement, FromFolder):
        shards = _shards(placement, work)
        write = _writer(placement, shards)
        for index in range(len(placement.blocks)):
            if not shards.holds(index):  # no layer of it was pruned
                with placement.block(index):
                    write(index, placement.stored(index))
        with placement.block(OUTSIDE):
            write(len(placement.blocks), placement.stored(OUTSIDE))
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
    source: Source,
    calibration: str | Windows | None,
    settings: Settings,
    *,
    token_cache: str | Path | None = None,
    host_bytes: float = HOST_BYTES,
    observer: Observer | None = None,
) -> Plan:
    """What `prune_to_folder` with the same arguments would need; nothing is written."""
    began = time.perf_counter()
    observer = observer or Observer()
    observer.phase(f"reading {source.model}")
    opened = source.open(warn=observer.warning)
    placement = opened.placement
    settings = settled(settings, placement, warn=observer.warning)
    windows = calibration_windows(
        opened.model,
        opened.tokenizer,
        calibration,
        settings.samples,
        settings.seqlen,
        settings.seed,
        token_cache,
    )
    observer.phase("first block")
    return plan(placement, windows, settings, host_bytes, before=time.perf_counter() - began)
