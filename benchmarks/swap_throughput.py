"""Measure how many swap pairs a second each kernel evaluates, and the time to the same loss.

Throughput, over d: Wanda + swaps to the 1-swap optimum at 60 % per row. A pair is one kept and
one pruned weight of a row; every pass covers all of them, whether evaluated or excluded by a
bound. A pair takes 3 float32 operations, which gives the share of the arithmetic peak: that of
a large float32 matrix product, two operations per product, measured here.

Time to the same loss: the dense version, which builds the [rows, kept x pruned] differences
that SparseSwaps (arXiv 2512.10922) describes, as it is and through `torch.compile`, against the
fused kernel, until it has the dense version's final loss.

The inputs are random with a few strong directions, as activations have. Where a CUDA GPU is at
hand the tier of the GPU runs (Triton); else that of the CPU, which is said.

    python benchmarks/swap_throughput.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import draw, parse_tier, parser, write
from matplotlib.figure import Figure
from torch import Tensor

from solvers import MaskProblem, PerRow, solve

SPARSITY = 0.6
OPERATIONS = 3
"""Float32 operations per pair: two products and one subtraction; the minimum is not counted."""

TIERS = {
    "cpu": {
        "shapes": {384: 256, 768: 128, 1536: 32, 4096: 4},
        "dense": (384, 64),
        "chunk_bytes": 1 << 26,
    },
    "cuda": {
        "shapes": {384: 4096, 1024: 4096, 2048: 4096, 4096: 4096, 8192: 1024, 16384: 256},
        "dense": (4096, 32),
        "chunk_bytes": 1 << 32,
    },
}
"""Rows measured for each d; (d, rows) for the dense version and the size of its chunks."""


def make_problem(d: int, rows: int, device: torch.device) -> MaskProblem:
    """Random weights; inputs with a spectrum that decays like 1 / sqrt(k), and unequal scales."""
    generator = torch.Generator().manual_seed(d)
    strength = torch.arange(1, 2 * d + 1) ** -0.25
    inputs = torch.randn(d, d, generator=generator) @ (
        torch.randn(d, 2 * d, generator=generator) * strength
    )
    inputs *= torch.randn(d, 1, generator=generator).mul(0.5).exp()
    gram = (inputs.to(device).double() @ inputs.to(device).double().T / inputs.shape[1]).float()
    weight = torch.randn(rows, d, generator=generator).to(device)
    return MaskProblem(weight, (gram + gram.T) / 2, PerRow(sparsity=SPARSITY))


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def peak_operations(device: torch.device) -> float:
    """Float32 operations a second in a large matrix product, without TF32: best of 5."""
    torch.set_float32_matmul_precision("highest")
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    timed(lambda: a @ b, device)
    return 2 * size**3 / min(timed(lambda: a @ b, device)[0] for _ in range(5))


def throughput(d: int, rows: int, device: torch.device, peak: float) -> dict[str, Any]:
    """Pairs a second to the 1-swap optimum, the whole solve included."""
    problem = make_problem(d, rows, device)
    start = solve(problem, "wanda").mask
    solve(problem.rows([0]), "swap")  # compiles
    seconds, solution = timed(lambda: solve(problem, "swap", start=start), device)
    kept = problem.pattern.kept_per_cell(problem.shape)
    pairs = solution.stats["passes"] * kept * (d - kept)
    record = {
        "d": d,
        "rows": rows,
        "kernel": solution.stats["kernel"],
        "seconds": seconds,
        "passes": solution.stats["passes"],
        "swaps": solution.stats["swaps"],
        "status": solution.status.name,
        "best_swap_left": solution.stats["best_swap_left"],
        "pairs_per_second": pairs / seconds,
        "share_of_peak": OPERATIONS * pairs / seconds / peak,
    }
    print(
        f"d {d}, {rows} rows, {record['kernel']}: {seconds:.3f} s, "
        f"{record['pairs_per_second'] / 1e9:.3g} G pairs/s, "
        f"{record['share_of_peak']:.1%} of the peak"
    )
    return record


def dense_pass(weight: Tensor, gram: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, best change and its pair of every row, by the difference tensor."""
    diagonal = gram.diagonal()
    c = weight.masked_fill(keep, 0.0) @ gram
    loss = (weight * c).masked_fill(keep, 0.0).sum(dim=1)
    prune = (2 * weight * c + weight**2 * diagonal).where(keep, torch.inf)
    revive = (-2 * weight * c + weight**2 * diagonal).where(~keep, torch.inf)
    difference = -2 * weight[:, :, None] * weight[:, None, :] * gram
    difference = difference + prune[:, :, None] + revive[:, None, :]
    least, at = difference.flatten(1).min(dim=1)
    return loss, least, at


def dense_swaps(
    problem: MaskProblem, mask: Tensor, chunk_bytes: int, one_pass: Callable[..., Any]
) -> tuple[Tensor, int]:
    """Best swap of every row, again and again; the mask and the passes of the slowest row."""
    weight, gram, d = problem.weight, problem.gram, problem.shape[1]
    mask = mask.clone()
    chunk = max(1, min(len(mask), chunk_bytes // (4 * d * d)))
    active = torch.arange(len(mask), device=mask.device)
    passes = 0
    while len(active):
        better = []
        for index in active.split(chunk):
            # Of one shape, so that nothing is compiled again as rows leave.
            padded = torch.cat([index, index[:1].expand(chunk - len(index))])
            loss, least, at = one_pass(weight[padded], gram, mask[padded])
            loss, least, at = loss[: len(index)], least[: len(index)], at[: len(index)]
            good = least < -1e-6 * loss
            chosen = index[good]
            mask[chosen, at[good] // d] = False
            mask[chosen, at[good] % d] = True
            better.append(chosen)
        active = torch.cat(better)
        passes += 1
    return mask, passes


def against_dense(d: int, rows: int, chunk_bytes: int, device: torch.device) -> dict[str, Any]:
    """Seconds until each version has the dense version's final loss."""
    problem = make_problem(d, rows, device)
    start = solve(problem, "wanda").mask
    record: dict[str, Any] = {"d": d, "rows": rows, "chunk_bytes": chunk_bytes}
    versions = {"dense": dense_pass, "compiled": torch.compile(dense_pass, dynamic=False)}
    for name, one_pass in versions.items():
        warm = solve(problem, "swap", start=start).mask  # one pass from here compiles all there is
        compiling, _ = timed(
            lambda one_pass=one_pass, warm=warm: dense_swaps(problem, warm, chunk_bytes, one_pass),
            device,
        )
        seconds, (mask, passes) = timed(
            lambda one_pass=one_pass: dense_swaps(problem, start, chunk_bytes, one_pass), device
        )
        loss = float(problem.objective(mask).sum())
        record[name] = {
            "seconds": seconds,
            "first_call_seconds": compiling,
            "passes": passes,
            "loss": loss,
        }
    seconds, solution = timed(lambda: solve(problem, "swap", start=start), device)
    record["fused"] = {
        "seconds": seconds,
        "loss": float(solution.objective.sum()),
        "kernel": solution.stats["kernel"],
    }
    for name in versions:
        record[name]["over_fused"] = record[name]["seconds"] / seconds
        print(
            f"{name}: {record[name]['seconds']:.3f} s, loss {record[name]['loss']:.6g}; "
            f"fused: {seconds:.3f} s, loss {record['fused']['loss']:.6g}; "
            f"{record[name]['over_fused']:.0f} times faster"
        )
    return record


def plot(record: dict[str, Any], path: Path) -> None:
    """Pairs a second over d, and the seconds of the three versions."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = record["throughput"]
    left.plot([x["d"] for x in lines], [x["pairs_per_second"] for x in lines], marker="o")
    left.axhline(
        record["peak_operations_per_second"] / OPERATIONS, color="grey", linestyle=":",
        label="arithmetic peak / 3",
    )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="inputs", ylabel="pairs / s")
    left.legend()
    names = ["dense", "compiled", "fused"]
    right.bar(names, [record["dense"][name]["seconds"] for name in names])
    right.set(yscale="log", ylabel="seconds to the 1-swap optimum")
    right.set_title(f"{record['dense']['rows']} rows of {record['dense']['d']} inputs")
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    arguments, tier = parse_tier(options)
    device = torch.device(tier)
    sizes = TIERS[tier]
    peak = peak_operations(device)
    print(f"arithmetic peak: {peak / 1e9:.4g} G float32 operations/s")
    record: dict[str, Any] = {
        "tier": tier,
        "device": torch.cuda.get_device_name() if tier == "cuda" else "cpu",
        "sparsity": SPARSITY,
        "operations_per_pair": OPERATIONS,
        "peak_operations_per_second": peak,
        "throughput": [throughput(d, rows, device, peak) for d, rows in sizes["shapes"].items()],
        "dense": against_dense(*sizes["dense"], sizes["chunk_bytes"], device),
    }
    write(arguments.out, f"swap_throughput_{tier}", record)
    plot(record, arguments.out / f"swap_throughput_{tier}.png")


if __name__ == "__main__":
    main()
