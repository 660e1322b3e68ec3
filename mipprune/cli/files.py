"""`mipprune tokens` and `mipprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solvers import InvalidInput

from . import terminal
from .models import load_tokenizer
from .options import Calibration, ModelArgument, Samples, Seed, SeqLen


def tokens(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New safetensors file.")],
    text: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    seed: Seed = 0,
) -> None:
    """Write a calibration text's windows as a token file, which --calibration takes anywhere."""
    from ..calibration import read_windows, window_length
    from ..checkpoint import check_new

    check_new(out)
    if out.suffix != ".safetensors":
        raise InvalidInput(f"{out} is no name for a token file; let it end in .safetensors.")
    config, tokenizer = load_tokenizer(model)
    length = window_length(config, seqlen)
    windows = read_windows(text, "calibration", tokenizer, length, samples, seed)
    windows.save(out)
    terminal.out.print(
        f"{len(windows.tokens)} windows of {length} tokens, {windows.source}; "
        f"hash {windows.digest[:16]}. Written: {out}",
        soft_wrap=True,
        markup=False,
    )


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
) -> None:
    """Write a pruned model's card and HTML report anew, from its record."""
    from ..results import CARD_FILE, REPORT_FILE, read_record, write_report, write_results

    record = read_record(folder)
    write_report(folder, record)
    write_results(folder, record)
    terminal.out.print(
        f"Written: {folder / REPORT_FILE}, {folder / CARD_FILE}", soft_wrap=True, markup=False
    )
