"""Sparsity across layers at equal total: uniform, OWL, integer programs.

Each allocation prunes the embedded GPT with Wanda's masks improved by swaps, on several
calibration seeds. For each run: share removed, summed layer loss, perplexity, KL divergence to
the dense model, and the processor's seconds that the allocation took.

    python benchmarks/allocation.py
    python benchmarks/allocation.py --methods "integer program, loss" --resume
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from common import draw, parser, write
from matplotlib.figure import Figure
from study import WINDOW, Yardstick, load, summary

import mipprune
from mipprune.allocate import allocated_rules
from mipprune.calibration import Windows, cut_windows, read_texts

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"method": "uniform"},
    "OWL": {"method": "owl"},
    "integer program, divergence": {"criterion": "divergence"},
    "integer program, relative": {"criterion": "relative"},
    "integer program, loss": {"criterion": "loss"},
}


def run(
    method: dict[str, Any], sparsity: float, windows: Windows, yard: Yardstick
) -> dict[str, float]:
    """One allocation, one seed."""
    model = load()
    size = {"samples": len(windows.tokens), "seqlen": WINDOW, "batch_size": 8}
    began = time.process_time()
    rules = allocated_rules(model, None, windows, sparsity, **method, **size)
    seconds = time.process_time() - began
    report = mipprune.prune(model, None, windows, rules, "swap", start="wanda", **size)
    return {
        "sparsity": report.sparsity,
        "loss": report.loss,
        "allocation_seconds": seconds,
        **yard.measure(model),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| allocation | removed | summed layer loss | perplexity | KL | CPU seconds to allocate |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, entry in record["methods"].items():
        mean = entry["summary"]
        error = mean.get("perplexity_error", math.nan)
        lines.append(
            f"| {name} | {mean['sparsity']:.3%} | {mean['loss']:.0f} "
            f"| {mean['perplexity']:.2f} ± {error:.2f} "
            f"| {mean['kl']:.4f} ± {mean.get('kl_error', math.nan):.4f} "
            f"| {mean['allocation_seconds']:.0f} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity and KL of every allocation, with one standard error over the seeds."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    names = list(record["methods"])[::-1]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(
        panels, ("perplexity", "kl"), ("perplexity (dotted: dense)", "KL to dense"), strict=True
    ):
        summaries = [record["methods"][name]["summary"] for name in names]
        means = [one[key] for one in summaries]
        errors = [one.get(f"{key}_error", 0.0) for one in summaries]
        axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", capsize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    panels[0].axvline(record["dense_perplexity"], color="grey", linestyle=":")
    draw(figure, path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sparsity", type=float, default=0.6)
    options.add_argument("--methods", help="semicolon-separated; all by default")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--samples", type=int, default=24, help="calibration windows")
    options.add_argument("--evaluate", type=int, default=32, help="evaluation windows")
    options.add_argument("--resume", action="store_true", help="keep what a run before measured")
    arguments = options.parse_args()
    tokenizer = mipprune.load_model("embedded", torch.device("cpu")).tokenizer

    def windows(side: Any, count: int, seed: int) -> Windows:
        source, texts = read_texts(None, side)
        return cut_windows(texts, source, tokenizer, WINDOW, count, seed)

    evaluation = windows("evaluation", arguments.evaluate, 0)
    yard = Yardstick(evaluation, Windows(evaluation.tokens[:8], evaluation.source))
    settings = {
        "model": "embedded",
        "dense_perplexity": yard.perplexity,
        "sparsity": arguments.sparsity,
        "samples": arguments.samples,
        "evaluation_windows": len(evaluation.tokens),
    }
    record: dict[str, Any] = {**settings, "methods": {}}
    before = arguments.out / "allocation.json"
    if arguments.resume and before.is_file():
        record = json.loads(before.read_text())
        if any(record[key] != value for key, value in settings.items()):
            raise SystemExit(f"{before} was measured with other settings; choose another --out.")
        del record["machine"]
    found = record["methods"]
    methods = arguments.methods.split(";") if arguments.methods else list(METHODS)
    for seed in range(arguments.seeds):
        calibration = windows("calibration", arguments.samples, seed)
        for name in methods:
            runs = found.get(name, {"runs": []})["runs"]
            if len(runs) > seed:
                continue
            runs.append(run(METHODS[name], arguments.sparsity, calibration, yard))
            print(f"{name}, seed {seed}: {json.dumps(runs[-1])}", flush=True)
            found[name] = {"summary": summary(runs), "runs": runs}
            record["methods"] = {key: found[key] for key in METHODS if key in found}
            write(arguments.out, "allocation", record)
    print(table(record))
    plot(record, arguments.out / "allocation.png")


if __name__ == "__main__":
    main()
