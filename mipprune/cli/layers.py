"""`mipprune problem`, `compare` and `solvers`: single layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from . import terminal
from .models import load
from .options import (
    Batch,
    Blocks,
    Calibration,
    Device,
    DTypeOption,
    ModelArgument,
    PatternName,
    Samples,
    Scope,
    Seed,
    SeqLen,
    Sparsity,
    TrustRemoteCode,
    check_writable,
    parse_pattern,
)


def problem(
    model: ModelArgument,
    layer: Annotated[str, typer.Argument(help="Full name of a linear layer.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New safetensors file.")],
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    blocks: Blocks = None,
) -> None:
    """Write one layer of the dense model as a problem file: weight and Gram matrix."""
    from ..checkpoint import check_new
    from ..prune import layer_problem

    check_new(out)
    loaded = load(model, device, dtype, trust_remote_code)
    found = layer_problem(
        loaded.model,
        loaded.tokenizer,
        calibration,
        layer,
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        blocks=blocks,
    )
    found.save(out)
    rows, inputs = found.shape
    terminal.out.print(
        f"{layer}: {rows} rows, {inputs} inputs. Written: {out}", soft_wrap=True, markup=False
    )


def compare(
    file: Annotated[
        Path, typer.Argument(help="As `mipprune problem` writes it.", show_default=False)
    ],
    solvers: Annotated[str, typer.Option(help="Names, separated by commas.", show_default=False)],
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    scope: Scope = "row",
    rows: Annotated[int | None, typer.Option(help="The first so many; default: all.")] = None,
    inputs: Annotated[int | None, typer.Option(help="The first so many; default: all.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Solver whose mask all searches start from; default: each one's own."),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds per solver, for all rows together.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the solvers.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw losses, bounds and profile here, as PNG.")
    ] = None,
) -> None:
    """Run several solvers on one problem file: losses, bounds, and every mask's gap."""
    from solvers import MaskProblem, PerLayer, get_solver

    from ..checkpoint import write_json
    from ..compare import compare as run
    from ..compare import part
    from ..report import compare_plot, compare_table

    names = [name.strip() for name in solvers.split(",") if name.strip()]
    for name in names:
        get_solver(name)
    for path in (json_file, plot):
        if path is not None:
            check_writable(path)
    chosen = parse_pattern(sparsity, pattern, scope)
    whole = MaskProblem.load(file, PerLayer(sparsity=0.5))
    found = part(whole, chosen, rows, inputs)
    with terminal.err.status("") as status:
        comparison = run(
            found,
            names,
            start=start,
            time_limit=time_limit,
            seed=seed,
            observer=lambda name, progress: status.update(
                f"{name}: {progress.done} of {progress.total} rows, {progress.time:.0f} s"
            ),
        )
    terminal.out.print(compare_table(comparison))
    for reason in comparison.refused.values():
        terminal.err.print(f"[yellow]Not run:[/] {escape(reason)}", soft_wrap=True)
    for name, count in comparison.refuted.items():
        evidence = comparison.evidence(name)
        assert evidence is not None
        terminal.err.print(
            f"[yellow]Note:[/] Bounds of {name} ({evidence.label}) lie above the loss of a mask "
            f"({count} of {len(comparison.best_loss)}); they are wrong and were not used.",
            soft_wrap=True,
        )
    if json_file is not None:
        write_json(json_file, {"file": str(file), **comparison.to_dict()})
    if plot is not None:
        compare_plot(comparison, plot)
    written = [str(path) for path in (json_file, plot) if path is not None]
    if written:
        terminal.out.print(f"Written: {', '.join(written)}", soft_wrap=True, markup=False)


def solvers(
    name: Annotated[
        str | None, typer.Argument(help="Describe this one and its options.", show_default=False)
    ] = None,
) -> None:
    """List the solvers, what they can do, and why one cannot run here."""
    from inspect import getdoc

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from solvers import available, get_solver

    if name is not None:
        terminal.out.print(getdoc(get_solver(name)) or "", markup=False)
        return
    table = Table("solver", "what it does", "patterns", "exact", "bound", "here", box=SIMPLE_HEAD)
    for info in available():
        table.add_row(
            info.name,
            info.summary,
            ", ".join(info.patterns),
            "yes" if info.exact else "",
            "yes" if info.gives_bound else "",
            info.unavailable or "yes",
        )
    terminal.out.print(table)
    terminal.out.print("mipprune solvers NAME describes one and its options.")
