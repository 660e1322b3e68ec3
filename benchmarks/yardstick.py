"""How benchmarks of whole models measure them: on the same text, against the dense one."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import parser
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import mipprune
from mipprune.calibration import Windows, cut_windows, read_texts
from mipprune.capture import forward
from mipprune.embedded import Side
from mipprune.models import all_layers, find_blocks
from mipprune.placement import Placement
from mipprune.walk import BlockWalk
from solvers import updated_loss

WINDOW = 256


def load(source: str = "embedded") -> Any:
    """The dense model, on the CPU."""
    return mipprune.load_model(source, torch.device("cpu")).model


def windows_for(source: str = "embedded") -> Callable[[Side, int, int], Windows]:
    """Cuts windows of Python's documentation with a model's tokenizer: side, how many, seed."""
    tokenizer = mipprune.load_model(source, torch.device("cpu")).tokenizer

    def windows(side: Side, count: int, seed: int) -> Windows:
        text, parts = read_texts(None, side)
        return cut_windows(parts, text, tokenizer, WINDOW, count, seed)

    return windows


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

    def tempered(self, temperature: float) -> float:
        """The dense model's perplexity with its logits divided by a temperature."""
        outputs = [log_softmax(logits / temperature, dim=-1) for logits in self.dense]
        return math.exp(statistics.fmean(self._losses(outputs)))

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


def model_parser(description: str | None, samples: int, evaluate: int) -> argparse.ArgumentParser:
    """Options that benchmarks of whole models have."""
    options = parser(description)
    options.add_argument("--methods", help="semicolon-separated")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--samples", type=int, default=samples, help="calibration windows")
    options.add_argument("--evaluate", type=int, default=evaluate, help="evaluation windows")
    options.add_argument("--resume", action="store_true", help="keep what a run before measured")
    return options


def resumed(path: Path, settings: dict[str, Any], part: str, resume: bool) -> dict[str, Any]:
    """What was measured before with these settings, under ``part``; else nothing yet."""
    if not (resume and path.is_file()):
        return {**settings, part: {}}
    record: dict[str, Any] = json.loads(path.read_text())
    if any(record[key] != value for key, value in settings.items()):
        raise SystemExit(f"{path} was measured with other settings; choose another --out.")
    del record["machine"]
    return record


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the seeds, and its standard error."""
    out = {}
    for key in runs[0]:
        values = [entry[key] for entry in runs]
        out[key] = statistics.fmean(values)
        if len(values) > 1:
            out[f"{key}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return out


def lead(ours: list[dict[str, float]], other: list[dict[str, float]], key: str) -> dict[str, float]:
    """By how much less ours has of a figure, seed by seed: mean, and its standard error.

    Runs of one seed share their calibration text, which is most of what differs from seed to seed.
    """
    differences = [there[key] - here[key] for here, there in zip(ours, other, strict=True)]
    found = {"mean": statistics.fmean(differences)}
    if len(differences) > 1:
        found["error"] = statistics.stdev(differences) / math.sqrt(len(differences))
    return found


def draw_points(
    axes: Axes, results: dict[str, Any], key: str, names: list[str], dense: float | None = None
) -> None:
    """A figure of every method that has it, with one standard error; the first name on top."""
    there = [name for name in names if name in results]
    summaries = [results[name]["summary"] for name in there]
    axes.errorbar(
        [one[key] for one in summaries],
        [len(names) - 1 - names.index(name) for name in there],
        xerr=[one.get(f"{key}_error", 0.0) for one in summaries],
        fmt="o",
        capsize=3,
    )
    if dense is not None:
        axes.axvline(dense, color="grey", linestyle=":")
    axes.set_yticks(range(len(names)), names[::-1], fontsize=8)
    axes.grid(axis="x", alpha=0.3)
