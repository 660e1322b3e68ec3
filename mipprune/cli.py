"""The command line."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from solvers import NM, InvalidInput, Pattern, PerLayer, PerRow

if TYPE_CHECKING:
    from .observer import Observer
    from .record import PruneReport

_NO_RECIPE = ("config", "log", "quiet", "verbose", "trust_remote_code", "resume", "dry_run")
"""Options of the command line alone: how a run is watched, begun or resumed, and trust, which no
file can give."""


def _take_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Let a recipe's values be the defaults of the command's options."""
    from .recipe import read_recipe

    if path is not None:
        options = [one for one in context.command.params if one.name not in (*_NO_RECIPE, "help")]
        repeated = {str(one.name) for one in options if getattr(one, "multiple", False)}
        values = read_recipe(path, {str(one.name) for one in options}, repeated)
        context.default_map = dict(values)
    return path


def _recipe_of(context: typer.Context) -> dict[str, Any]:
    """The command's options as they are in force."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in _NO_RECIPE and value not in (None, [], ())
    }


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
        help="[stream:]NAME[:CONFIG][#SPLIT][@COLUMN]: a .txt, .jsonl or .parquet file, a folder "
        "of such, a data set's id, or a token file. Default: Python's own documentation."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward.")]
BatchOrNone = Annotated[
    int | None,
    typer.Option("--batch-size", help="Windows per forward.  [default: by the device's memory]"),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.partial.")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read the model block by block and never hold it whole.  [default: if it is large]",
    ),
]
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
    from .progress import progress
    from .report import demo_table

    _quiet_transformers()
    with progress(_err, runs=len(METHODS) * len(PATTERNS)) as observe:
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
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New folder for the pruned model.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of weights removed, in (0, 1).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="keep:group, such as 2:4 (keeps 2 of every 4).")
    ] = None,
    scope: Annotated[str, typer.Option(help="Sparsity per row or per layer.")] = "row",
    solver: Annotated[
        str | None,
        typer.Option(
            help="See `mipprune solvers`. Without this and the next five options: alps, update "
            "least_squares and, with --sparsity, allocate integer_program, the best of "
            "benchmarks/study.py; with one of them, the others are swap, none, 0 and 0.",
        ),
    ] = None,
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
    update: Annotated[
        str | None,
        typer.Option(help="Weights after the mask: none, gain, least_squares or sparsegpt."),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(help="Judge masks by (1-s) G + s diag(G) instead of the Gram matrix G."),
    ] = None,
    centre: Annotated[
        float | None,
        typer.Option(help="Judge masks with this share of the inputs' mean taken out of G."),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="Share out --sparsity among the layers at equal total: integer_program, by what "
            "pruning each layer does to the model's predictions (some four times the run's time); "
            "owl; or uniform.  [default: integer_program where no method is named, else uniform]"
        ),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            help="Time for the run, such as 10m: searches end when their layer's part of it is "
            "over. A repeat may then choose other masks. Where no solver is named, one that goes "
            "on searching is taken."
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Keep this share of the windows apart, and tell what layers lose on it."),
    ] = None,
    choose: Annotated[
        str | None,
        typer.Option(
            help="NAME=VALUE,VALUE: every layer takes the value with the least loss on held-out "
            "windows. NAME is shrink, centre, damping, update_damping or an option of the solver."
        ),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    grams: Annotated[
        str, typer.Option(help="Inputs of a block from the pruned or the dense blocks before it.")
    ] = "pruned",
    batch_size: BatchOrNone = None,
    device: Device = "auto",
    dtype: DTypeOption = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    blocks: Blocks = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATTERN for layers by name: a sparsity, keep:group or dense; repeatable, "
            "the first match wins. NAME is a layer's whole name, with * for any characters, or "
            "after re: a regular expression."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave layers of this NAME dense; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Leave all other layers dense; repeatable.")
    ] = None,
    token_cache: Annotated[
        Path | None, typer.Option(help="Folder of token files to read or fill.")
    ] = None,
    stream: Stream = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate memory and time, and write nothing.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Append the run's events to this file, as JSON lines.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line for every layer.")
    ] = False,
    config: Annotated[  # noqa: ARG001 (taken up by its callback)
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_take_recipe,
            help="YAML file of these options; what the command line says too wins.",
        ),
    ] = None,
) -> None:
    """Prune a model and save it: safetensors, tokenizer, packed masks, record, card, recipe."""
    from .allocate import Allocation
    from .choice import Choice
    from .defaults import chosen_method
    from .job import plan_job, prune_to_folder
    from .layer_step import LayerStep
    from .masks import parse_start
    from .progress import LineObserver, Observers, progress, run_log
    from .ranks import is_first_process
    from .recipe import recipe_text
    from .report import layer_table, plan_table
    from .rules import Rules, parse_rule
    from .surrogate import Surrogate
    from .time_budget import parse_seconds

    if quiet and verbose:
        raise InvalidInput("Give --quiet or --verbose, not both.")
    rules = Rules(
        parse_pattern(sparsity, pattern, scope),
        tuple(parse_rule(text, scope) for text in rule or []),
        tuple(ignore or []),
        tuple(only or []),
    )
    method = chosen_method(
        solver, update, shrink, centre, allocate,
        more_said=bool(start or option), in_time=time_budget is not None,
        shareable=sparsity is not None and not rule,
    )  # fmt: skip
    recipe = {**_recipe_of(context), **method.options()}
    arguments: dict[str, Any] = {
        "calibration": calibration,
        "pattern": rules,
        "solver": method.solver,
        "start": parse_start(start),
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "stream": stream,
        "blocks": blocks,
        "samples": samples,
        "seqlen": seqlen,
        "batch_size": batch_size,
        "grams": grams,
        "seed": seed,
        "solver_options": parse_options(option or []),
        "token_cache": token_cache,
        "layer_step": LayerStep(
            Surrogate(shrink=method.shrink, centre=method.centre),
            method.update,  # type: ignore[arg-type] # checked there
        ),
        "allocation": method.allocate and Allocation(method.allocate, optional=allocate is None),  # type: ignore[arg-type]
        "time_budget": None if time_budget is None else parse_seconds(time_budget),
        "held_out": held_out,
        "choice": None if choose is None else Choice.parse(choose),
    }
    _quiet_transformers()
    if dry_run:
        with _err.status("") as status:
            _out.print(plan_table(plan_job(model, observer=_phases(status), **arguments)))
        if method.allocate not in (None, "uniform"):
            _out.print(
                "Besides, the allocation: about three times as long by integer_program, one pass "
                "over the dense model by owl."
            )
        return
    quiet = quiet or not is_first_process()
    if not quiet:
        _out.print(recipe_text(recipe).rstrip(), markup=False, soft_wrap=True)
        if method.reason:
            _out.print(method.reason)
    with ExitStack() as stack:
        run_events = stack.enter_context(run_log(log))
        observers: list[Observer] = []
        if run_events is not None:
            run_events.event("recipe", **recipe)
            observers.append(run_events)
        if not quiet:
            bar = stack.enter_context(progress(_err))
            observers.append(bar(f"{model}, {rules.default}"))
        if verbose:
            observers.append(LineObserver(_err))
        watched = Observers(*observers)
        report = prune_to_folder(
            model, out, resume=resume, recipe=recipe, observer=watched, **arguments
        )
        if run_events is not None and report is not None:
            run_events.event(
                "end",
                out=str(out),
                sparsity=report.sparsity,
                loss=report.loss,
                loss_reference=report.loss_reference,
                mask_hash=report.mask_hash,
                warnings=report.warnings,
            )
    if report is not None and is_first_process():
        _print_warnings(report)
    if quiet:
        return
    if report is None:
        _out.print(f"The run was complete. Written: {out}", soft_wrap=True, markup=False)
        return
    _out.print(layer_table(report))
    _out.print(
        f"Pruned {report.sparsity:.1%} of {report.coverage.prunable:,} weights "
        f"({report.coverage.share:.0%} of the block weights); mask hash {report.mask_hash[:16]}.",
        f"Written: {out}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )


@app.command()
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
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="Option of the solver, name=value; repeatable."),
    ] = None,
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
    token_cache: Annotated[
        Path | None, typer.Option(help="Folder of token files to read or fill.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes.")] = False,
    config: Annotated[  # noqa: ARG001 (taken up by its callback)
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_take_recipe,
            help="YAML file of these options; what the command line says too wins.",
        ),
    ] = None,
) -> None:
    """Remove MLP neurons and attention groups: a smaller model that loads like any other."""
    from .report import shrink_table
    from .structured.choice import Method
    from .structured.job import shrink_to_folder

    method = Method(
        solver,
        update,  # type: ignore[arg-type] # checked there
        bias,  # type: ignore[arg-type]
        damping,
        parse_options(option or []),
        time_limit,
    )
    _quiet_transformers()
    with _err.status("") as status:
        report = shrink_to_folder(
            model,
            out,
            calibration,
            neurons=neurons,
            kv_groups=kv_groups,
            parameters=parameters,
            method=method,
            multiple_of=multiple_of,
            grams=grams,
            samples=samples,
            seqlen=seqlen,
            batch_size=batch_size,
            device=device,
            dtype=dtype,  # type: ignore[arg-type] # checked there
            trust_remote_code=trust_remote_code,
            seed=seed,
            blocks=blocks,
            token_cache=token_cache,
            recipe=_recipe_of(context),
            observer=_phases(status),
        )
    for warning in report.warnings:
        _err.print(f"[yellow]Note:[/] {escape(warning)}", soft_wrap=True)
    if quiet:
        return
    _out.print(shrink_table(report))
    share = 1 - report.parameters_after / report.parameters_before
    _out.print(
        f"{report.parameters_after:,} of {report.parameters_before:,} parameters left, "
        f"{share:.1%} fewer; hash {report.mask_hash[:16]}.",
        f"Written: {out}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )


@app.command()
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
    from .calibration import check_tokens, read_windows, window_length
    from .checkpoint import write_json
    from .evaluate import perplexity, side_by_side
    from .report import evaluation_table
    from .results import add_evaluation, evaluation_record, read_record
    from .zero_shot import zero_shot

    if save:
        read_record(model)
    if json_file is not None:
        _check_writable(json_file)
    loaded = _load(model, device, dtype, trust_remote_code)
    dense = None if against is None else _load(against, device, dtype, trust_remote_code)
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
    _out.print(evaluation_table(record))
    how = (
        f"{record['text']}: {record['method']}."
        if tasks is None
        else f"By lm-evaluation-harness {record['tasks']['harness']}."
    )
    _out.print(how, soft_wrap=True, markup=False)
    if json_file is not None:
        write_json(json_file, record)
    if save:
        add_evaluation(model, record)


@app.command()
def tokens(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New safetensors file.")],
    text: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    seed: Seed = 0,
) -> None:
    """Write a calibration text's windows as a token file, which --calibration takes anywhere."""
    from .calibration import read_windows, window_length
    from .checkpoint import check_new

    check_new(out)
    if out.suffix != ".safetensors":
        raise InvalidInput(f"{out} is no name for a token file; let it end in .safetensors.")
    config, tokenizer = _load_tokenizer(model)
    length = window_length(config, seqlen)
    windows = read_windows(text, "calibration", tokenizer, length, samples, seed)
    windows.save(out)
    _out.print(
        f"{len(windows.tokens)} windows of {length} tokens, {windows.source}; "
        f"hash {windows.digest[:16]}. Written: {out}",
        soft_wrap=True,
        markup=False,
    )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
) -> None:
    """Write a pruned model's card and HTML report anew, from its record."""
    from .results import CARD_FILE, REPORT_FILE, read_record, write_report, write_results

    record = read_record(folder)
    write_report(folder, record)
    write_results(folder, record)
    _out.print(
        f"Written: {folder / REPORT_FILE}, {folder / CARD_FILE}", soft_wrap=True, markup=False
    )


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


@app.command(name="time-2to4")
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
    from .checkpoint import write_json
    from .environment import environment
    from .models import resolve_device
    from .report import timing_table
    from .timing import time_2to4 as run

    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or repeats < 1:
        raise InvalidInput("Batches and repeats are positive numbers, such as --batches 1,8,64.")
    timings = run(folder, batches=sizes, repeats=repeats, device=device)
    _out.print(timing_table(timings))
    if json_file is not None:
        record = [asdict(timing) for timing in timings]
        machine = environment(resolve_device(device), [])
        write_json(json_file, {"environment": machine, "timings": record})


@app.command()
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
        _out.print(getdoc(get_solver(name)) or "", markup=False)
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
    _out.print(table)
    _out.print("mipprune solvers NAME describes one and its options.")


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


def _load_tokenizer(model: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a model, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    from .embedded import MODEL_NAME, MODEL_PATH

    _quiet_transformers()
    path = str(MODEL_PATH) if model == MODEL_NAME else str(Path(model).expanduser())
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"The tokenizer of '{model}' cannot be read: {reason}") from error


def _phases(status: Status) -> Observer:
    """An observer that shows the current phase."""
    from .observer import Observer

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


def main() -> None:
    """Run the command line; input that cannot be worked with ends it with exit code 2."""
    try:
        app()
    except InvalidInput as error:
        _err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
