"""The whole run on a Llama-3.1-8B-shaped model: time by phase, and peak memory.

Random weights and tokens (128 windows of 2048), Wanda and swaps to convergence at 60 %. On a GPU:

    python benchmarks/llama_8b.py

Where there is none, ``--shape tiny --samples 16 --seqlen 128`` runs the same steps on a tiny model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import RESULTS, write
from random_models import SHAPES, peak_memory, write_llama

from mipprune.calibration import Windows
from mipprune.job import prune_to_folder
from mipprune.models import resolve_device
from mipprune.observer import Observer
from mipprune.opening import Source
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import MaskProblem, PerRow, solve


class Phases(Observer):
    """Seconds between what the run says that it does, summed by kind."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._now, self._began = device, "", time.perf_counter()

    def phase(self, text: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._now:
            self.seconds[self._now] += now - self._began
        _, of_block, kind = text.partition(": " if ": " in text else ".")
        kind = kind if of_block else text.partition(" /")[0]
        self._now, self._began = kind, now


def warm_up(solver: str, device: torch.device) -> None:
    """Have compiled what is compiled once."""
    x = torch.randn(64, 256, device=device)
    problem = MaskProblem(torch.randn(64, 64, device=device), x @ x.T, PerRow(sparsity=0.6))
    solve(problem, solver)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    options.add_argument("--shape", default="8b", choices=SHAPES)
    options.add_argument("--model", type=Path, help="folder of a model written before")
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--seqlen", type=int, default=2048)
    options.add_argument("--device", default="auto")
    options.add_argument("--solver", default="swap")
    options.add_argument("--stream", action="store_true", help="never hold the whole model")
    options.add_argument("--out", type=Path, default=RESULTS)
    arguments = options.parse_args()
    device = resolve_device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            write_llama(source, arguments.shape)
        size = arguments.samples, arguments.seqlen
        vocabulary = SHAPES[arguments.shape]["vocab_size"]
        tokens = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
        warm_up(arguments.solver, device)
        phases = Phases(device)
        began = time.perf_counter()
        report = prune_to_folder(
            Source(str(source), str(device), stream=arguments.stream),
            Path(scratch) / "pruned",
            Windows(tokens, "random tokens"),
            Settings(
                Rules(PerRow(sparsity=0.6)),
                arguments.solver,
                samples=arguments.samples,
                seqlen=arguments.seqlen,
            ),
            observer=phases,
        )
        phases.phase("end")
        seconds = time.perf_counter() - began
    assert report is not None
    on_gpu = device.type == "cuda"
    record = {
        "shape": arguments.shape,
        "samples": arguments.samples,
        "seqlen": arguments.seqlen,
        "device": report.environment["device"],
        "batch_size": report.settings["batch_size"],
        "seconds": seconds,
        "seconds_by_phase": dict(phases.seconds),
        "seconds_solving": sum(layer.seconds for layer in report.layers),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "peak_host_bytes": peak_memory(),
        "loss_over_start": report.loss / (report.loss_start or report.loss),
        "sparsity": report.sparsity,
    }
    for kind, spent in phases.seconds.items():
        print(f"{kind:28} {spent:8.2f} s")
    print(f"{'all':28} {seconds:8.2f} s")
    write(arguments.out, f"llama_{arguments.shape}", record)


if __name__ == "__main__":
    main()
