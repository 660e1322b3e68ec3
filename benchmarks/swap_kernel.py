"""Measure how much faster the fused CPU swap kernel is than the dense difference tensor.

Both run Wanda + swaps to convergence on all rows of one layer, on the same cores, in this one
process. The dense version is what SparseSwaps (arXiv 2512.10922) describes: per pass the
[rows, kept x pruned] differences as a tensor, in chunks of rows, its arg-min the best swap of
each row, one swap per row and pass.

    python benchmarks/swap_kernel.py
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from common import parser, write
from matplotlib.figure import Figure
from torch import Tensor

from solvers import MaskProblem, PerRow, solve
from solvers.files import replaced_on_success

CHUNK_BYTES = 1 << 26


def dense_swaps(problem: MaskProblem, mask: Tensor) -> tuple[Tensor, list[list[float]], int]:
    """Best swap of every row, again and again, by the difference tensor; float32.

    Returns the mask, (seconds, summed loss) after each pass, and the number of swaps.
    """
    began = time.perf_counter()
    weight, gram = problem.weight.float(), problem.gram.float()
    mask = mask.clone()
    rows, d = weight.shape
    diagonal = gram.diagonal()
    active, swaps = torch.arange(rows), 0
    total = float(problem.objective(mask).sum())
    trace = [[time.perf_counter() - began, total]]
    while len(active):
        better = []
        for index in active.split(max(1, CHUNK_BYTES // (4 * d * d))):
            w, keep = weight[index], mask[index]
            c = w.masked_fill(keep, 0.0) @ gram
            loss = (w * c).masked_fill(keep, 0.0).sum(dim=1)
            prune = (2 * w * c + w**2 * diagonal).where(keep, torch.inf)
            revive = (-2 * w * c + w**2 * diagonal).where(~keep, torch.inf)
            difference = (-2 * w[:, :, None] * w[:, None, :]).mul_(gram)
            difference += prune[:, :, None]
            difference += revive[:, None, :]
            least, at = difference.flatten(1).min(dim=1)
            good = least < -1e-6 * loss
            chosen = index[good]
            mask[chosen, at[good] // d] = False
            mask[chosen, at[good] % d] = True
            better.append(chosen)
            total += float(least[good].sum())
        active = torch.cat(better)
        swaps += len(active)
        trace.append([time.perf_counter() - began, total])
    return mask, trace, swaps


def plot(record: dict[str, Any], path: Path) -> None:
    """Loss over time of both."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in ("dense", "fused"):
        seconds, losses = zip(*record[name]["trace"], strict=True)
        shares = [loss / record["loss_wanda"] for loss in losses]
        axes.plot(seconds, shares, label=f"{name}: {record[name]['seconds']:.3g} s")
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_ylabel("summed loss / wanda")
    axes.set_title(f"Swaps to convergence, {record['layer']}, 60 % per row")
    axes.legend()
    with replaced_on_success(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Written: {path}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layer", default="minilm_block1_query")
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    problem = MaskProblem.load(
        arguments.layers / f"{arguments.layer}.safetensors", PerRow(sparsity=0.6)
    )
    start = solve(problem, "wanda")
    solve(problem.rows([0]), "swap")  # compile before the clock runs

    began = time.perf_counter()
    mask, dense_trace, swaps = dense_swaps(problem, start.mask)
    dense_seconds = time.perf_counter() - began
    dense_loss = float(problem.objective(mask).sum())

    runs = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        solution = solve(problem, "swap", start=start.mask)
        runs.append(time.perf_counter() - began)
    fused_seconds = sorted(runs)[len(runs) // 2]
    fused_loss = float(solution.objective.sum())
    record = {
        "layer": arguments.layer,
        "shape": list(problem.shape),
        "sparsity": 0.6,
        "loss_wanda": float(start.objective.sum()),
        "dense": {
            "seconds": dense_seconds,
            "loss": dense_loss,
            "swaps": swaps,
            "trace": dense_trace,
        },
        "fused": {
            "seconds": fused_seconds,
            "all_seconds": runs,
            "loss": fused_loss,
            "status": solution.status.name,
            "swaps": solution.stats["swaps"],
            "trace": [[point.time, point.objective] for point in solution.trace],
        },
        "speedup": dense_seconds / fused_seconds,
        "loss_ratio": fused_loss / dense_loss,
    }
    for name in ("dense", "fused"):
        print(f"{name}: {record[name]['seconds']:.3f} s, loss {record[name]['loss']:.6g}")
    print(f"speed-up {record['speedup']:.0f}, loss ratio {record['loss_ratio']:.4f}")
    write(arguments.out, f"swap_kernel_{arguments.layer}", record)
    plot(record, arguments.out / f"swap_kernel_{arguments.layer}.png")


if __name__ == "__main__":
    main()
