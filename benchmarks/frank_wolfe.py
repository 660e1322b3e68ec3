"""Measure Frank-Wolfe's step rules: exactness, iterations, and the masks after rounding.

Three questions, on layers at 60 % per row:

- does the relaxed loss agree with the optimum of the quadratic program (CVXPY, Clarabel)?
- how many iterations does each step rule need to a relative gap of 1e-3?
- how much lower than Wanda's is the loss after rounding, for several shares of fixed weights?

    python benchmarks/frank_wolfe.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cvxpy
import torch
from common import draw, parser, write
from matplotlib.figure import Figure

from solvers import MaskProblem, PerRow, solve

LAYERS = {
    "minilm_block1_query": None,
    "minilm_block1_attention_output": None,
    "minilm_block1_mlp_up": 256,
}
"""Rows used of each layer; None for all."""

GAP = 1e-3
CAPS = {"open_loop": 10000, "line_search": 3000, "pairwise": 3000, "sliding": 3000}
FIXED = (0.0, 0.25, 0.5, 0.9)
OPEN_LOOP_ITERATIONS = 2000


def quadratic_program(problem: MaskProblem) -> float:
    """Optimal relaxed loss of one row."""
    weight = problem.weight.double()
    unit = float(problem.output_energy()) / problem.shape[1]
    values, vectors = torch.linalg.eigh(problem.gram.double())
    factor = (vectors * values.clamp_min(0).sqrt()).T * weight
    pruned = cvxpy.Variable(problem.shape[1])
    kept = problem.pattern.kept_per_cell(problem.shape)
    loss = cvxpy.sum_squares((factor / unit**0.5).numpy() @ pruned)
    limits = [pruned >= 0, pruned <= 1, cvxpy.sum(pruned) == problem.shape[1] - kept]
    program = cvxpy.Problem(cvxpy.Minimize(loss), limits)
    program.solve(solver="CLARABEL")
    return float(program.value) * unit


def exactness(problem: MaskProblem, rows: int) -> list[dict[str, float]]:
    """Relaxed loss of some rows against the quadratic program's optimum."""
    found = []
    for r in torch.linspace(0, problem.shape[0] - 1, rows).long().tolist():
        row = problem.rows([r])
        optimum = quadratic_program(row)
        solution = solve(row, "frank_wolfe")
        relaxed = solution.stats["relaxed"][0]
        found.append(
            {
                "row": r,
                "optimum": optimum,
                "relaxed": relaxed,
                "bound": float(solution.bound),
                "excess": relaxed / optimum - 1,
            }
        )
    return found


def iterations(problem: MaskProblem) -> dict[str, Any]:
    """What each step rule needs until every row's relative gap is `GAP`, or its cap."""
    record = {}
    for step, cap in CAPS.items():
        began = time.perf_counter()
        stats = solve(problem, "frank_wolfe", step=step, iterations=cap, tolerance=GAP).stats
        record[step] = {
            "cap": cap,
            "mean_iterations": stats["mean_iterations"],
            "most_iterations": stats["iterations"],
            "rows_converged": stats["converged"],
            "rows": problem.shape[0],
            "gap": sum(stats["fw_gap"]) / sum(stats["relaxed"]),
            "seconds": time.perf_counter() - began,
            "history": stats["history"],
        }
        print(
            f"  {step}: {stats['mean_iterations']:.0f} iterations on average, "
            f"{stats['converged']} of {problem.shape[0]} rows reach {GAP:g} within {cap}, "
            f"gap of all {record[step]['gap']:.2g}"
        )
    least = record["open_loop"]["mean_iterations"]
    for step in ("line_search", "pairwise", "sliding"):
        record[step]["share_of_open_loop"] = record[step]["mean_iterations"] / least
    return record


def rounded(problem: MaskProblem, few: int) -> list[dict[str, Any]]:
    """Loss after rounding against Wanda's, for each share of fixed weights."""
    wanda = solve(problem, "wanda").objective
    part = problem.rows(range(few))
    table = []
    for fixed in FIXED:
        best = solve(problem, "frank_wolfe", fixed=fixed)
        open_loop = solve(
            part,
            "frank_wolfe",
            step="open_loop",
            iterations=OPEN_LOOP_ITERATIONS,
            tolerance=0.0,
            fixed=fixed,
        )
        line = {
            "fixed": fixed,
            "rows": problem.shape[0],
            "sliding": float(best.objective.sum() / wanda.sum()),
            "sliding_seconds": best.stats["time"],
            "rows_of_open_loop": few,
            "open_loop": float(open_loop.objective.sum() / wanda[:few].sum()),
            "open_loop_seconds": open_loop.stats["time"],
            "sliding_on_the_same_rows": float(best.objective[:few].sum() / wanda[:few].sum()),
            "rounding_residual": best.stats["rounding_residual"],
        }
        print(
            f"  fixed {fixed}: loss / wanda {line['sliding']:.4f} ({problem.shape[0]} rows); "
            f"first {few} rows: {line['sliding_on_the_same_rows']:.4f}, "
            f"open loop {line['open_loop']:.4f}"
        )
        table.append(line)
    return table


def plot(record: dict[str, Any], path: Path) -> None:
    """Gap over iterations of each step rule, one panel a layer."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(record), sharey=True)
    for axes, (layer, results) in zip(panels, record.items(), strict=True):
        for step in CAPS:
            history = results["iterations"][step]["history"][1:]
            axes.loglog(*zip(*history, strict=True), label=step)
        axes.axhline(GAP, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(layer.removeprefix("minilm_block1_"))
        axes.set_xlabel("iteration")
    panels[0].set_ylabel("Frank-Wolfe gap / relaxed loss")
    panels[0].legend()
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--exact-rows", type=int, default=4)
    options.add_argument("--gap-rows", type=int, default=16, help="rows for counting iterations")
    options.add_argument("--open-loop-rows", type=int, default=32, help="rows rounded after it")
    arguments = options.parse_args()
    began = time.perf_counter()
    record: dict[str, Any] = {}
    for layer, rows in LAYERS.items():
        problem = MaskProblem.load(arguments.layers / f"{layer}.safetensors", PerRow(sparsity=0.6))
        problem = problem if rows is None else problem.rows(range(rows))
        print(f"{layer}, {problem}")
        exact = exactness(problem, arguments.exact_rows)
        excess = ", ".join(f"{row['excess']:.1e}" for row in exact)
        print(f"  relaxed loss above the optimum by {excess}")
        record[layer] = {
            "exactness": exact,
            "largest_excess": max(abs(row["excess"]) for row in exact),
            "iterations": iterations(problem.rows(range(arguments.gap_rows))),
            "rounded": rounded(problem, arguments.open_loop_rows),
        }
    seconds = time.perf_counter() - began
    write(
        arguments.out,
        "frank_wolfe",
        {"sparsity": 0.6, "gap": GAP, "seconds": seconds, "layers": record},
    )
    plot(record, arguments.out / "frank_wolfe.png")


if __name__ == "__main__":
    main()
