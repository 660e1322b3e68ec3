"""Results for people: tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from solvers import Evidence, TracePoint
from solvers.files import replaced_on_success

if TYPE_CHECKING:
    from torch import Tensor

    from .certify import LayerCertificate
    from .compare import Comparison
    from .demo import DemoRow
    from .estimate import Plan
    from .record import LayerResult, PruneReport
    from .structured.report import ShrinkReport
    from .timing import Timing


def layer_table(report: PruneReport) -> Table:
    """The run's layers, summed by kind (the part of the name after the block's number)."""
    blocks = f"{report.settings['blocks']}."
    kinds: dict[str, list[LayerResult]] = {}
    for layer in report.layers:
        kind = layer.name.removeprefix(blocks).partition(".")[2]
        kinds.setdefault(kind, []).append(layer)
    title = f"Loss of {len(report.layers)} layers by kind, in {report.seconds:.1f} s"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    apart = ["held out / own"] if report.held_out_loss is not None else []
    for column in ("sparsity", "loss", "/ start", "/ wanda", "/ output", *apart, "s"):
        table.add_column(column, justify="right")
    for kind, layers in kinds.items():
        table.add_row(kind, *_sums(layers))
    table.add_section()
    table.add_row("all", *_sums(report.layers))
    return table


def choice_line(report: PruneReport) -> str | None:
    """What one value was chosen for all layers, and by which losses; None if none was."""
    choice = report.settings.get("choice")
    if not choice or "losses" not in choice:
        return None
    each = zip(choice["values"], choice["losses"], strict=True)
    losses = ", ".join(f"{value}: {loss:.4g}" for value, loss in each)
    return (
        f"{choice['option']} is {choice['value']} in all layers, by their held-out loss ({losses})."
    )


def shrink_table(report: ShrinkReport) -> Table:
    """Groups removed from every block, summed by kind."""
    from .structured.choice import weakest
    from .structured.coupling import WORDS

    table = Table(title=f"Removed in {report.seconds:.1f} s", box=SIMPLE_HEAD)
    table.add_column("from every block", no_wrap=True)
    for column in ("left", "loss", "/ wanda_sp", "updated", "/ output", "gap", "evidence"):
        table.add_column(column, justify="right")
    for kind, (before, after) in report.counts.items():
        layers = [one for one in report.layers if one.kind == kind]
        loss = sum(one.loss for one in layers)
        gaps = [one.gap for one in layers if one.gap is not None]
        table.add_row(
            WORDS[kind],
            f"{after} of {before}",
            f"{loss:.4g}",
            _ratio(loss, sum(one.loss_wanda_sp for one in layers)),
            f"{sum(one.updated_loss for one in layers):.4g}",
            f"{sum(one.relative_error for one in layers) / len(layers):.2%}",
            f"{max(gaps):.2%}" if len(gaps) == len(layers) else "–",
            (weakest(layers) if len(gaps) == len(layers) else None) or "–",
        )
    if report.latency is not None:
        time, measured = report.latency, report.latency["measured"]
        least, most = measured["interval"]
        table.caption = (
            f"A pass of {time['batch']} x {time['tokens']} tokens takes {measured['of_dense']:.3f} "
            f"({least:.3f} to {most:.3f}) of the dense model's time, measured again; asked for: at "
            f"most {time['share']}."
        )
    return table


def plan_table(plan: Plan) -> Table:
    """What a run would need."""
    from .estimate import TIME_FACTOR

    table = Table(title="Before anything runs", box=SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("blocks", f"{plan.blocks}, each with {plan.layers} layers to prune")
    table.add_row("weights to prune", f"{plan.weights:,}")
    table.add_row("model", plan.placement)
    for layers, inputs in plan.grams.items():
        size = _bytes(8.0 * inputs**2)
        table.add_row("Gram matrix", f"{inputs} x {inputs}, {size}: {layers}")
    for phase, need in plan.phases.items():
        table.add_row(f"memory, {phase}", _bytes(need))
    table.add_row("peak memory", _bytes(plan.peak))
    if plan.resting:
        table.add_row("host memory besides", _bytes(plan.resting))
    least, most = plan.seconds / TIME_FACTOR, plan.seconds * TIME_FACTOR
    said = f"{_duration(plan.seconds)}, likely {_duration(least)} to {_duration(most)}"
    table.add_row("time, about", said)
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def certificate_table(certificates: Sequence[LayerCertificate]) -> Table:
    """What is proven of every layer."""
    table = Table(title="Gap to the best mask there is, at most (certified)", box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for column in ("rows", "loss", "gap", "mean row gap"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in certificates:
        margin = "" if one.margin is None else f" ± {one.margin:.2%}"
        gap_margin = "" if one.gap_margin is None else f" ± {one.gap_margin:.2%}"
        table.add_row(
            one.name,
            str(len(one.rows)),
            f"{one.loss:.4g}",
            "no bound" if one.says_nothing else f"{one.gap:.2%}{gap_margin}",
            "" if one.says_nothing else f"{one.mean_row_gap:.2%}{margin}",
        )
    loss, bound = sum(one.loss for one in certificates), sum(one.bound for one in certificates)
    table.add_section()
    rows = sum(len(one.rows) for one in certificates)
    gap = f"{(loss - bound) / abs(loss):.2%}" if loss else "0 %"
    if all(one.says_nothing for one in certificates):
        gap = "no bound"
    table.add_row("all", str(rows), f"{loss:.4g}", gap, "")
    return table


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """A perplexity or tasks, of one model or of two; as `evaluation_record` has it."""
    from .results import with_error

    against = evaluation.get("against") or {}
    table = Table(box=SIMPLE_HEAD, show_header=bool(against))
    table.add_column("")
    for column in ("pruned", "dense") if against else (str(evaluation["model"]),):
        table.add_column(column, justify="right", no_wrap=True)

    def row(name: str, own: str, dense: str = "") -> None:
        table.add_row(name, own, *([dense] if against else []))

    if "perplexity" in evaluation:
        of_dense = f"{against['perplexity']:.4f}" if against else ""
        row("perplexity", f"{evaluation['perplexity']:.4f}", of_dense)
        nll = with_error(evaluation["nll"], 4)
        row("negative log-likelihood, nats", nll, with_error(against["nll"], 4) if against else "")
        if against:
            row("increase, nats", with_error(against["nll_increase"], 4))
            row("KL(dense ‖ pruned), nats", with_error(against["kl"], 4))
            row("same top token", with_error(against["agreement"], 2, percent=True))
        row("predicted tokens", f"{evaluation['predicted_tokens']:,}")
        return table
    found = evaluation["tasks"]
    for task, result in found["tasks"].items():
        others = (against.get("tasks") or {}).get("tasks", {}).get(task, {}).get("metrics", {})
        for metric in result["metrics"]:
            if not metric.endswith("_stderr"):
                own, dense = (_metric(values, metric) for values in (result["metrics"], others))
                row(f"{task}, {result['shots']} shots, {metric}", own, dense)
    return table


def timing_table(timings: Sequence[Timing]) -> Table:
    """One line per size and batch."""
    table = Table(title="Median milliseconds of a product", box=SIMPLE_HEAD)
    table.add_column("layer (outputs x inputs)", no_wrap=True)
    for column in ("layers", "tokens", "dense", "2:4", "dense / 2:4"):
        table.add_column(column, justify="right")
    for one in timings:
        table.add_row(
            f"{one.outputs} x {one.inputs}",
            str(one.layers),
            str(one.batch),
            f"{one.dense:.4f}",
            f"{one.sparse:.4f}",
            f"{one.ratio:.2f}",
        )
    return table


def _metric(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _sums(layers: Sequence[LayerResult]) -> list[str]:
    loss = sum(layer.loss for layer in layers)
    starts = [layer.loss_start for layer in layers if layer.loss_start is not None]
    sizes = [layer.rows * layer.inputs for layer in layers]
    removed = sum(layer.sparsity * size for layer, size in zip(layers, sizes, strict=True))
    errors = [layer.relative_error for layer in layers]
    apart = [one.held_out_updated_loss for one in layers if one.held_out_updated_loss is not None]
    own = sum(layer.updated_loss for layer in layers)
    return [
        f"{removed / sum(sizes):.1%}",
        f"{loss:.4g}",
        _ratio(loss, sum(starts)) if len(starts) == len(layers) else "–",
        _ratio(loss, sum(layer.loss_reference for layer in layers)),
        f"{sum(errors) / len(errors):.2%}",
        *([_ratio(sum(apart), own)] if len(apart) == len(layers) else []),
        f"{sum(layer.seconds for layer in layers):.1f}",
    ]


def _ratio(loss: float, reference: float) -> str:
    return f"{loss / reference:.3f}" if reference > 0 else "–"


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """One line per method and pattern, the dense model first."""
    table = Table(title="The embedded GPT, pruned", box=SIMPLE_HEAD)
    table.add_column("pattern", no_wrap=True)
    table.add_column("masks", no_wrap=True)
    for column in ("loss / wanda", "gap at most", "evidence", "perplexity", "seconds"):
        table.add_column(column, justify="right")
    last = rows[0].pattern
    for row in rows:
        if row.pattern != last:
            table.add_section()
            last = row.pattern
        table.add_row(
            row.pattern,
            row.method,
            "–" if row.relative_loss is None else f"{row.relative_loss:.3f}",
            "–" if row.certified_gap is None else f"{row.certified_gap:.1%}",
            row.evidence or "–",
            f"{row.perplexity:.2f}",
            "–" if row.seconds is None else f"{row.seconds:.1f}",
        )
    return table


def demo_plot(rows: Sequence[DemoRow], path: str | Path) -> None:
    """Layer loss and perplexity of every method, per pattern, as a PNG picture."""
    from matplotlib.figure import Figure

    dense = next(row for row in rows if row.relative_loss is None)
    pruned = [row for row in rows if row.relative_loss is not None]
    patterns = list(dict.fromkeys(row.pattern for row in pruned))
    methods = list(dict.fromkeys(row.method for row in pruned))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, perplexity_axes = figure.subplots(1, 2)
    width = 0.8 / len(methods)
    for m, method in enumerate(methods):
        here = [row for row in pruned if row.method == method]
        at = [patterns.index(row.pattern) + (m - (len(methods) - 1) / 2) * width for row in here]
        colour = f"C{m}"
        losses = [row.relative_loss or 0.0 for row in here]
        bars = loss_axes.bar(at, losses, width, label=method, color=colour)
        loss_axes.bar_label(bars, fmt="%.2f", fontsize=8)
        rise = [row.perplexity - dense.perplexity for row in here]
        bars = perplexity_axes.bar(at, rise, width, bottom=dense.perplexity, color=colour)
        perplexity_axes.bar_label(bars, [f"{row.perplexity:.1f}" for row in here], fontsize=8)
    loss_axes.set_ylabel("summed layer loss / wanda")
    loss_axes.legend(fontsize=8, ncols=2)
    loss_axes.set_ylim(0, 1.35 * max(row.relative_loss or 0.0 for row in pruned))
    perplexity_axes.set_ylabel(f"perplexity (bars begin at dense, {dense.perplexity:.1f})")
    perplexity_axes.margins(y=0.1)
    for axes in (loss_axes, perplexity_axes):
        axes.set_xticks(range(len(patterns)), patterns)
        axes.spines[["top", "right"]].set_visible(False)
    with replaced_on_success(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


_INSTANT = 1e-3
"""Seconds at the left edge of a logarithmic time axis; what is faster is drawn there."""

_EXCESS_TICKS = {0.0: "0", 0.001: "0.1 %", 0.01: "1 %", 0.1: "10 %", 1.0: "100 %"}
"""Ticks of a performance profile, whose axis is linear up to the first and logarithmic above."""


def compare_table(comparison: Comparison) -> Table:
    """One line per solver, then the best of all; gaps are to the best bound of any solver."""
    settings = comparison.settings
    title = f"{settings['rows']} rows, {settings['inputs']} inputs, {comparison.pattern}"
    if settings["time_limit"] is not None:
        title += f", at most {settings['time_limit']:g} s per solver"
    table = Table(title=title, caption=_bound_caption(comparison), box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver", no_wrap=True)
    for column in ("loss", "/ best", "own\nbound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("evidence", no_wrap=True)
    for column in ("mean\ngap", "worst\ngap"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("status")
    table.add_column("s", justify="right", no_wrap=True)
    best = float(comparison.best_loss.sum())
    for name, solution in comparison.solutions.items():
        loss = float(comparison.loss(name).sum())
        table.add_row(
            name,
            f"{loss:.4g}",
            _ratio(loss, best),
            *_bound_and_gaps(
                comparison.bound(name), [comparison.evidence(name)], comparison.gap(name)
            ),
            solution.status.name.lower().replace("_", " "),
            f"{solution.stats['time']:.2f}",
        )
    for name in comparison.refused:
        table.add_row(name, *["–"] * 6, "not run", "–")
    table.add_section()
    of_all = (comparison.best_bound, comparison.best_evidence, comparison.best_gap)
    table.add_row(
        "best of all", f"{best:.4g}", _ratio(best, best), *_bound_and_gaps(*of_all), "", ""
    )
    return table


def _bound_caption(comparison: Comparison) -> str:
    if not bool(comparison.best_bound.isfinite().any()):
        return "No gaps: none of the solvers gave a bound that holds."
    given = [comparison.evidence(name) for name in comparison.solutions]
    legend = "".join(f"\n{line}" for line in evidence_legend(given))
    if comparison.pattern.coupled:
        return f"Gap: of the rows' sum to the best bound of any solver.{legend}"
    rows, bounded = len(comparison.best_bound), int(comparison.best_bound.isfinite().sum())
    which = "" if bounded == rows else f", over the {bounded} of {rows} rows that have one"
    return f"Gaps: per row, to the best bound of any solver{which}.{legend}"


def evidence_legend(given: Iterable[Evidence | str | None]) -> list[str]:
    """What the kinds of evidence (or their labels) mean, a line each, the strongest first."""
    found = set(given)
    return [f"{k.label}: {k.message}" for k in Evidence if k in found or k.label in found]


def _bound_and_gaps(bound: Tensor, evidence: Sequence[Evidence | None], gap: Tensor) -> list[str]:
    total = float(bound.sum())
    given = [kind for kind in evidence if kind is not None]
    known = gap[gap.isfinite()]
    return [
        "–" if math.isnan(total) else f"{total:.4g}",
        Evidence.weakest(*given).label if given else "–",
        _percent(float(known.mean())) if len(known) else "–",
        _percent(float(known.max())) if len(known) else "–",
    ]


def _percent(share: float) -> str:
    return f"{share:.2%}" if abs(share) < 0.1 else f"{share:.1%}"


def compare_plot(comparison: Comparison, path: str | Path) -> None:
    """Loss and bound over time, and a performance profile over rows, as a PNG picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    progress, profile = figure.subplots(1, 2)
    colours = {name: f"C{i}" for i, name in enumerate(comparison.solutions)}
    _draw_progress(progress, comparison, colours)
    if len(comparison.best_loss) > 1:
        _draw_profile(profile, comparison, colours)
    else:
        _draw_losses(profile, comparison, colours)
    for axes in (progress, profile):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=7, fontsize=9, frameon=False)
    with replaced_on_success(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw_progress(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """Summed loss (solid) and bound (dashed) over time, relative to the best loss."""
    best = abs(float(comparison.best_loss.sum())) or 1.0
    seen = [float(comparison.best_loss.sum()) / best]
    for name, solution in comparison.solutions.items():
        loss, bound = float(comparison.loss(name).sum()), float(comparison.bound(name).sum())
        points = [*solution.trace, TracePoint(solution.stats["time"], loss, bound)]
        losses = [(max(point.time, _INSTANT), point.objective / best) for point in points]
        bounds = [
            (max(point.time, _INSTANT), point.bound / best)
            for point in points
            if point.bound is not None and math.isfinite(point.bound)
        ]
        # a ring is wider than a dot, so that both are seen where bound and loss meet
        for values, line, fill, size in (
            (losses, "-", colours[name], 6),
            (bounds, "--", "none", 9),
        ):
            if values:
                ends = {"color": colours[name], "markerfacecolor": fill, "markersize": size}
                steps = zip(*values, strict=True)
                axes.step(*steps, where="post", linestyle=line, color=colours[name])
                axes.plot(*values[-1], "o", **ends)
                seen.append(max(values[-1][1], seen[0] - 1.5))  # bad bounds may leave the picture
    bound = float(comparison.best_bound.sum()) / best
    if math.isfinite(bound):
        axes.axhspan(bound, seen[0], color="0.5", alpha=0.15, linewidth=1, label="optimum within")
    margin = 0.1 * (max(seen) - min(seen)) or 0.01
    axes.set_ylim(min(seen) - margin, max(seen) + margin)
    longest = max(solution.stats["time"] for solution in comparison.solutions.values())
    axes.set_xscale("log")
    axes.set_xlim(0.7 * _INSTANT, max(1.5 * longest, 100 * _INSTANT))
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.set_xlabel("seconds")
    axes.set_ylabel("summed loss (solid), bound (dashed) / best loss", fontsize=9)


def _draw_profile(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """Share of rows that a solver brings within a factor of the best loss found there."""
    axes.set_xscale("symlog", linthresh=0.001)
    for name in comparison.solutions:
        excess = (comparison.ratio(name) - 1).clamp(max=10.0).sort().values.tolist()
        share = [(i + 1) / len(excess) for i in range(len(excess))]
        axes.step(
            [0.0, *excess, 10.0],
            [0.0, *share, 1.0],
            where="post",
            color=colours[name],
            label=name,
        )
    axes.set_xlim(-0.0001, 2.0)
    axes.set_xticks(list(_EXCESS_TICKS), list(_EXCESS_TICKS.values()))
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("loss above the best loss of the row")
    axes.set_ylabel("share of rows within", fontsize=9)


def _draw_losses(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """Losses as bars, where there is nothing to draw a distribution of."""
    for name in comparison.solutions:
        bars = axes.barh(name, float(comparison.ratio(name)), 0.6, color=colours[name], label=name)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("loss / best loss")
