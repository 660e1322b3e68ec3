"""What helps the model, and what only helps the layer: masks, weights after them, perplexity.

Every method prunes the embedded GPT, or a model in a folder, on several calibration seeds. For
each run: the layer loss of the masks, of the weights as written, the same on text that no mask was
chosen on, perplexity and KL divergence to the dense model, and time.

    python benchmarks/study.py                       # 60 % per row and 2:4, three seeds
    python benchmarks/study.py --patterns 0.6 --methods "wanda;swap" --resume
    python benchmarks/study.py --model second        # of benchmarks/train_second.py
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from common import draw, write
from matplotlib.figure import Figure
from methods import METHODS, PUBLISHED
from yardstick import (
    WINDOW,
    Yardstick,
    draw_points,
    lead,
    load,
    model_parser,
    resumed,
    summary,
    windows_for,
)

import mipprune
from mipprune.calibration import Windows
from mipprune.layer_step import LayerStep
from solvers import NM, Pattern, PerRow

TEMPERATURES = (0.9, 0.95, 1.0, 1.05, 1.1)
"""Whether the dense model itself is over-confident on the text: then its best one is above 1."""


def updates(name: str) -> bool:
    """Whether a method changes the weights that it keeps."""
    step: LayerStep = METHODS[name]["layer_step"]
    return not step.keeps_weights


def leads(results: dict[str, Any]) -> dict[str, Any]:
    """How much less perplexity and KL our best has than each published method, seed by seed.

    Among masks alone, and among methods that change weights too; ours is the one with the least KL
    divergence.
    """
    found = {}
    for kind, changed in (("masks", False), ("weights", True)):
        there = [name for name in results if updates(name) == changed]
        own = [name for name in there if name not in PUBLISHED]
        if not own:
            continue
        best = min(own, key=lambda name: float(results[name]["summary"]["kl"]))
        runs = results[best]["runs"]
        found[kind] = {
            "ours": best,
            "over": {
                name: {key: lead(runs, results[name]["runs"], key) for key in ("perplexity", "kl")}
                for name in there
                if name in PUBLISHED
            },
        }
    return found


def run(
    method: dict[str, Any],
    pattern: Pattern,
    windows: Windows,
    yard: Yardstick,
    source: str = "embedded",
) -> dict[str, float]:
    """One method, one pattern, one seed."""
    model = load(source)
    began = time.perf_counter()
    report = mipprune.prune(
        model, None, windows, pattern, samples=len(windows.tokens), seqlen=WINDOW, **method
    )
    seconds = time.perf_counter() - began
    found = {}
    if method["choice"] is not None:
        of_model = report.settings["choice"].get("value")
        found["chosen"] = statistics.fmean(
            of_model if layer.choice is None else layer.choice["value"] for layer in report.layers
        )
    return {
        **found,
        "loss": report.loss,
        "updated_loss": report.updated_loss,
        "of_wanda": report.updated_loss / report.loss_reference,
        "seconds": seconds,
        **yard.measure(model),
    }


def table(pattern: str, dense: float, results: dict[str, Any]) -> str:
    """Markdown."""
    wanda = results.get("wanda", {}).get("summary", {}).get("perplexity", math.nan)
    lines = [
        f"| {pattern} | layer loss / wanda | held-out loss | perplexity | increase / wanda's "
        "| KL | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in results.items():
        mean = entry["summary"]
        share = (mean["perplexity"] - dense) / (wanda - dense)
        error = mean.get("perplexity_error", math.nan)
        lines.append(
            f"| {name} | {mean['of_wanda']:.3f} | {mean['held_out_loss']:.4g} "
            f"| {mean['perplexity']:.2f} ± {error:.2f} | {share:.0%} "
            f"| {mean['kl']:.4f} | {mean['seconds']:.1f} |"
        )
    return "\n".join(lines)


def beside(record: dict[str, Any], patterns: list[str]) -> str:
    """Markdown: methods by patterns; loss, perplexity and its increase against Wanda's, KL."""
    dense = record["dense_perplexity"]
    heads = [f"{one}: loss | perplexity | KL" for one in patterns]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * 3 * len(patterns)]
    for name in METHODS:
        cells, found = [], False
        for pattern in patterns:
            results = record["patterns"].get(pattern, {})
            mean = results.get(name, {}).get("summary")
            if mean is None:
                cells.append("| | ")
                continue
            found = True
            wanda = results["wanda"]["summary"]["perplexity"] - dense
            cells.append(
                f"{mean['of_wanda']:.3f} | {mean['perplexity']:.2f} "
                f"± {mean.get('perplexity_error', math.nan):.2f} "
                f"({(mean['perplexity'] - dense) / wanda:.0%}) | {mean['kl']:.3f}"
            )
        if found:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity of every method, with one standard error over the seeds."""
    patterns = record["patterns"]
    names = [name for name in METHODS if any(name in results for results in patterns.values())]
    figure = Figure(figsize=(3 + 2.2 * len(patterns), 5.5), layout="constrained")
    panels = figure.subplots(1, len(patterns), sharey=True, squeeze=False)[0]
    for axes, (pattern, results) in zip(panels, patterns.items(), strict=True):
        draw_points(axes, results, "perplexity", names, record["dense_perplexity"])
        axes.set_title(pattern, fontsize=9)
    figure.supxlabel("perplexity (dotted: dense)", fontsize=9)
    draw(figure, path)


def _fits(method: dict[str, Any], pattern: Pattern) -> bool:
    """Sparsity can be allocated where it is not N:M, and inputs permuted where it is."""
    return method["allocation" if isinstance(pattern, NM) else "permute"] is None


def parse(text: str) -> Pattern:
    return NM.parse(text) if ":" in text else PerRow(sparsity=float(text))


def main() -> None:
    options = model_parser(__doc__, samples=128, evaluate=128)
    options.add_argument("--patterns", default="0.6,2:4")
    options.add_argument("--model", default="embedded", help="folder of another model")
    options.add_argument(
        "--name", help="of the result files; default: study, and the folder's name"
    )
    arguments = options.parse_args()
    other = "" if arguments.model == "embedded" else f"_{Path(arguments.model).name}"
    arguments.name = arguments.name or f"study{other}"
    windows = windows_for(arguments.model)
    evaluation = windows("evaluation", arguments.evaluate, 0)
    held_out = Windows(evaluation.tokens[:64], evaluation.source)
    yard = Yardstick(evaluation, held_out, arguments.model)
    print(f"dense: perplexity {yard.perplexity:.3f}")
    methods = arguments.methods.split(";") if arguments.methods else list(METHODS)
    settings = {
        "model": Path(arguments.model).name,
        "dense_perplexity": yard.perplexity,
        "seeds": arguments.seeds,
        "samples": arguments.samples,
        "evaluation_windows": len(evaluation.tokens),
    }
    before = arguments.out / f"{arguments.name}.json"
    record = resumed(before, settings, "patterns", arguments.resume)
    record["dense_by_temperature"] = {str(at): yard.tempered(at) for at in TEMPERATURES}
    for text in arguments.patterns.split(","):
        pattern = parse(text)
        results = record["patterns"].setdefault(str(pattern), {})
        for name in methods:
            if name in results or not _fits(METHODS[name], pattern):
                continue
            runs = []
            for seed in range(arguments.seeds):
                calibration = windows("calibration", arguments.samples, seed)
                runs.append(run(METHODS[name], pattern, calibration, yard, arguments.model))
            results[name] = {"summary": summary(runs), "runs": runs}
            print(f"{pattern}, {name}: {json.dumps(results[name]['summary'])}", flush=True)
            write(arguments.out, arguments.name, record)
        in_order = {name: results[name] for name in METHODS if name in results}
        record["patterns"][str(pattern)] = in_order
        record.setdefault("leads", {})[str(pattern)] = leads(in_order)
        print(table(str(pattern), yard.perplexity, in_order))
    print(beside(record, list(record["patterns"])))
    write(arguments.out, arguments.name, record)
    plot(record, arguments.out / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
