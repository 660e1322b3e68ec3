"""Results for people: tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from solvers.files import replaced_on_success

if TYPE_CHECKING:
    from .demo import DemoRow
    from .prune import LayerResult, PruneReport


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
    for column in ("sparsity", "loss", "/ start", "/ wanda", "/ output", "s"):
        table.add_column(column, justify="right")
    for kind, layers in kinds.items():
        table.add_row(kind, *_sums(layers))
    table.add_section()
    table.add_row("all", *_sums(report.layers))
    return table


def _sums(layers: Sequence[LayerResult]) -> list[str]:
    loss = sum(layer.loss for layer in layers)
    starts = [layer.loss_start for layer in layers if layer.loss_start is not None]
    sizes = [layer.rows * layer.inputs for layer in layers]
    removed = sum(layer.sparsity * size for layer, size in zip(layers, sizes, strict=True))
    errors = [layer.relative_error for layer in layers]
    return [
        f"{removed / sum(sizes):.1%}",
        f"{loss:.4g}",
        _ratio(loss, sum(starts)) if len(starts) == len(layers) else "–",
        _ratio(loss, sum(layer.loss_reference for layer in layers)),
        f"{sum(errors) / len(errors):.2%}",
        f"{sum(layer.seconds for layer in layers):.1f}",
    ]


def _ratio(loss: float, reference: float) -> str:
    return f"{loss / reference:.3f}" if reference > 0 else "–"


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """One line per method and pattern, the dense model first."""
    table = Table(title="The embedded GPT, pruned", box=SIMPLE_HEAD)
    table.add_column("pattern")
    table.add_column("masks")
    for column in ("layer loss / wanda", "perplexity", "seconds"):
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
