"""The command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from solvers import NM, InvalidInput, Pattern, PerLayer, PerRow

if TYPE_CHECKING:
    from .prune import LayerResult, Observer, PruneReport

app = typer.Typer(
    name="mipprune",
    help="Choose the weights an LLM keeps by integer optimisation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(help='Folder, Hugging Face id, or "embedded".', show_default=False)
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help=".txt, .jsonl, .parquet, or a data set as id, id:config or id:config#split. "
        "Default: Python's own documentation."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of windows and solver.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
]
Blocks = Annotated[str | None, typer.Option(help="Name of the module list of blocks.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
        "mipprune-demo"
    ),
    samples: Annotated[int, typer.Option(help="Windows to calibrate and to evaluate on.")] = 128,
    row_seconds: Annotated[float, typer.Option(help="Most seconds to bound a row.")] = 8.0,
    seed: Seed = 0,
) -> None:
    """Prune the embedded GPT in several ways and compare them, offline."""
    from .demo import CERTIFIED_LAYER, CERTIFIED_ROWS, METHODS, PATTERNS, run_demo
    from .report import demo_table

    _quiet_transformers()
    with _progress(runs=len(METHODS) * len(PATTERNS)) as observe:
        rows = run_demo(out, samples=samples, seed=seed, row_seconds=row_seconds, observer=observe)
    _out.print(demo_table(rows))
    _out.print(
        f"Gap at most: how far the masks of {len(CERTIFIED_ROWS)} rows of {CERTIFIED_LAYER} "
        "can be from the best ones, proven."
    )
    for row in rows:
        if row.loss_reduction is not None:
            _out.print(
                f"{row.pattern}: {row.method} lowers the summed layer loss "
                f"by {row.loss_reduction:.1%} against its start."
            )
    _out.print(f"Written: {out / 'demo.json'}, {out / 'demo.png'}", soft_wrap=True, markup=False)


@app.command()
def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New folder for the pruned model.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of weights removed, in (0, 1).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="keep:group, such as 2:4 (keeps 2 of every 4).")
    ] = None,
    scope: Annotated[str, typer.Option(help="Sparsity per row or per layer.")] = "row",
    solver: Annotated[str, typer.Option(help="See `mipprune solvers`.")] = "swap",
    start: Annotated[
        str | None,
        typer.Option(
            help="Solver whose mask to start from, current (the weights that are not zero), or the "
            "folder of a pruned model, by whomever.  [default: wanda]"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Option of the solver, name=value; repeatable."),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    grams: Annotated[
        str, typer.Option(help="Inputs of a block from the pruned or the dense blocks before it.")
    ] = "pruned",
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    blocks: Blocks = None,
) -> None:
    """Prune a model and save it: safetensors, tokenizer, packed masks, and the record."""
    from .checkpoint import check_new, save
    from .masks import parse_start
    from .prune import prune as run
    from .report import layer_table

    check_new(out)
    chosen_pattern = parse_pattern(sparsity, pattern, scope)
    options = parse_options(option or [])
    start_from = parse_start(start)
    loaded = _load(model, device, dtype, trust_remote_code)
    with _progress() as observe:
        report = run(
            loaded.model,
            loaded.tokenizer,
            calibration,
            chosen_pattern,
            solver,
            start_from,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            grams=grams,  # type: ignore[arg-type]
            seed=seed,
            blocks=blocks,
            solver_options=options,
            observer=observe(f"{model}, {chosen_pattern}"),
        )
    report.settings.update(model=model, calibration=calibration, dtype=dtype)
    save(out, loaded.model, loaded.tokenizer, report, loaded.stored_dtype)
    _out.print(layer_table(report))
    _print_warnings(report)
    _out.print(
        f"Pruned {report.sparsity:.1%} of {report.coverage.prunable:,} weights "
        f"({report.coverage.share:.0%} of the block weights); mask hash {report.mask_hash[:16]}.",
        f"Written: {out}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )


@app.command()
def evaluate(
    model: ModelArgument,
    text: Annotated[
        str | None,
        typer.Option(help="Like --calibration of prune. Default: Python's own documentation."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows.  [default: all]")] = None,
    seqlen: SeqLen = 2048,
    batch_size: Batch = 8,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here too.")
    ] = None,
) -> None:
    """Perplexity of a model, dense or pruned, on windows that do not overlap."""
    from .calibration import cut_windows, read_texts, window_length
    from .checkpoint import write_json
    from .evaluate import perplexity

    loaded = _load(model, device, dtype, trust_remote_code)
    source, texts = read_texts(text, "evaluation")
    length = window_length(loaded.model.config, seqlen)
    windows = cut_windows(texts, source, loaded.tokenizer, length, samples, seed)
    result = perplexity(loaded.model, windows, batch_size)
    _out.print(
        f"perplexity {result.perplexity:.4f} over {result.predicted_tokens:,} tokens "
        f"({len(windows.tokens)} windows of {length}, {source})",
        soft_wrap=True,
        markup=False,
    )
    if json_file is not None:
        record = {
            "model": model,
            "perplexity": result.perplexity,
            "predicted_tokens": result.predicted_tokens,
            "windows": len(windows.tokens),
            "length": length,
            "text": source,
            "text_sha256": windows.digest,
        }
        write_json(json_file, record)


@app.command()
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
    from .checkpoint import check_new
    from .prune import layer_problem

    check_new(out)
    loaded = _load(model, device, dtype, trust_remote_code)
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
    _out.print(
        f"{layer}: {rows} rows, {inputs} inputs. Written: {out}", soft_wrap=True, markup=False
    )


@app.command()
def compare(
    file: Annotated[
        Path, typer.Argument(help="As `mipprune problem` writes it.", show_default=False)
    ],
    solvers: Annotated[str, typer.Option(help="Names, separated by commas.", show_default=False)],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of weights removed, in (0, 1).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="keep:group, such as 2:4 (keeps 2 of every 4).")
    ] = None,
    scope: Annotated[str, typer.Option(help="Sparsity per row or per layer.")] = "row",
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
    from solvers import MaskProblem, get_solver

    from .checkpoint import write_json
    from .compare import compare as run
    from .compare import part
    from .report import compare_plot, compare_table

    names = [name.strip() for name in solvers.split(",") if name.strip()]
    for name in names:
        get_solver(name)
    for path in (json_file, plot):
        if path is not None:
            _check_writable(path)
    chosen = parse_pattern(sparsity, pattern, scope)
    whole = MaskProblem.load(file, PerLayer(sparsity=0.5))
    found = part(whole, chosen, rows, inputs)
    with _err.status("") as status:
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
    _out.print(compare_table(comparison))
    for reason in comparison.refused.values():
        _err.print(f"[yellow]Not run:[/] {escape(reason)}", soft_wrap=True)
    for name, count in comparison.refuted.items():
        _err.print(
            f"[yellow]Note:[/] Bounds of {name} lie above the loss of a mask "
            f"({count} of {len(comparison.best_loss)}); they are wrong and were not used.",
            soft_wrap=True,
        )
    if json_file is not None:
        write_json(json_file, {"file": str(file), **comparison.to_dict()})
    if plot is not None:
        compare_plot(comparison, plot)
    written = [str(path) for path in (json_file, plot) if path is not None]
    if written:
        _out.print(f"Written: {', '.join(written)}", soft_wrap=True, markup=False)


@app.command()
def certify(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
    rows: Annotated[int, typer.Option(help="Rows per layer, at random; 0 for all.")] = 16,
    row_seconds: Annotated[float, typer.Option(help="Most seconds per row.")] = 10.0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Bound how far each layer's mask is from the best; write certificates into the folder."""
    from .certify import certify as run
    from .report import certificate_table

    _quiet_transformers()
    with _err.status("") as status:
        found = run(
            folder,
            rows=rows or None,
            row_seconds=row_seconds,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=_phases(status),
        )
    _out.print(certificate_table(found))
    _out.print(f"Written: {folder / 'certificates'}", soft_wrap=True, markup=False)


@app.command()
def check(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a certified model.", show_default=False)
    ],
) -> None:
    """Verify a folder's certificates from its files alone, apart from all solvers."""
    from .certify import check_folder

    verified = check_folder(folder)
    rows = sum(count for count, _ in verified.values())
    _out.print(
        f"{rows} rows of {len(verified)} layers verified; "
        f"largest layer gap {max(gap for _, gap in verified.values()):.2%}."
    )


@app.command()
def solvers() -> None:
    """List the solvers, what they can do, and why one cannot run here."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from solvers import available

    table = Table(
        "solver", "what it does", "patterns", "exact", "bound", "options", "here", box=SIMPLE_HEAD
    )
    for info in available():
        table.add_row(
            info.name,
            info.summary,
            ", ".join(info.patterns),
            "yes" if info.exact else "",
            "yes" if info.gives_bound else "",
            ", ".join(info.options),
            info.unavailable or "yes",
        )
    _out.print(table)


def parse_pattern(sparsity: float | None, pattern: str | None, scope: str) -> Pattern:
    """The pattern that the options name; `InvalidInput` if they name none or two."""
    if (sparsity is None) == (pattern is None):
        raise InvalidInput("Give either --sparsity (such as 0.6) or --pattern (such as 2:4).")
    if scope not in ("row", "layer"):
        raise InvalidInput(f"Scope '{scope}' is neither row nor layer.")
    if pattern is not None:
        if scope == "layer":
            raise InvalidInput("A keep:group pattern has no scope; leave --scope out.")
        return NM.parse(pattern)
    return PerRow(sparsity=sparsity) if scope == "row" else PerLayer(sparsity=sparsity)


def parse_options(options: list[str]) -> dict[str, Any]:
    """``name=value`` texts as a dictionary; values are JSON where they can be, else text."""
    parsed: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"Solver option '{text}' is not of the form name=value.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def _check_writable(file: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on its content."""
    above = next((parent for parent in file.absolute().parents if parent.exists()), file)
    if file.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise InvalidInput(f"{file} cannot be written; choose another file.")


def _load(model: str, device: str, dtype: str, trust_remote_code: bool) -> Any:
    from .models import load_model, resolve_device

    _quiet_transformers()
    with _err.status(f"Reading {model}"):
        return load_model(model, resolve_device(device), dtype, trust_remote_code)  # type: ignore[arg-type]


def _phases(status: Status) -> Observer:
    """An observer that shows the current phase."""
    from .prune import Observer

    class PhaseObserver(Observer):
        def phase(self, text: str) -> None:
            status.update(escape(text))

    return PhaseObserver()


def _quiet_transformers() -> None:
    """Leave the terminal to our own progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _print_warnings(report: PruneReport) -> None:
    for warning in report.warnings:
        _err.print(f"[yellow]Note:[/] {escape(warning)}", soft_wrap=True)
    dead = [layer for layer in report.layers if layer.dead_inputs]
    if dead:
        inputs = sum(layer.dead_inputs for layer in dead)
        _err.print(
            f"[yellow]Note:[/] {inputs} inputs of {len(dead)} layers were always zero; "
            "their weights were pruned first.",
            soft_wrap=True,
        )


@contextmanager
def _progress(runs: int = 1) -> Iterator[Any]:
    """A progress bar; yields what makes an observer of a run out of its title."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from .prune import Observer

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_err,
    )
    task = bar.add_task("", total=None, loss="")

    class BarObserver(Observer):
        def __init__(self, title: str) -> None:
            self._loss, self._reference, self._blocks = 0.0, 0.0, 0
            bar.console.print(title, markup=False)

        def begin(self, blocks: int, weights: int) -> None:
            self._blocks = blocks
            if bar.tasks[0].total is None:
                bar.update(task, total=runs * weights)

        def phase(self, text: str) -> None:
            bar.update(task, description=text)

        def layer(self, block: int, result: LayerResult) -> None:
            self._loss += result.loss
            self._reference += result.loss_reference
            share = f"{self._loss / self._reference:.3f} of wanda" if self._reference else ""
            bar.update(
                task,
                advance=result.rows * result.inputs,
                loss=f"block {block + 1}/{self._blocks}, loss {share}",
            )

    def observe(title: str) -> Observer:
        return BarObserver(title)

    with bar:
        yield observe


def main() -> None:
    """Run the command line; input that cannot be worked with ends it with exit code 2."""
    try:
        app()
    except InvalidInput as error:
        _err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
