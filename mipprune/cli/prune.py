"""`mipprune prune`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solvers import InvalidInput

from . import terminal
from .options import (
    BatchOrNone,
    Blocks,
    Calibration,
    Config,
    Device,
    DTypeOption,
    ModelArgument,
    PatternName,
    Quiet,
    Resume,
    Samples,
    Scope,
    Seed,
    SeqLen,
    SolverOptions,
    Sparsity,
    Stream,
    TokenCache,
    TrustRemoteCode,
    parse_options,
    parse_pattern,
    recipe_of,
)
from .terminal import phases, print_warnings, quiet_transformers

if TYPE_CHECKING:
    from ..observer import Observer


def prune(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="New folder for the pruned model.")],
    sparsity: Sparsity = None,
    pattern: PatternName = None,
    scope: Scope = "row",
    solver: Annotated[
        str | None,
        typer.Option(
            help="See `mipprune solvers`. Without this and the next seven options: alps, update "
            "least_squares and, with --sparsity, allocate integer_program, the best of "
            "benchmarks/study.py; with one of them, the others are swap, none, 0, 0, equal and 1.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Solver whose mask to start from, current (the weights that are not zero), or the "
            "folder of a pruned model, by whomever.  [default: wanda]"
        ),
    ] = None,
    option: SolverOptions = None,
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
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Judge masks with tokens weighted by fisher, the squared gradients of the model's "
            "loss at a layer's output, or inverse_norm of the block's input, instead of equal."
        ),
    ] = None,
    row_groups: Annotated[
        int | None,
        typer.Option(
            help="Groups of a layer's rows with Fisher weights of their own.  [default: 1]"
        ),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="Share out --sparsity among the layers at equal total: integer_program, by what "
            "pruning each layer does to the model's predictions (some four times the run's time); "
            "owl; or uniform.  [default: integer_program where no method is named, else uniform]"
        ),
    ] = None,
    permute: Annotated[
        str | None,
        typer.Option(
            help="With a keep:group pattern, first put inputs in an order that suits it, in which "
            "the dense model computes the same: neurons of the MLPs, values within each head, "
            "the residual stream (neurons,values,residual), or all."
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
    choose_for: Annotated[
        str | None,
        typer.Option(
            help="Choose for each layer, or one value for the model, by the loss of all layers in "
            "a pass over the dense model before the run.  [default: layer]"
        ),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    seqlen: SeqLen = 2048,
    grams: Annotated[
        str,
        typer.Option(
            help="Inputs of a block from the pruned or the dense blocks before it; or sequential: "
            "within a pruned block too, each layer's inputs from the layers pruned before it."
        ),
    ] = "pruned",
    targets: Annotated[
        str,
        typer.Option(
            help="What layers are to give on these inputs: own, their own outputs; dense, what "
            "they give in the dense model; stream, that and, where their output is added to the "
            "hidden states, what these lack of the dense model's. dense:0.5 goes half the way."
        ),
    ] = "own",
    bias: Annotated[
        str,
        typer.Option(
            help="existing: a layer's bias, if it has one, makes up for the mean of what was "
            "removed; none: biases stay."
        ),
    ] = "none",
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
    token_cache: TokenCache = None,
    stream: Stream = None,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only estimate memory and time, and write nothing.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="Append the run's events to this file, as JSON lines.")
    ] = None,
    quiet: Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line for every layer.")
    ] = False,
    config: Config = None,  # noqa: ARG001 (taken up by its callback)
) -> None:
    """Prune a model and save it: safetensors, tokenizer, packed masks, record, card, recipe."""
    from ..allocate import Allocation
    from ..choice import Choice
    from ..defaults import chosen_method
    from ..job import plan_job, prune_to_folder
    from ..layer_step import LayerStep, parse_targets
    from ..masks import parse_start
    from ..opening import Source
    from ..progress import LineObserver, Observers, progress, run_log
    from ..ranks import is_first_process
    from ..recipe import recipe_text
    from ..report import choice_line, layer_table, plan_table
    from ..rules import Rules, parse_rule
    from ..settings import Settings
    from ..surrogate import Surrogate
    from ..time_budget import parse_seconds

    if quiet and verbose:
        raise InvalidInput("Give --quiet or --verbose, not both.")
    if choose_for is not None and choose is None:
        raise InvalidInput("--choose-for says for what --choose chooses; give that too.")
    rules = Rules(
        parse_pattern(sparsity, pattern, scope),
        tuple(parse_rule(text, scope) for text in rule or []),
        tuple(ignore or []),
        tuple(only or []),
    )
    method = chosen_method(
        solver, update, shrink, centre, allocate,
        tokens=tokens, row_groups=row_groups,  # type: ignore[arg-type] # checked by Surrogate
        more_said=bool(start or option), in_time=time_budget is not None,
        shareable=sparsity is not None and not rule,
    )  # fmt: skip
    recipe = {**recipe_of(context), **method.options()}
    source = Source(
        model,
        device,
        dtype,  # type: ignore[arg-type] # checked when it is read
        trust_remote_code,
        stream,
        blocks,
    )
    allocation = None
    if method.allocate not in (None, "uniform"):
        allocation = Allocation(method.allocate, optional=allocate is None)  # type: ignore[arg-type]
    share, stream = parse_targets(targets)
    settings = Settings(
        rules,
        method.solver,
        parse_start(start),
        solver_options=parse_options(option or []),
        grams=grams,  # type: ignore[arg-type] # checked there
        samples=samples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        layer_step=LayerStep(
            Surrogate(
                shrink=method.shrink,
                centre=method.centre,
                dense_targets=share,
                stream=stream,
                tokens=method.tokens,
                row_groups=method.row_groups,
            ),
            method.update,  # type: ignore[arg-type] # checked there
            bias=bias,  # type: ignore[arg-type] # checked there
        ),
        allocation=allocation,
        permute=permute,
        time_budget=None if time_budget is None else parse_seconds(time_budget),
        held_out=held_out,
        choice=None if choose is None else Choice.parse(choose, choose_for or "layer"),  # type: ignore[arg-type]
    )
    quiet_transformers()
    if dry_run:
        with terminal.err.status("") as status:
            terminal.out.print(
                plan_table(
                    plan_job(
                        source,
                        calibration,
                        settings,
                        token_cache=token_cache,
                        observer=phases(status),
                    )
                )
            )
        if allocation is not None:
            terminal.out.print(
                "Besides, the allocation: about three times as long by integer_program, one pass "
                "over the dense model by owl."
            )
        if permute is not None:
            terminal.out.print("Besides, the order of inputs: one pass over the dense model.")
        return
    quiet = quiet or not is_first_process()
    if not quiet:
        terminal.out.print(recipe_text(recipe).rstrip(), markup=False, soft_wrap=True)
        if method.reason:
            terminal.out.print(method.reason)
    with ExitStack() as stack:
        run_events = stack.enter_context(run_log(log))
        observers: list[Observer] = []
        if run_events is not None:
            run_events.event("recipe", **recipe)
            observers.append(run_events)
        if not quiet:
            bar = stack.enter_context(progress(terminal.err))
            observers.append(bar(f"{model}, {rules.default}"))
        if verbose:
            observers.append(LineObserver(terminal.err))
        watched = Observers(*observers)
        report = prune_to_folder(
            source,
            out,
            calibration,
            settings,
            token_cache=token_cache,
            resume=resume,
            recipe=recipe,
            observer=watched,
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
        print_warnings(report)
    if quiet:
        return
    if report is None:
        terminal.out.print(f"The run was complete. Written: {out}", soft_wrap=True, markup=False)
        return
    terminal.out.print(layer_table(report))
    said = choice_line(report)
    if said is not None:
        terminal.out.print(said, markup=False)
    terminal.out.print(
        f"Pruned {report.sparsity:.1%} of {report.coverage.prunable:,} weights "
        f"({report.coverage.share:.0%} of the block weights); mask hash {report.mask_hash[:16]}.",
        f"Written: {out}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )
