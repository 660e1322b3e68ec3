"""Bound rows of real layers at full width, without a tree.

The semidefinite bound with cuts on rows of the layers in ``best_known.json`` (60 % per row),
against the best masks known and the plain relaxation recorded there; and on narrower and wider
problems against the best mask found here.

    python benchmarks/root_bound.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import MaskProblem, PerRow, solve


def bound_row(problem: MaskProblem, seconds: float, best: float | None) -> dict[str, Any]:
    """Bound of one row, and its gap to the best loss known or found."""
    began = time.perf_counter()
    solution = solve(problem, "semidefinite", row_seconds=seconds)
    assert solution.bound is not None
    assert solution.evidence is not None
    loss = float(solution.objective) if best is None else min(best, float(solution.objective))
    return {
        "seconds": time.perf_counter() - began,
        "loss": float(solution.objective),
        "best": loss,
        "bound": float(solution.bound),
        "evidence": solution.evidence.label,
        "gap": (loss - float(solution.bound)) / loss,
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean gap by seconds for every d; the plain relaxation where it is recorded."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, inputs in enumerate(sorted({run["inputs"] for run in runs})):
        some = [run for run in runs if run["inputs"] == inputs]
        axes.scatter(
            [run["seconds"] for run in some], [100 * run["gap"] for run in some],
            color=f"C{colour}", label=f"d = {inputs}",
        )  # fmt: skip
        plain = [100 * run["plain_gap"] for run in some if "plain_gap" in run]
        if plain:
            axes.axhline(
                sum(plain) / len(plain), color=f"C{colour}", linestyle=":",
                label=f"d = {inputs}, plain relaxation",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("seconds per row")
    axes.set_ylabel("gap to the best mask known, %")
    axes.set_ylim(0, None)
    axes.legend()
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=2, help="rows per layer")
    options.add_argument(
        "--seconds", type=float, nargs="+", default=[4.0, 30.0], help="per row of 384 inputs"
    )
    options.add_argument(
        "--wide-seconds", type=float, nargs="+", default=[20.0, 60.0], help="per row of mlp_down"
    )
    arguments = options.parse_args()
    known = json.loads((arguments.layers / "best_known.json").read_text())
    pattern = PerRow(sparsity=0.6)
    runs: list[dict[str, Any]] = []

    def add(layer: str, row: int, one: MaskProblem, limit: float, best: float | None) -> None:
        found = bound_row(one, limit, best)
        run = {"layer": layer, "row": row, "inputs": one.shape[1], "limit": limit, **found}
        if best is not None:
            entry = known[layer]
            plain = entry["relax_lb"][entry["rows"].index(row)]
            run["plain_gap"] = (run["best"] - plain) / run["best"]
        runs.append(run)
        print(
            f"d={run['inputs']} {layer} row {row}: gap {run['gap']:.2%} in {run['seconds']:.0f} s",
            flush=True,
        )

    warm = MaskProblem.load(arguments.layers / f"{next(iter(known))}.safetensors", pattern)
    bound_row(warm.rows([0]), 1.0, None)  # imports and compilation
    for layer, entry in known.items():
        problem = MaskProblem.load(arguments.layers / f"{layer}.safetensors", pattern)
        narrow = MaskProblem(problem.weight[:, :128], problem.gram[:128, :128], pattern)
        for at, row in enumerate(entry["rows"][: arguments.rows]):
            add(layer, row, narrow.rows([row]), 13.0, None)
            for seconds in arguments.seconds:
                add(layer, row, problem.rows([row]), seconds, entry["best"][at])
    wide = MaskProblem.load(arguments.layers / "minilm_block1_mlp_down.safetensors", pattern)
    for seconds in arguments.wide_seconds:
        add("minilm_block1_mlp_down", 0, wide.rows([0]), seconds, None)
    summary = {}
    for inputs, limit in sorted({(run["inputs"], run["limit"]) for run in runs}):
        some = [run for run in runs if (run["inputs"], run["limit"]) == (inputs, limit)]
        summary[f"{inputs}, {limit:g} s"] = {
            "mean_gap": sum(run["gap"] for run in some) / len(some),
            "worst_seconds": max(run["seconds"] for run in some),
        }
    print(summary)
    write(arguments.out, "root_bound", {"sparsity": 0.6, "summary": summary, "runs": runs})
    plot(runs, arguments.out / "root_bound.png")


if __name__ == "__main__":
    main()
