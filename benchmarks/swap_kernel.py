"""Measure how much faster the fused CPU swap kernel is than the dense difference tensor.

Both run Wanda + swaps to convergence on the rows of a layer, on the same cores, in this one
process. The dense version is what SparseSwaps (arXiv 2512.10922) describes: per pass the
[rows, kept x pruned] differences as a tensor, in chunks of rows, its arg-min the best swap of
each row, one swap per row and pass.

Also measured: the float32 peak (independent fused multiply-adds in registers, all cores), and the
share of it that a scan reaches when it evaluates every (kept, pruned) pair of every row, at 3
operations a pair. The search itself skips pairs that provably cannot improve; how many, and
the pairs it evaluates per second of its whole time, are recorded beside.

    python benchmarks/swap_kernel.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import draw, parser, write
from matplotlib.figure import Figure
from numba import njit
from torch import Tensor

from solvers import MaskProblem, PerRow, solve
from solvers.swap.passes import LANES, TILE, scan_tiles

CHUNK_BYTES = 1 << 26
LAYERS = {"minilm_block1_query": None, "minilm_block1_mlp_up": None, "minilm_block1_mlp_down": 32}
"""Layers, and how many rows the dense version gets (None: all)."""

OPERATIONS_PER_PAIR = 3
SCANNED_ROWS = 192
PAIRS_PER_TIMING = 1 << 30
"""Evaluated by each core, some 40 ms, so that starting threads does not count."""


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


@njit(nogil=True, fastmath={"contract", "nsz"})
def multiply_adds(times: int, factor: float, term: float, out: np.ndarray) -> None:
    """``out = out * factor + term``, ``times`` over: 256 chains, all in registers."""
    chains = np.zeros(256, np.float32)
    for _ in range(times):
        for k in range(256):
            chains[k] = chains[k] * factor + term
    out[:] = chains


def on_all_cores(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``work`` run by every core at once."""
    cores = torch.get_num_threads()
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            for future in [pool.submit(work) for _ in range(cores)]:
                future.result()
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2]


def peak_operations(repeats: int) -> float:
    """Float32 operations per second of all cores, two in a fused multiply-add."""
    times = 1 << 23

    def work() -> None:
        out = np.zeros(256, np.float32)
        multiply_adds(times, np.float32(0.999), np.float32(0.1), out)

    work()
    return torch.get_num_threads() * 2 * 256 * times / on_all_cores(work, repeats)


def scanned_pairs(problem: MaskProblem, mask: Tensor, repeats: int) -> float:
    """(kept, pruned) pairs per second when every pair of every row is evaluated, on all cores."""
    weight = problem.weight[:SCANNED_ROWS].float()
    keep = mask[:SCANNED_ROWS]
    rows, d = weight.shape
    tiles, short = -(-d // TILE), -d % LANES

    def vectors(matrix: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(matrix, (0, short))
        return padded.view(len(matrix), -1, LANES).transpose(0, 1).contiguous()

    gram, twice = vectors(problem.gram.float()), vectors(2 * weight)
    scalar = torch.zeros(tiles, rows, TILE, dtype=torch.int32)
    terms = torch.zeros(tiles, rows, 2 * TILE)
    count = torch.zeros(tiles, rows, dtype=torch.long)
    for t in range(tiles):
        for r in range(rows):
            s = t * TILE + keep[r, t * TILE : (t + 1) * TILE].nonzero().flatten()
            scalar[t, r, : len(s)], count[t, r] = s.int(), len(s)
            terms[t, r, 0 : 2 * len(s) : 2] = weight[r, s]
    gram_, twice_, scalar_, terms_, count_ = (
        part.numpy() for part in (gram, twice, scalar, terms, count)
    )
    active = np.arange(rows)

    pairs = int((keep.sum(dim=1) * (~keep).sum(dim=1)).sum())
    scans = -(-PAIRS_PER_TIMING // pairs)

    def work() -> None:
        best = np.full(twice_.shape, 1e30, np.float32)
        for _ in range(scans):
            scan_tiles(gram_, twice_, best, scalar_, terms_, count_, active)

    work()
    return torch.get_num_threads() * scans * pairs / on_all_cores(work, repeats)


def fused_swaps(problem: MaskProblem, start: Tensor, repeats: int) -> dict[str, Any]:
    """`solve`, timed from outside; the median run."""
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        solution = solve(problem, "swap", start=start)
        runs.append(time.perf_counter() - began)
    seconds = sorted(runs)[len(runs) // 2]
    kept = start.sum(dim=1)
    pairs_per_pass = float((kept * (problem.shape[1] - kept)).double().mean())
    pairs = solution.stats["pairs"]
    return {
        "rows": problem.shape[0],
        "seconds": seconds,
        "all_seconds": runs,
        "loss": float(solution.objective.sum()),
        "status": solution.status.name,
        "best_swap_left": solution.stats["best_swap_left"],
        "swaps": solution.stats["swaps"],
        "passes": solution.stats["passes"],
        "pairs_evaluated": pairs,
        "share_of_pairs_skipped": 1 - pairs / (pairs_per_pass * solution.stats["passes"]),
        "pairs_evaluated_per_second": pairs / seconds,
        "trace": [[point.time, point.objective] for point in solution.trace],
    }


def measure(name: str, folder: Path, dense_rows: int | None, repeats: int) -> dict[str, Any]:
    """One layer."""
    problem = MaskProblem.load(folder / f"{name}.safetensors", PerRow(sparsity=0.6))
    everything = solve(problem, "wanda").mask
    record: dict[str, Any] = {"layer": name, "shape": list(problem.shape), "sparsity": 0.6}
    record["scan_pairs_per_second"] = scanned_pairs(problem, everything, repeats)
    record["all_rows"] = fused_swaps(problem, everything, repeats)

    compared = problem if dense_rows is None else problem.rows(range(dense_rows))
    start = everything[: compared.shape[0]]
    record["loss_wanda"] = float(compared.objective(start).sum())
    began = time.perf_counter()
    mask, trace, swaps = dense_swaps(compared, start)
    record["dense"] = {
        "rows": compared.shape[0],
        "seconds": time.perf_counter() - began,
        "loss": float(compared.objective(mask).sum()),
        "swaps": swaps,
        "trace": trace,
    }
    record["fused"] = (
        record["all_rows"] if dense_rows is None else fused_swaps(compared, start, repeats)
    )
    record["speedup"] = record["dense"]["seconds"] / record["fused"]["seconds"]
    record["loss_ratio"] = record["fused"]["loss"] / record["dense"]["loss"]
    return record


def plot(layers: list[dict[str, Any]], path: Path) -> None:
    """Loss over time of both, a panel per layer."""
    figure = Figure(figsize=(3.6 * len(layers), 3.4), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, record in zip(panels, layers, strict=True):
        for name in ("dense", "fused"):
            seconds, losses = zip(*record[name]["trace"], strict=True)
            shares = [loss / record["loss_wanda"] for loss in losses]
            label = f"{name}: {record[name]['seconds']:.3g} s"
            axes.plot(seconds, shares, label=label, marker="." if name == "fused" else None)
        axes.set_xscale("log")
        axes.set_xlabel("seconds")
        layer = record["layer"].removeprefix("minilm_")
        axes.set_title(
            f"{layer}, {record['dense']['rows']} rows: {record['speedup']:.0f}×\n"
            f"scan at {record['scan_share_of_peak']:.0%} of the float32 peak",
            fontsize=9,
        )
        axes.legend(fontsize=8)
    panels[0].set_ylabel("summed loss / wanda")
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    arguments = options.parse_args()
    first = next(iter(LAYERS))
    problem = MaskProblem.load(arguments.layers / f"{first}.safetensors", PerRow(sparsity=0.6))
    solve(problem.rows([0]), "swap")  # compile before the clock runs
    peak = peak_operations(arguments.repeats)
    print(f"float32 peak: {peak / 1e9:.0f} G operations/s")
    layers = []
    for name, dense_rows in LAYERS.items():
        record = measure(name, arguments.layers, dense_rows, arguments.repeats)
        share = OPERATIONS_PER_PAIR * record["scan_pairs_per_second"] / peak
        record["scan_share_of_peak"] = share
        layers.append(record)
        print(
            f"{name}: dense {record['dense']['seconds']:.3f} s, fused "
            f"{record['fused']['seconds']:.4f} s ({record['speedup']:.0f}x, loss ratio "
            f"{record['loss_ratio']:.4f}); all {record['all_rows']['rows']} rows "
            f"{record['all_rows']['seconds']:.4f} s, "
            f"{record['all_rows']['share_of_pairs_skipped']:.0%} of pairs skipped; scan "
            f"{record['scan_pairs_per_second'] / 1e9:.1f} G pairs/s, {share:.0%} of the peak"
        )
    record = {
        "peak_operations_per_second": peak,
        "operations_per_pair": OPERATIONS_PER_PAIR,
        "layers": layers,
    }
    write(arguments.out, "swap_kernel", record)
    plot(layers, arguments.out / "swap_kernel.png")


if __name__ == "__main__":
    main()
