"""The whole job: a model's name in, a folder with the smaller model out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import check_new, save
from ..observer import Observer
from ..opening import Source
from .report import ShrinkReport
from .shrink import share_removed, shrink

if TYPE_CHECKING:
    from ..calibration import Windows


def shrink_to_folder(
    source: Source,
    out: str | Path,
    calibration: str | Windows | None,
    *,
    recipe: dict[str, Any] | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> ShrinkReport:
    """Make a model smaller and write it into a new folder.

    Parameters
    ----------
    source
        The model. It is held in memory as a whole; on a GPU, one block at a time visits it.
    out
        Appears when everything is written.
    calibration, **settings
        See `shrink`.
    recipe
        The command's options, for the record.
    observer
        Told about progress.

    Raises
    ------
    InvalidInput
        If the input cannot be worked with; nothing is left behind.
    """
    observer = observer or Observer()
    check_new(out)
    observer.phase(f"reading {source.model}")
    opened = replace(source, stream=False).open(warn=observer.warning)
    shrunk = shrink(
        opened.model,
        opened.tokenizer,
        calibration,
        placement=opened.placement,
        observer=observer,
        **settings,
    )
    report = shrunk.report
    report.settings.update(
        model=source.model,
        calibration=calibration if isinstance(calibration, str) else None,
        dtype=source.dtype,
    )
    report.recipe = _repeatable(recipe or {}, report)
    observer.phase("writing")
    save(out, shrunk.model, opened.tokenizer, report, opened.stored_dtype)
    return report


def _repeatable(recipe: dict[str, Any], report: ShrinkReport) -> dict[str, Any]:
    """The options that give the same again: measured times do not, the counts chosen by them do."""
    if report.latency is None:
        return recipe
    same = {name: value for name, value in recipe.items() if not name.startswith("latency")}
    return same | {str(kind): share_removed(*counts) for kind, counts in report.counts.items()}
