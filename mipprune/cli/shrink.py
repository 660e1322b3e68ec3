"""`mipprune shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import terminal
from .options import (
    BatchOrNone,
    Blocks,
    Calibration,
    Config,
    Device,
    DTypeOption,
    ModelArgument,
    Quiet,
    Samples,
    Seed,
    SeqLen,
    SolverOptions,
    TokenCache,
    TrustRemoteCode,
    parse_options,
    recipe_of,
)
from .terminal import phases, quiet_transformers


def shrink(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New folder for the smaller model.")],
    neurons: Annotated[
        float, typer.Option(help="Share of every MLP's neurons to remove, in [0, 1).")
    ] = 0.0,
    kv_groups: Annotated[
        float,
        typer.Option(
            help="Share of every attention's key-value heads to remove, with their queries; "
            "without grouped queries these are the heads."
        ),
    ] = 0.0,
    parameters: Annotated[
        float | None,
        typer.Option(
            help="In place of both: share of all parameters to keep at most; what goes is chosen "
            "by what it does to the model."
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="In place of these: share of the dense model's time that a forward pass may take, "
            "measured here. A repeat may then choose other numbers; recipe.yaml names those that "
            "were chosen."
        ),
    ] = None,
    latency_tokens: Annotated[
        int, typer.Option(help="Tokens of that pass; 1 is a step of decoding without a cache.")
    ] = 256,
    latency_batch: Annotated[int, typer.Option(help="Sequences at a time in that pass.")] = 1,
    multiple_of: Annotated[
        int, typer.Option(help="Round the number of neurons left up to a multiple of this.")
    ] = 1,
    solver: Annotated[
        str,
        typer.Option(
            help="eliminate (by the loss after least squares), wanda_sp, flap, or any of "
            "`mipprune solvers` for the problem with one row."
        ),
    ] = "eliminate",
    option: SolverOptions = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds for the solver, per block and kind.")
    ] = None,
    update: Annotated[
        str, typer.Option(help="Weights that read what is left: least_squares or none.")
    ] = "least_squares",
    bias: Annotated[
        str,
        typer.Option(
            help="Biases that make up for the mean of what goes: existing ones, add (where the "
            "configuration can say so), or none."
        ),
    ] = "existing",
    damping: Annotated[
        float, typer.Option(help="Of least squares, in units of the mean diagonal.")
    ] = 1e-2,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    grams: Annotated[
        str, typer.Option(help="Inputs of a block from the smaller (pruned) or the dense blocks.")
    ] = "pruned",
    batch_size: BatchOrNone = None,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    blocks: Blocks = None,
    token_cache: TokenCache = None,
    quiet: Quiet = False,
    config: Config = None,  # noqa: ARG001 (taken up by its callback)
) -> None:
    """Remove MLP neurons and attention groups: a smaller model that loads like any other."""
    from ..opening import Source
    from ..report import shrink_table
    from ..structured.choice import Method
    from ..structured.job import shrink_to_folder
    from ..structured.latency import Latency

    method = Method(
        solver,
        update,  # type: ignore[arg-type] # checked there
        bias,  # type: ignore[arg-type]
        damping,
        parse_options(option or []),
        time_limit,
    )
    source = Source(
        model,
        device,
        dtype,  # type: ignore[arg-type] # checked when it is read
        trust_remote_code,
        blocks=blocks,
    )
    quiet_transformers()
    with terminal.err.status("") as status:
        report = shrink_to_folder(
            source,
            out,
            calibration,
            neurons=neurons,
            kv_groups=kv_groups,
            parameters=parameters,
            latency=None if latency is None else Latency(latency, latency_tokens, latency_batch),
            method=method,
            multiple_of=multiple_of,
            grams=grams,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            seed=seed,
            token_cache=token_cache,
            recipe=recipe_of(context),
            observer=phases(status),
        )
    for warning in report.warnings:
        terminal.err.print(f"[yellow]Note:[/] {escape(warning)}", soft_wrap=True)
    if quiet:
        return
    terminal.out.print(shrink_table(report))
    share = 1 - report.parameters_after / report.parameters_before
    terminal.out.print(
        f"{report.parameters_after:,} of {report.parameters_before:,} parameters left, "
        f"{share:.1%} fewer; hash {report.mask_hash[:16]}.",
        f"Written: {out}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )
