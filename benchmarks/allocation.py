"""Sparsity across layers at equal total: uniform, OWL, integer program.

Each allocation prunes the embedded GPT in two ways, on several calibration seeds: Wanda's masks
improved by swaps with weights as they are, and ALPS with least squares. For each run: share
removed, summed layer loss, perplexity, KL divergence to the dense model, and the processor's
seconds that the allocation took.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --methods "integer program, loss" --resume
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from common import draw, write
from matplotlib.figure import Figure
from yardstick import (
    WINDOW,
    Yardstick,
    draw_points,
    load,
    model_parser,
    resumed,
    summary,
    windows_for,
)

import mipprune
from mipprune import Allocation, LayerStep
from mipprune.calibration import Windows
from mipprune.placement import Placement
from mipprune.rules import Rules
from mipprune.settings import Settings
from mipprune.share_out import shared_out
from solvers import PerRow

BATCH = 8

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation("uniform"),
    "OWL": Allocation("owl"),
    "integer program": Allocation(),
    "integer program, one anchor": Allocation(low=0.3, high=0.9, anchors=(0.6,)),
    "integer program, measured by swaps": Allocation(measure="swap"),
    "integer program, relative": Allocation(criterion="relative"),
    "integer program, loss": Allocation(criterion="loss"),
}

FIRST = ("uniform", "OWL", "integer program", "integer program, measured by swaps")
"""What runs unless other methods are named."""

RUNS: dict[str, dict[str, Any]] = {
    "swap": {"solver": "swap", "start": "wanda"},
    "alps + least squares": {
        "solver": "alps",
        "layer_step": LayerStep(update="least_squares"),
    },
}


def allocated(
    allocation: Allocation, sparsity: float, windows: Windows, run: dict[str, Any]
) -> tuple[Rules, float]:
    """The layers' rules, and the seconds of processor time that they took."""
    settings = Settings(
        Rules(PerRow(sparsity=sparsity)), batch_size=BATCH, allocation=allocation, **run
    )
    model = load()
    began = time.process_time()
    return shared_out(settings, Placement(model), windows), time.process_time() - began


def measured(
    rules: Rules, windows: Windows, run: dict[str, Any], yard: Yardstick
) -> dict[str, float]:
    """The model pruned by rules."""
    model = load()
    size = {"samples": len(windows.tokens), "seqlen": WINDOW, "batch_size": BATCH}
    report = mipprune.prune(model, None, windows, rules, **run, **size)
    return {
        "sparsity": report.sparsity,
        "loss": report.loss,
        "updated_loss": report.updated_loss,
        **yard.measure(model),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| run | allocation | removed | perplexity | KL | CPU seconds to allocate |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run, methods in record["runs"].items():
        for name, entry in methods.items():
            mean = entry["summary"]
            error = mean.get("perplexity_error", math.nan)
            lines.append(
                f"| {run} | {name} | {mean['sparsity']:.3%} "
                f"| {mean['perplexity']:.2f} ± {error:.2f} "
                f"| {mean['kl']:.4f} ± {mean.get('kl_error', math.nan):.4f} "
                f"| {mean['allocation_seconds']:.0f} |"
            )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity and KL of every allocation, with one standard error over the seeds."""
    figure = Figure(figsize=(9, 2.6 * len(record["runs"])), layout="constrained")
    panels = figure.subplots(len(record["runs"]), 2, squeeze=False, sharey="row")
    for row, (run, methods) in zip(panels, record["runs"].items(), strict=True):
        for axes, key, dense, label in (
            (row[0], "perplexity", record["dense_perplexity"], "perplexity (dotted: dense)"),
            (row[1], "kl", None, "KL to dense"),
        ):
            draw_points(axes, methods, key, list(methods), dense)
            axes.set_xlabel(label)
            axes.set_title(run)
    draw(figure, path)


def main() -> None:
    options = model_parser(__doc__, samples=24, evaluate=32)
    options.add_argument("--sparsity", type=float, default=0.6)
    options.add_argument("--runs", help="semicolon-separated; both by default")
    arguments = options.parse_args()
    windows = windows_for()
    evaluation = windows("evaluation", arguments.evaluate, 0)
    yard = Yardstick(evaluation, Windows(evaluation.tokens[:8], evaluation.source))
    settings = {
        "model": "embedded",
        "dense_perplexity": yard.perplexity,
        "sparsity": arguments.sparsity,
        "samples": arguments.samples,
        "evaluation_windows": len(evaluation.tokens),
    }
    record = resumed(arguments.out / "allocation.json", settings, "runs", arguments.resume)
    methods = arguments.methods.split(";") if arguments.methods else list(FIRST)
    chosen = arguments.runs.split(";") if arguments.runs else list(RUNS)
    for seed in range(arguments.seeds):
        calibration = windows("calibration", arguments.samples, seed)
        for name in methods:
            allocation, rules, seconds = ALLOCATIONS[name], None, 0.0
            for run in chosen:
                found = record["runs"].setdefault(run, {})
                runs = found.get(name, {"runs": []})["runs"]
                # measured by swaps, as this run prunes anyway
                same = run == "swap" and allocation.measure == "swap"
                if same or len(runs) > seed:
                    continue
                if rules is None or allocation.measure == "run":
                    rules, seconds = allocated(
                        allocation, arguments.sparsity, calibration, RUNS[run]
                    )
                one = measured(rules, calibration, RUNS[run], yard)
                runs.append({**one, "allocation_seconds": seconds})
                print(f"{run}, {name}, seed {seed}: {json.dumps(runs[-1])}", flush=True)
                found[name] = {"summary": summary(runs), "runs": runs}
                record["runs"][run] = {key: found[key] for key in ALLOCATIONS if key in found}
                write(arguments.out, "allocation", record)
    print(table(record))
    plot(record, arguments.out / "allocation.png")


if __name__ == "__main__":
    main()
