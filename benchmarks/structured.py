"""Neurons and attention groups removed for good: Wanda-sp, FLAP, and masks with a proof.

Every method makes the embedded GPT smaller on several calibration seeds. For each run: the loss of
what was removed and of the weights as written, perplexity and KL divergence to the dense model on
text that nothing was chosen on, proven gaps, parameters, bytes on disk, seconds. Afterwards the
forward pass of the dense and the smaller models is timed, one against the other.

"flap" is its uniform variant (published as UL-UM): a plainly loadable model has one number of
neurons for all blocks. It takes its statistics from the dense model, and has its biases. "flap,
adaptive (zeros)" is FLAP as published (AL-AM), with another number in every block and as many in
all, which no configuration can say: the model keeps its shapes and has zeros. Its counterpart
chooses the numbers by elimination's curves.

KV groups are removed from the same weights read as a SmolLM3 model, which computes the same; of a
Llama model transformers wants a number of heads that divides the hidden size.

    python benchmarks/structured.py
    python benchmarks/structured.py --removals "neurons 25 %" --methods "wanda_sp;flap" --resume
    python benchmarks/structured.py --removals "" --prove 0 --latency 0.85 --resume
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from adaptive_groups import adapted
from common import draw, write
from matplotlib.figure import Figure
from yardstick import (
    WINDOW,
    Yardstick,
    draw_points,
    load,
    model_parser,
    resumed,
    summary,
    windows_for,
)

import mipprune
from mipprune.calibration import Windows
from mipprune.capture import forward
from mipprune.structured import Latency, Method

NO_BIAS = {"bias": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "wanda_sp": {"method": Method("wanda_sp", "none", "none")},
    "flap": {"method": Method("flap", "none", "add"), "grams": "dense"},
    "flap, propagated": {"method": Method("flap", "none", "add")},
    "flap, adaptive (zeros)": {"adaptive": "flap"},
    "flap, no bias": {"method": Method("flap", "none", "none"), "grams": "dense"},
    "swap": {"method": Method("swap", "none", "none")},
    "swap + bias": {"method": Method("swap", "none", "add")},
    "flap + least squares + bias": {"method": Method("flap", "least_squares", "add")},
    "swap + least squares": {"method": Method("swap", "least_squares", "none")},
    "eliminate + least squares": {"method": Method("eliminate", "least_squares", "none")},
    "eliminate + least squares + bias": {"method": Method("eliminate", "least_squares", "add")},
    "eliminate + least squares + bias, adaptive (zeros)": {"adaptive": "eliminate"},
}
REMOVALS: dict[str, dict[str, float]] = {
    "neurons 20 %": {"neurons": 0.2},
    "neurons 25 %": {"neurons": 0.25},
    "neurons 30 %": {"neurons": 0.3},
    "KV groups 1 of 4": {"kv_groups": 0.25},
    "KV groups 2 of 4": {"kv_groups": 0.5},
}


def load_as_smollm() -> Any:
    """The embedded weights under a configuration that allows any number of heads."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    model = load()
    settings = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("model_type", "architectures", "pretraining_tp")
    }
    rotated = {"no_rope_layers": [1] * model.config.num_hidden_layers}
    other = SmolLM3ForCausalLM(
        SmolLM3Config(**{**settings, **rotated, "use_sliding_window": False})
    )
    other.load_state_dict(model.state_dict())
    other.tie_weights()
    return other.eval()


def loaded(removal: dict[str, float]) -> Any:
    """The dense model that something is removed from."""
    return load_as_smollm() if "kv_groups" in removal else load()


def run_adaptive(
    name: str, removal: dict[str, float], windows: Windows, yard: Yardstick
) -> dict[str, Any]:
    """One removal and seed with another number of groups in every block; nothing is smaller."""
    began = time.process_time()
    found = adapted(name, loaded(removal), windows, removal)
    updated = sum(one.updated_loss for one in found.results)
    return {
        "loss": sum(one.loss for one in found.results),
        "updated_loss": updated,
        "of_wanda_sp": updated / found.loss_wanda_sp,
        "cpu_seconds": time.process_time() - began,
        **yard.measure_outputs(found.model),
        "kept": found.kept,
    }


def run(
    method: dict[str, Any], removal: dict[str, float], windows: Windows, yard: Yardstick
) -> dict[str, Any]:
    """One method, one removal, one seed."""
    if "adaptive" in method:
        return run_adaptive(method["adaptive"], removal, windows, yard)
    model = loaded(removal)
    size = {"samples": len(windows.tokens), "seqlen": WINDOW, "batch_size": 8}
    began = time.process_time()
    smaller = mipprune.shrink(model, None, windows, **removal, **method, **size)
    seconds = time.process_time() - began
    report = smaller.report
    with tempfile.TemporaryDirectory() as folder:
        smaller.model.to(torch.float16).save_pretrained(folder)
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        smaller.model.float()
    return {
        "loss": report.loss,
        "updated_loss": report.updated_loss,
        "of_wanda_sp": report.updated_loss / report.loss_wanda_sp,
        "parameters": report.parameters_after,
        "file_bytes": stored,
        "cpu_seconds": seconds,
        **yard.measure_outputs(smaller.model),
    }


def in_time(latency: Latency, windows: Windows, yard: Yardstick) -> dict[str, Any]:
    """Counts chosen by the measured time of a pass, and what they do to the model."""
    size = {"samples": len(windows.tokens), "seqlen": WINDOW, "batch_size": 8}
    method = METHODS["eliminate + least squares + bias"]
    smaller = mipprune.shrink(load(), None, windows, latency=latency, **method, **size)
    report = smaller.report
    return {
        **(report.latency or {}),
        "counts": report.counts,
        "divergences": report.curves,
        "parameters": report.parameters_after,
        "warnings": report.warnings,
        **yard.measure_outputs(smaller.model),
    }


def proof(windows: Windows, seconds: float) -> dict[str, Any]:
    """How far the choice of 25 % of the neurons is from the best one, block by block."""
    size = {"samples": len(windows.tokens), "seqlen": WINDOW, "batch_size": 8}
    losses = {}
    for solver, limit in (("swap", None), ("branch_and_bound", seconds)):
        method = Method(solver, "none", "none", time_limit=limit)
        report = mipprune.shrink(load(), None, windows, neurons=0.25, method=method, **size).report
        losses[solver] = [one.loss for one in report.layers]
    return {
        "seconds_per_block": seconds,
        "losses": losses,
        "gaps": [one.gap for one in report.layers],
        "evidence": [one.evidence for one in report.layers],
        "status": [one.status for one in report.layers],
    }


def forward_seconds(removals: list[str], windows: Windows, rounds: int) -> dict[str, Any]:
    """Median seconds of a forward pass, the models in turn, and of the ratio to the dense one.

    What was removed does not matter for it, only how much.
    """
    models: dict[str, Any] = {"dense": load()}
    few = Windows(windows.tokens[:2], windows.source)
    for name in removals:
        made = mipprune.shrink(
            loaded(REMOVALS[name]), None, few, method=Method("wanda_sp", "none", "none"),
            samples=2, seqlen=WINDOW, batch_size=2, **REMOVALS[name],
        )  # fmt: skip
        models[name] = made.model
    tokens = windows.tokens[:8]
    taken: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, model in models.items():
                began = time.perf_counter()
                forward(model, tokens)
                if number:
                    taken[name].append(time.perf_counter() - began)
    first = taken[next(iter(models))]
    return {
        name: {
            "seconds": statistics.median(values),
            "of_dense": statistics.median(a / b for a, b in zip(values, first, strict=True)),
        }
        for name, values in taken.items()
    }


def table(removal: str, dense: float, results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"| {removal} | loss as written / Wanda-sp's | perplexity | increase | KL "
        "| parameters | file, MB | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in results.items():
        mean = entry["summary"]
        lines.append(
            f"| {name} | {mean['of_wanda_sp']:.3f} "
            f"| {mean['perplexity']:.3f} ± {mean.get('perplexity_error', math.nan):.3f} "
            f"| {mean['perplexity'] - dense:.3f} "
            f"| {mean['kl']:.4f} ± {mean.get('kl_error', math.nan):.4f} "
            + (
                f"| {mean['parameters'] / 1e6:.3f} M | {mean['file_bytes'] / 1e6:.2f} "
                if "parameters" in mean
                else "| as it was | as it was "
            )
            + f"| {mean['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Perplexity of every method, with one standard error over the seeds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    if not record["removals"]:
        return
    panels = figure.subplots(1, len(record["removals"]), squeeze=False, sharey=True)[0]
    names = [name for name in METHODS if any(name in r for r in record["removals"].values())]
    for axes, (removal, results) in zip(panels, record["removals"].items(), strict=True):
        draw_points(axes, results, "perplexity", names, record["dense_perplexity"])
        axes.set_title(f"{removal} removed", fontsize=9)
        axes.set_xlabel("perplexity (dotted: dense)", fontsize=8)
    draw(figure, path)


def main() -> None:
    options = model_parser(__doc__, samples=64, evaluate=64)
    options.add_argument("--removals", default=",".join(REMOVALS), help="separated by commas")
    options.add_argument("--rounds", type=int, default=12, help="timed forwards per model")
    options.add_argument("--prove", type=float, default=60.0, help="seconds per block; 0: not")
    options.add_argument("--latency", type=float, help="share of the dense model's time to keep to")
    options.add_argument("--latency-tokens", type=int, default=256, help="of that pass")
    arguments = options.parse_args()
    windows = windows_for()
    evaluation = windows("evaluation", arguments.evaluate, 0)
    yard = Yardstick(evaluation, evaluation)
    same = yard.measure_outputs(load_as_smollm())
    if abs(same["kl"]) > 1e-6:
        raise SystemExit(f"The model computes something else as SmolLM3 (KL {same['kl']:.2g}).")
    settings = {
        "model": "embedded",
        "dense_perplexity": yard.perplexity,
        "dense_parameters": load().num_parameters(),
        "seeds": arguments.seeds,
        "samples": arguments.samples,
        "evaluation_windows": len(evaluation.tokens),
    }
    print(json.dumps(settings))
    record = resumed(arguments.out / "structured.json", settings, "removals", arguments.resume)
    chosen = arguments.methods.split(";") if arguments.methods else list(METHODS)
    removals = [name for name in arguments.removals.split(",") if name]
    for removal in removals:
        results = record["removals"].setdefault(removal, {})
        for name in chosen:
            if name in results:
                continue
            runs = []
            for seed in range(arguments.seeds):
                calibration = windows("calibration", arguments.samples, seed)
                runs.append(run(METHODS[name], REMOVALS[removal], calibration, yard))
            figures = [{k: v for k, v in one.items() if k != "kept"} for one in runs]
            results[name] = {"summary": summary(figures), "runs": runs}
            print(f"{removal}, {name}: {json.dumps(results[name]['summary'])}", flush=True)
            write(arguments.out, "structured", record)
        record["removals"][removal] = {name: results[name] for name in METHODS if name in results}
        print(table(removal, yard.perplexity, record["removals"][removal]))
    if arguments.prove:
        record["proof"] = proof(windows("calibration", arguments.samples, 0), arguments.prove)
        print(json.dumps(record["proof"]))
        write(arguments.out, "structured", record)
    if removals and arguments.rounds:
        record["forward"] = forward_seconds(removals, evaluation, arguments.rounds)
        print(json.dumps(record["forward"]))
    if arguments.latency:
        latency = Latency(arguments.latency, arguments.latency_tokens)
        record["latency"] = in_time(latency, windows("calibration", arguments.samples, 0), yard)
        print(json.dumps(record["latency"]))
    found = record["removals"]
    record["removals"] = {name: found[name] for name in REMOVALS if name in found}
    write(arguments.out, "structured", record)
    plot(record, arguments.out / "structured.png")


if __name__ == "__main__":
    main()
