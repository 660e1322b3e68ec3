"""Certify the pruned embedded GPT: every layer's gap, and every certificate checked from files.

Prunes at 60 % per row by Wanda and swaps, certifies a random sample of rows in every layer, and
checks the written folder.

    python benchmarks/certify_embedded.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, draw, write
from matplotlib.figure import Figure

import mipprune
from mipprune.certify import LayerCertificate, certify, check_folder
from solvers import PerRow


def plot(layers: list[LayerCertificate], path: Path) -> None:
    """Gap of every layer, by its type."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({layer.name.rpartition(".")[2] for layer in layers})
    for kind in kinds:
        gaps = [100 * layer.gap for layer in layers if layer.name.endswith(kind)]
        axes.scatter([kind] * len(gaps), gaps, color="C0", alpha=0.7)
    axes.set_ylabel("gap at most, %")
    axes.set_ylim(0, None)
    axes.tick_params(axis="x", rotation=30)
    draw(figure, path)


def main() -> None:
    import argparse

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--rows", type=int, default=1, help="rows per layer")
    options.add_argument("--row-seconds", type=float, default=4.0)
    options.add_argument("--samples", type=int, default=32)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pruned"
        loaded = mipprune.load_model("embedded", torch.device("cpu"))
        report = mipprune.prune(
            loaded.model, loaded.tokenizer, None, PerRow(sparsity=0.6), samples=arguments.samples
        )
        mipprune.save(folder, loaded.model, loaded.tokenizer, report, loaded.stored_dtype)
        began = time.perf_counter()
        layers = certify(
            folder,
            rows=arguments.rows,
            row_seconds=arguments.row_seconds,
            model=mipprune.load_model("embedded", torch.device("cpu")),
        )
        certify_seconds = time.perf_counter() - began
        began = time.perf_counter()
        checked = check_folder(folder)
        check_seconds = time.perf_counter() - began
    gaps = {layer.name: layer.gap for layer in layers}
    by_kind = {
        kind: float(np.mean([gap for name, gap in gaps.items() if name.endswith(kind)]))
        for kind in sorted({name.rpartition(".")[2] for name in gaps})
    }
    summary = {
        "layers": len(layers),
        "accepted": len(checked),
        "mean_gap": float(np.mean(list(gaps.values()))),
        "worst_gap": max(gaps.values()),
        "mean_gap_by_kind": by_kind,
        "certify_seconds": certify_seconds,
        "check_seconds": check_seconds,
    }
    print(summary)
    settings = {"rows": arguments.rows, "row_seconds": arguments.row_seconds}
    write(
        arguments.out,
        "certify_embedded",
        {**settings, "samples": arguments.samples, "summary": summary, "gaps": gaps},
    )
    plot(layers, arguments.out / "certify_embedded.png")


if __name__ == "__main__":
    main()
