"""The whole job: a model's name in, a folder with the smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import check_new
from ..job import open_model
from ..models import resolve_device
from ..observer import Observer
from .report import ShrinkReport, save_smaller
from .shrink import shrink

if TYPE_CHECKING:
    from ..calibration import Windows
    from ..models import DType


def shrink_to_folder(
    source: str,
    out: str | Path,
    calibration: str | Windows | None,
    *,
    device: str = "auto",
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    blocks: str | None = None,
    recipe: dict[str, Any] | None = None,
    observer: Observer | None = None,
    **settings: Any,
) -> ShrinkReport:
    """Make a model smaller and write it into a new folder.

    Parameters
    ----------
    source, device, dtype, trust_remote_code, blocks
        See `mipprune.job.open_model`. The model is held in memory as a whole; on a GPU, one block
        at a time visits it.
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
    observer.phase(f"reading {source}")
    opened = open_model(
        source,
        resolve_device(device),
        dtype,
        trust_remote_code=trust_remote_code,
        stream=False,
        blocks=blocks,
        warn=observer.warning,
    )
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
        model=source,
        calibration=calibration if isinstance(calibration, str) else None,
        dtype=dtype,
    )
    report.recipe = recipe or {}
    observer.phase("writing")
    save_smaller(out, shrunk.model, opened.tokenizer, report, opened.stored_dtype)
    return report
