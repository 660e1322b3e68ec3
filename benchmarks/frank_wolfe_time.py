"""Measure Frank-Wolfe's time to a relative gap of 1e-3 over d, for each dtype of its products.

All rows at 60 % until each row's gap, evaluated in float64, is small enough; so a dtype that is
too coarse would show as more iterations or as rows that never stop, not as a wrong answer. On
the CPU "tfloat32" costs more than float32 (its rounding is done in software) and only shows
what it does to the answer. Where a CUDA GPU is at hand the tier of the GPU runs; else that of
the CPU, which is said.

    python benchmarks/frank_wolfe_time.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import draw, parse_tier, parser, write
from matplotlib.figure import Figure
from swap_throughput import make_problem, timed

from solvers import MaskProblem, PerRow, solve

GAP = 1e-3
SPARSITY = 0.6
DTYPES = ("float64", "float32", "tfloat32", "bfloat16")
TIERS = {
    "cpu": {384: 64, 768: 32, 1536: 8},
    "cuda": {384: 4096, 1024: 4096, 2048: 4096, 4096: 4096, 8192: 1024, 14336: 512},
}
"""Rows measured for each d, on random inputs."""

LAYERS = {"minilm_block1_query": 64, "minilm_block1_mlp_up": 64, "minilm_block1_mlp_down": 16}
"""Rows used of each layer."""


def measure(problem: MaskProblem) -> dict[str, dict[str, Any]]:
    """Time, iterations and answer of each dtype."""
    found = {}
    solve(problem.rows([0]), "frank_wolfe", iterations=2)
    for dtype in DTYPES:
        seconds, solution = timed(
            lambda dtype=dtype: solve(problem, "frank_wolfe", tolerance=GAP, dtype=dtype),
            problem.device,
        )
        stats = solution.stats
        found[dtype] = {
            "seconds": seconds,
            "mean_iterations": stats["mean_iterations"],
            "most_iterations": stats["iterations"],
            "rows_converged": stats["converged"],
            "gap": sum(stats["fw_gap"]) / sum(stats["relaxed"]),
            "bound": float(solution.bound.sum()),
            "loss": float(solution.objective.sum()),
        }
        print(
            f"  {dtype}: {seconds:.3g} s, {stats['mean_iterations']:.0f} iterations on average, "
            f"{stats['converged']} of {problem.shape[0]} rows, "
            f"rounded loss {found[dtype]['loss']:.6g}"
        )
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """Seconds a row over d, and iterations on each layer."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, dtype in enumerate(DTYPES):
        sizes = [(x["d"], x[dtype]["seconds"] / x["rows"]) for x in record["random"]]
        left.plot(*zip(*sizes, strict=True), marker="o", label=dtype)
        iterations = [x[dtype]["mean_iterations"] for x in record["layers"].values()]
        right.bar([i + 0.2 * k for i in range(len(iterations))], iterations, 0.2)
    left.set(xscale="log", yscale="log", xlabel="inputs", ylabel=f"seconds a row to {GAP:g}")
    left.legend()
    right.set_xticks(
        [i + 0.3 for i in range(len(record["layers"]))],
        [name.removeprefix("minilm_block1_") for name in record["layers"]],
    )
    right.set_ylabel("mean iterations")
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    arguments, tier = parse_tier(options)
    device = torch.device(tier)
    record: dict[str, Any] = {
        "tier": tier,
        "device": torch.cuda.get_device_name() if tier == "cuda" else "cpu",
        "sparsity": SPARSITY,
        "gap": GAP,
        "random": [],
        "layers": {},
    }
    for d, rows in TIERS[tier].items():
        print(f"random inputs, {rows} rows of {d}")
        found = measure(make_problem(d, rows, device))
        record["random"].append({"d": d, "rows": rows, **found})
    for name, rows in LAYERS.items():
        file = MaskProblem.load(arguments.layers / f"{name}.safetensors", PerRow(sparsity=SPARSITY))
        print(f"{name}, {rows} rows of {file.shape[1]}")
        layer = file.rows(range(rows))
        layer = MaskProblem(layer.weight.to(device), layer.gram.to(device), layer.pattern)
        record["layers"][name] = {"rows": rows, **measure(layer)}
    write(arguments.out, f"frank_wolfe_time_{tier}", record)
    plot(record, arguments.out / f"frank_wolfe_time_{tier}.png")


if __name__ == "__main__":
    main()
