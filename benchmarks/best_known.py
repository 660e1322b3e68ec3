"""Measure how close swaps from Wanda come to the best masks known.

For the rows in ``best_known.json`` (60 % per row): our loss against the recorded loss of plain
best-swap search from Wanda, and against the best mask ever found.

    python benchmarks/best_known.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import MaskProblem, PerRow, solve


def plot(record: dict[str, Any], path: Path) -> None:
    """Losses of all layers, relative to Wanda."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    bars = {
        "recorded swaps": [e["of_wanda"] / e["of_recorded_swaps"] for e in record.values()],
        "swap": [e["of_wanda"] for e in record.values()],
        "best known": [e["of_wanda"] / e["of_best_known"] for e in record.values()],
    }
    for i, (name, values) in enumerate(bars.items()):
        at = [layer + 0.27 * (i - 1) for layer in range(len(values))]
        axes.bar_label(axes.bar(at, values, 0.25, label=name), fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(record)), [name.removeprefix("minilm_") for name in record])
    axes.set_ylabel("summed loss / wanda")
    axes.set_ylim(0, 0.65)
    axes.legend(ncols=3, fontsize=8)
    draw(figure, path)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    known = json.loads((arguments.layers / "best_known.json").read_text())
    record = {}
    for name, entry in known.items():
        problem = MaskProblem.load(
            arguments.layers / f"{name}.safetensors", PerRow(sparsity=entry["sparsity"])
        ).rows(entry["rows"])
        solution = solve(problem, "swap", start="wanda")
        loss = float(solution.objective.sum())
        record[name] = {
            "rows": len(entry["rows"]),
            "loss": loss,
            "status": solution.status.name,
            "of_wanda": loss / sum(entry["wanda"]),
            "of_recorded_swaps": loss / sum(entry["swap_from_wanda"]),
            "of_best_known": loss / sum(entry["best"]),
        }
        print(
            f"{name}: {record[name]['of_wanda']:.4f} of wanda, "
            f"{record[name]['of_recorded_swaps']:.4f} of the recorded swaps, "
            f"{record[name]['of_best_known']:.4f} of the best known"
        )
    write(arguments.out, "best_known", {"layers": record})
    plot(record, arguments.out / "best_known.png")


if __name__ == "__main__":
    main()
