"""Measure how close searches come to the best masks known, and how fast.

For the rows in ``best_known.json`` (60 % per row): summed loss over that of the best masks ever
found (a long tabu search), against seconds per row, on one thread.

    python benchmarks/search_quality.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import MaskProblem, PerRow, solve

TABU = (500, 2000, 8000, 32000)
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("wanda", {}),
    "swap": ("swap", {}),
    "frank_wolfe": ("frank_wolfe", {}),
    "frank_wolfe, swap": ("chain", {"stages": ["frank_wolfe", "swap"]}),
    "best of both": ("best_of", {}),
    **{f"restarts {n}": ("restarts", {"restarts": n}) for n in (4, 12)},
    **{
        f"frank_wolfe, tabu {n}": (
            "chain",
            {"stages": ["frank_wolfe", ["tabu", {"iterations": n}]]},
        )
        for n in TABU
    },
    **{f"swap, tabu {n}": ("tabu", {"iterations": n}) for n in (2000, 16000)},
}


def point(entry: dict[str, Any]) -> tuple[float, float]:
    """Seconds per row, and per cent above the best known loss."""
    return entry["seconds_per_row"], 100 * (entry["mean_of_best_known"] - 1)


def plot(record: dict[str, Any], path: Path) -> None:
    """Excess over the best known loss against time, all searches."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for family in ("restarts", "frank_wolfe, tabu", "swap, tabu"):
        axes.plot(
            *zip(*(point(e) for n, e in record.items() if n.startswith(family)), strict=True), "o-",
            label=f"{family}, more and more",
        )  # fmt: skip
    for name in ("swap", "frank_wolfe", "frank_wolfe, swap", "best of both"):
        axes.plot(*point(record[name]), "s", label=name)
    axes.legend(fontsize=8)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds per row of 384 inputs, one thread")
    axes.set_ylabel("loss above the best known, %")
    draw(figure, path)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    known = json.loads((arguments.layers / "best_known.json").read_text())
    problems = {
        name: MaskProblem.load(
            arguments.layers / f"{name}.safetensors", PerRow(sparsity=entry["sparsity"])
        ).rows(entry["rows"])
        for name, entry in known.items()
    }
    record: dict[str, Any] = {}
    for name in ("chain", "swap"):  # compiles the kernels
        solve(next(iter(problems.values())).rows([0]), name, start="wanda")
    for name, (solver, options) in SEARCHES.items():
        ratios, seconds, rows, better = {}, 0.0, 0, 0
        for layer, problem in problems.items():
            best = torch.tensor(known[layer]["best"], dtype=torch.float64)
            began = time.perf_counter()
            objective = solve(problem, solver, **options).objective
            seconds += time.perf_counter() - began
            ratios[layer] = float(objective.sum() / best.sum())
            better += int((objective < best * (1 - 1e-6)).sum())
            rows += len(best)
        record[name] = {
            "of_best_known": ratios,
            "mean_of_best_known": statistics.fmean(ratios.values()),
            "rows_better_than_known": better,
            "rows": rows,
            "seconds_per_row": seconds / rows,
        }
        print(
            f"{name}: {record[name]['mean_of_best_known']:.4f} of the best known, "
            f"{seconds / rows:.3f} s per row, {better} rows better than known",
            flush=True,
        )
    write(arguments.out, "search_quality", {"searches": record})
    plot(record, arguments.out / "search_quality.png")


if __name__ == "__main__":
    main()
