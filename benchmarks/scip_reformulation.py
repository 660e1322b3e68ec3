"""SCIP alone against SCIP behind the quadratic convex reformulation, on the same rows.

Rows of real layers restricted to d inputs, 60 % per row and 2:4, and corners of layers that share
one budget of 60 %; all to 1e-4 under one time limit, one after the other.

    python benchmarks/scip_reformulation.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import NM, MaskProblem, Pattern, PerLayer, PerRow, solve

LAYERS = ("minilm_block1_query", "minilm_block1_attention_output", "minilm_block1_mlp_up")
INPUTS = (48, 64, 96)
CORNERS = ((4, 12), (4, 16))


def restricted(path: Path, rows: slice, inputs: int, pattern: Pattern) -> MaskProblem:
    """Some rows of a layer, its first inputs."""
    problem = MaskProblem.load(path, PerRow(sparsity=0.6))
    return MaskProblem(problem.weight[rows, :inputs], problem.gram[:inputs, :inputs], pattern)


def run(problem: MaskProblem, reformulation: bool, time_limit: float) -> dict[str, Any]:
    """One program; gap and status as the solver gives them."""
    began, computed = time.perf_counter(), time.process_time()
    solution = solve(problem, "scip", reformulation=reformulation, time_limit=time_limit)
    assert solution.bound is not None
    assert solution.evidence is not None
    loss, bound = float(solution.objective.sum()), float(solution.bound.sum())
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - computed,
        "objective": loss,
        "gap": (loss - bound) / loss,
        "evidence": solution.evidence.label,
        "status": solution.status.name,
        "nodes": solution.stats["nodes"],
    }


def plot(runs: list[dict[str, Any]], limit: float, path: Path) -> None:
    """CPU seconds alone against seconds reformulated; crosses where one was not proven."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for colour, pattern in enumerate(dict.fromkeys(run["pattern"] for run in runs)):
        some = [run for run in runs if run["pattern"] == pattern]
        for proven in (True, False):
            chosen = [r for r in some if (r["alone"]["status"] == "OPTIMAL") == proven]
            axes.scatter(
                [r["alone"]["cpu_seconds"] for r in chosen],
                [r["reformulated"]["cpu_seconds"] for r in chosen],
                marker="o" if proven else "x",
                color=f"C{colour}",
                label=f"{pattern}{'' if proven else ', not proven alone'}" if chosen else None,
            )
    axes.plot([0.1, limit], [0.1, limit], color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("SCIP alone, CPU seconds")
    axes.set_ylabel("after reformulation, CPU seconds")
    axes.legend(fontsize=8)
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--row", type=int, default=1, help="row of every layer")
    options.add_argument("--limit", type=float, default=30.0, help="seconds per run")
    arguments = options.parse_args()
    row, runs = arguments.row, []
    cases: list[tuple[int, slice, Pattern]] = [
        (inputs, slice(row, row + 1), pattern)
        for inputs in INPUTS
        for pattern in (PerRow(sparsity=0.6), NM(2, 4))
    ]
    cases += [(inputs, slice(0, rows), PerLayer(sparsity=0.6)) for rows, inputs in CORNERS]
    first = restricted(arguments.layers / f"{LAYERS[0]}.safetensors", slice(0, 1), 32, NM(2, 4))
    run(first, True, 10.0)  # imports and compilation
    for inputs, rows, pattern in cases:
        for layer in LAYERS:
            problem = restricted(arguments.layers / f"{layer}.safetensors", rows, inputs, pattern)
            entry: dict[str, Any] = {
                "layer": layer,
                "rows": problem.shape[0],
                "inputs": inputs,
                "pattern": str(pattern),
                "alone": run(problem, False, arguments.limit),
                "reformulated": run(problem, True, arguments.limit),
            }
            runs.append(entry)
            print(
                f"{layer} {problem.shape[0]}x{inputs} {pattern}: "
                + "; ".join(
                    f"{how} {entry[how]['cpu_seconds']:.1f} s CPU, gap {entry[how]['gap']:.1e}, "
                    f"{entry[how]['nodes']} nodes"
                    for how in ("alone", "reformulated")
                ),
                flush=True,
            )
    summary = {}
    for inputs, rows, pattern in cases:
        some = [r for r in runs if (r["inputs"], r["pattern"]) == (inputs, str(pattern))]
        name = f"{rows.stop - rows.start} x {inputs}, {pattern}"
        summary[name] = {
            how: {
                "seconds": sum(r[how]["seconds"] for r in some) / len(some),
                "cpu_seconds": sum(r[how]["cpu_seconds"] for r in some) / len(some),
                "worst_gap": max(r[how]["gap"] for r in some),
                "nodes": sum(r[how]["nodes"] for r in some) / len(some),
                "proven": sum(r[how]["status"] == "OPTIMAL" for r in some),
            }
            for how in ("alone", "reformulated")
        }
    print(summary)
    write(
        arguments.out,
        "scip_reformulation",
        {"rel_gap": 1e-4, "time_limit": arguments.limit, "summary": summary, "runs": runs},
    )
    plot(runs, arguments.limit, arguments.out / "scip_reformulation.png")


if __name__ == "__main__":
    main()
