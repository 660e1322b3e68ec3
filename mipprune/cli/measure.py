"""`mipprune evaluate` and `mipprune time-2to4`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from solvers import InvalidInput

from . import terminal
from .models import load
from .options import (
    Batch,
    Device,
    DTypeOption,
    ModelArgument,
    Seed,
    SeqLen,
    TrustRemoteCode,
    check_writable,
)


def evaluate(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(help="The dense model, to compare the predictions with.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Like --calibration of prune. Default: Python's own documentation."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows.  [default: all]")] = None,
    seqlen: SeqLen = 2048,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Overlapping windows, so many tokens apart, of the text's beginning; "
            "default: windows that do not overlap."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness or their YAML files, separated by commas, "
            "instead of perplexity."
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before a question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task.  [default: all]")] = None,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    save: Annotated[
        bool, typer.Option("--save", help="Add the result to the pruned model's record and card.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
) -> None:
    """Perplexity or tasks; with --against, KL divergence and agreement of the top token too."""
    from ..calibration import check_tokens, read_windows, window_length
    from ..checkpoint import write_json
    from ..evaluate import perplexity, side_by_side
    from ..report import evaluation_table
    from ..results import add_evaluation, evaluation_record, read_record
    from ..zero_shot import zero_shot

    if save:
        read_record(model)
    if json_file is not None:
        check_writable(json_file)
    loaded = load(model, device, dtype, trust_remote_code)
    dense = None if against is None else load(against, device, dtype, trust_remote_code)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        settings: dict[str, Any] = {"shots": shots, "limit": limit}
        settings.update(batch_size=batch_size, seed=seed)
        record: dict[str, Any] = {"model": model, "tasks": zero_shot(loaded, names, **settings)}
        if dense is not None:
            record["against"] = {"model": against, "tasks": zero_shot(dense, names, **settings)}
    else:
        length = window_length(loaded.model.config, seqlen)
        windows = read_windows(
            text,
            "evaluation",
            loaded.tokenizer,
            length,
            samples,
            seed,
            in_order=stride is not None,
        )
        for one in filter(None, (loaded, dense)):
            check_tokens(one.model, windows)
        result = (
            perplexity(loaded.model, windows, batch_size, stride)
            if dense is None
            else side_by_side(dense.model, loaded.model, windows, batch_size, stride)
        )
        record = evaluation_record(model, windows, result, against)
    terminal.out.print(evaluation_table(record))
    how = (
        f"{record['text']}: {record['method']}."
        if tasks is None
        else f"By lm-evaluation-harness {record['tasks']['harness']}."
    )
    terminal.out.print(how, soft_wrap=True, markup=False)
    if json_file is not None:
        write_json(json_file, record)
    if save:
        add_evaluation(model, record)


def time_2to4(
    folder: Annotated[Path, typer.Argument(help="Folder of a 2:4 model.", show_default=False)],
    batches: Annotated[
        str, typer.Option(help="Tokens at a time, separated by commas.")
    ] = "1,8,64,512,4096",
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 50,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
) -> None:
    """Time a 2:4 model's layers, dense and by PyTorch's sparse kernels (CUDA only)."""
    from ..checkpoint import write_json
    from ..environment import environment
    from ..models import resolve_device
    from ..report import timing_table
    from ..timing import time_2to4 as run

    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or repeats < 1:
        raise InvalidInput("Batches and repeats are positive numbers, such as --batches 1,8,64.")
    timings = run(folder, batches=sizes, repeats=repeats, device=device)
    terminal.out.print(timing_table(timings))
    if json_file is not None:
        record = [asdict(timing) for timing in timings]
        machine = environment(resolve_device(device), [])
        write_json(json_file, {"environment": machine, "timings": record})
