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

import torch
from common import draw, parser, write
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import mipprune
from mipprune.allocate import Allocation
from mipprune.calibration import Windows, cut_windows, read_texts
from mipprune.capture import forward
from mipprune.layer_step import LayerStep
from mipprune.models import all_layers, find_blocks
from mipprune.placement import Placement
from mipprune.surrogate import Surrogate
from mipprune.walk import BlockWalk
from solvers import NM, Pattern, PerRow, updated_loss

WINDOW = 256
HALF = Surrogate(shrink=0.5)
TABU = {"solver": "chain", "solver_options": {"stages": [["tabu", {"iterations": 4000}]]}}


def _squares(damping: float = 1e-2) -> LayerStep:
    return LayerStep(update="least_squares", update_damping=damping)


METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "ria": {"solver": "ria"},
    "dsnot": {"solver": "dsnot"},
    "sparsefw": {"solver": "sparsefw"},
    "sparseswaps": {"solver": "sparseswaps"},
    "swap": {"solver": "swap"},
    "tabu": TABU,
    "swap, shrink 0.5": {"solver": "swap", "layer_step": LayerStep(HALF)},
    "swap, shrink 0.5, allocated": {
        "solver": "swap",
        "layer_step": LayerStep(HALF),
        "allocation": Allocation(),
    },
    "wanda + gain": {"solver": "wanda", "layer_step": LayerStep(update="gain")},
    "ria + gain": {"solver": "ria", "layer_step": LayerStep(update="gain")},
    "swap, shrink 0.5 + gain": {"solver": "swap", "layer_step": LayerStep(HALF, update="gain")},
    "swap, shrink 0.5, allocated + gain": {
        "solver": "swap",
        "layer_step": LayerStep(HALF, update="gain"),
        "allocation": Allocation(),
    },
    "sparsegpt": {"solver": "sparsegpt", "layer_step": LayerStep(update="sparsegpt")},
    "wanda + least squares": {"solver": "wanda", "layer_step": _squares()},
    "swap + least squares": {"solver": "swap", "layer_step": _squares()},
    "swap, shrink 0.5 + least squares": {
        "solver": "swap",
        "layer_step": LayerStep(HALF, update="least_squares"),
    },
    "alps": {"solver": "alps", "layer_step": _squares()},
    "alps, damping 0.1": {"solver": "alps", "layer_step": _squares(0.1)},
    "alps, allocated": {"solver": "alps", "layer_step": _squares(), "allocation": Allocation()},
    "alps, allocated, damping 0.1": {
        "solver": "alps",
        "layer_step": _squares(0.1),
        "allocation": Allocation(),
    },
    "joint": {"solver": "joint", "layer_step": _squares()},
    "joint, allocated": {"solver": "joint", "layer_step": _squares(), "allocation": Allocation()},
}


class Yardstick:
    """The dense model on evaluation text, and what pruned models are measured by."""

    def __init__(self, windows: Windows, held_out: Windows, source: str = "embedded") -> None:
        self._windows, self._held_out = windows, held_out
        model = load(source)
        blocks_name, blocks = find_blocks(model)
        self.weights = {
            layer.name: layer.weight.clone() for layer in all_layers(blocks_name, blocks)
        }
        self.dense = [self._logits(model, batch) for batch in self._batches()]
        self.perplexity = math.exp(statistics.fmean(self._losses(self.dense)))

    def _batches(self) -> tuple[Tensor, ...]:
        return torch.split(self._windows.tokens, 8)

    def _logits(self, model: Any, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return log_softmax(forward(model, batch)[:, :-1].float(), dim=-1)

    def _losses(self, outputs: list[Tensor]) -> list[float]:
        """Mean negative log-likelihood of each window."""
        found: list[float] = []
        for logits, batch in zip(outputs, self._batches(), strict=True):
            losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            found += losses.view(len(batch), -1).double().mean(dim=1).tolist()
        return found

    def measure(self, model: Any) -> dict[str, Any]:
        """Perplexity, KL divergence and held-out layer loss of a pruned model."""
        return {**self.measure_outputs(model), "held_out_loss": self._held_out_loss(model)}

    def measure_outputs(self, model: Any) -> dict[str, float]:
        """Perplexity and KL divergence of a model, whatever its layers."""
        outputs = [self._logits(model, batch) for batch in self._batches()]
        losses = self._losses(outputs)
        kl = [
            float(kl_div(pruned, dense, reduction="none", log_target=True).sum(-1).double().mean())
            for pruned, dense in zip(outputs, self.dense, strict=True)
        ]
        return {
            "perplexity": math.exp(statistics.fmean(losses)),
            "kl": statistics.fmean(kl),
        }

    def _held_out_loss(self, model: Any) -> float:
        """Summed squared output changes per token on text that no mask was chosen on."""
        total = 0.0
        for step in BlockWalk(Placement(model), self._held_out.tokens, 8):
            for layer in step.layers:
                gram = step.grams.gram(layer).matrix
                total += float(updated_loss(self.weights[layer.name], gram, layer.weight).sum())
        return total


def load(source: str = "embedded") -> Any:
    return mipprune.load_model(source, torch.device("cpu")).model


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
    return {
        "loss": report.loss,
        "updated_loss": report.updated_loss,
        "of_wanda": report.updated_loss / report.loss_reference,
        "seconds": seconds,
        **yard.measure(model),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the seeds, and its standard error."""
    out = {}
    for key in runs[0]:
        values = [entry[key] for entry in runs]
        out[key] = statistics.fmean(values)
        if len(values) > 1:
            out[f"{key}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return out


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


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity of every method, with one standard error over the seeds."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(1, len(record["patterns"]), squeeze=False)[0]
    for axes, (pattern, results) in zip(panels, record["patterns"].items(), strict=True):
        names = list(results)[::-1]
        means = [results[name]["summary"]["perplexity"] for name in names]
        errors = [results[name]["summary"].get("perplexity_error", 0.0) for name in names]
        axes.errorbar(means, range(len(names)), xerr=errors, fmt="o", capsize=3)
        axes.axvline(record["dense_perplexity"], color="grey", linestyle=":")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("perplexity (dotted: dense)")
        axes.set_title(pattern)
        axes.grid(axis="x", alpha=0.3)
    draw(figure, path)


def parse(text: str) -> Pattern:
    return NM.parse(text) if ":" in text else PerRow(sparsity=float(text))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--patterns", default="0.6,2:4")
    options.add_argument("--methods", help="semicolon-separated; all by default")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--samples", type=int, default=128, help="calibration windows")
    options.add_argument("--evaluate", type=int, default=128, help="evaluation windows")
    options.add_argument("--resume", action="store_true", help="keep what a run before measured")
    options.add_argument("--model", default="embedded", help="folder of another model")
    options.add_argument(
        "--name", help="of the result files; default: study, and the folder's name"
    )
    arguments = options.parse_args()
    other = "" if arguments.model == "embedded" else f"_{Path(arguments.model).name}"
    arguments.name = arguments.name or f"study{other}"
    tokenizer = mipprune.load_model(arguments.model, torch.device("cpu")).tokenizer

    def windows(side: Any, count: int, seed: int) -> Windows:
        source, texts = read_texts(None, side)
        return cut_windows(texts, source, tokenizer, WINDOW, count, seed)

    evaluation = windows("evaluation", arguments.evaluate, 0)
    yard = Yardstick(
        evaluation, Windows(evaluation.tokens[:64], evaluation.source), arguments.model
    )
    print(f"dense: perplexity {yard.perplexity:.3f}")
    methods = arguments.methods.split(";") if arguments.methods else list(METHODS)
    settings = {
        "model": Path(arguments.model).name,
        "dense_perplexity": yard.perplexity,
        "seeds": arguments.seeds,
        "samples": arguments.samples,
        "evaluation_windows": len(evaluation.tokens),
    }
    record: dict[str, Any] = {**settings, "patterns": {}}
    before = arguments.out / f"{arguments.name}.json"
    if arguments.resume and before.is_file():
        record = json.loads(before.read_text())
        if any(record[key] != value for key, value in settings.items()):
            raise SystemExit(f"{before} was measured with other settings; choose another --name.")
        del record["machine"]
    for text in arguments.patterns.split(","):
        pattern = parse(text)
        results = record["patterns"].setdefault(str(pattern), {})
        for name in methods:
            if name in results or ("allocation" in METHODS[name] and isinstance(pattern, NM)):
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
        print(table(str(pattern), yard.perplexity, in_order))
    write(arguments.out, arguments.name, record)
    plot(record, arguments.out / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
