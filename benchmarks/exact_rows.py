"""Solve rows of real layers, restricted to d inputs, to proven optimality at 1e-4.

`branch_and_bound` (semidefinite reformulation in front) against `scip` on the same rows, one row
after the other, in this one run; 60 % per row.

    python benchmarks/exact_rows.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import MaskProblem, PerRow, solve

LIMITS = {64: 60.0, 96: 120.0, 128: 300.0}
TARGETS = {64: 5.0, 96: 30.0, 128: 300.0}


def restricted(path: Path, rows: int, inputs: int) -> MaskProblem:
    """The first rows and inputs of a layer."""
    problem = MaskProblem.load(path, PerRow(sparsity=0.6))
    return MaskProblem(
        problem.weight[:rows, :inputs], problem.gram[:inputs, :inputs], problem.pattern
    )


def solve_row(problem: MaskProblem, solver: str, time_limit: float) -> dict[str, Any]:
    """One row by one solver."""
    began = time.perf_counter()
    options = {"reformulation": False} if solver == "scip" else {}  # scip alone
    solution = solve(problem, solver, rel_gap=1e-4, time_limit=time_limit, **options)
    assert solution.gap is not None
    assert solution.evidence is not None
    nodes = solution.stats["nodes"]
    return {
        "seconds": time.perf_counter() - began,
        "objective": float(solution.objective),
        "gap": float(solution.gap),
        "evidence": solution.evidence.label,
        "status": solution.status.name,
        "nodes": nodes if isinstance(nodes, int) else int(sum(nodes)),
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Seconds of every row and solver, by d."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, solver in enumerate(sorted({run["solver"] for run in runs})):
        for proven in (True, False):
            some = [r for r in runs if r["solver"] == solver and (r["gap"] <= 1.001e-4) == proven]
            axes.scatter(
                [run["inputs"] + 3 * colour for run in some],
                [run["seconds"] for run in some],
                marker="o" if proven else "x",
                color=f"C{colour}",
                label=f"{solver}{'' if proven else ' (not proven)'}" if some else None,
            )
    axes.set_yscale("log")
    axes.set_xlabel("inputs d")
    axes.set_ylabel("seconds per row")
    axes.set_xticks(sorted(LIMITS))
    axes.legend(fontsize=8)
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=2, help="rows per layer")
    options.add_argument("--scip-up-to", type=int, default=128, help="largest d for scip")
    options.add_argument("--scip-limit", type=float, default=60.0)
    arguments = options.parse_args()
    layers = ("minilm_block1_query", "minilm_block1_attention_output", "minilm_block1_mlp_up")
    runs: list[dict[str, Any]] = []
    warm = restricted(arguments.layers / f"{layers[0]}.safetensors", 1, 16)
    for solver in ("branch_and_bound", "scip"):
        solve_row(warm, solver, 10.0)  # imports and compilation
    for inputs, limit in LIMITS.items():
        for layer in layers:
            problem = restricted(arguments.layers / f"{layer}.safetensors", arguments.rows, inputs)
            for row in range(arguments.rows):
                one = problem.rows([row])
                for solver in ("branch_and_bound", "scip"):
                    if solver == "scip" and inputs > arguments.scip_up_to:
                        continue
                    seconds = min(limit, arguments.scip_limit) if solver == "scip" else limit
                    run = {
                        "layer": layer, "row": row, "inputs": inputs, "solver": solver,
                        **solve_row(one, solver, seconds),
                    }  # fmt: skip
                    runs.append(run)
                    print(
                        f"d={inputs} {layer} row {row} {solver}: {run['seconds']:.1f} s, "
                        f"gap {run['gap']:.2e}, {run['nodes']} nodes",
                        flush=True,
                    )
    summary = {
        str(inputs): {
            "target_seconds": TARGETS[inputs],
            "worst_seconds": max(ours := [r["seconds"] for r in runs if _ours(r, inputs)]),
            "mean_seconds": sum(ours) / len(ours),
            "all_proven": all(r["gap"] <= 1.001e-4 for r in runs if _ours(r, inputs)),
        }
        for inputs in LIMITS
    }
    print(summary)
    write(
        arguments.out,
        "exact_rows",
        {"sparsity": 0.6, "rel_gap": 1e-4, "summary": summary, "runs": runs},
    )
    plot(runs, arguments.out / "exact_rows.png")


def _ours(run: dict[str, Any], inputs: int) -> bool:
    return bool(run["solver"] == "branch_and_bound" and run["inputs"] == inputs)


if __name__ == "__main__":
    main()
