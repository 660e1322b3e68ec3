"""A model larger than the memory it is given, pruned block by block.

A random Llama of the shape of TinyLlama-1.1B (4.1 GiB in float32, the type it computes in on the
CPU) is written to disk and pruned there with ``--stream``. Recorded: peak host memory of the
process, and what ``--dry-run`` had estimated, here and for the embedded model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, write
from random_models import SHAPES, last_line, peak_memory, write_llama

BOUND = 3 * 2**30
"""Most host memory that the run on the model of 1.1 B weights may take."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--shape", default="1b", choices=SHAPES)
    options.add_argument("--model", type=Path, help="folder of a model written before")
    options.add_argument("--solver", default="wanda")
    options.add_argument("--windows", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--child", nargs=2, metavar=("WHAT", "MODEL"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        source = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            in_a_process(arguments, "write", str(source))
        record: dict[str, Any] = {"shape": arguments.shape, "solver": arguments.solver}
        for name, model in ((arguments.shape, str(source)), ("embedded", "embedded")):
            estimated = in_a_process(arguments, "plan", model)
            measured = in_a_process(arguments, "run", model)
            error = estimated["peak_bytes"] / measured["peak_bytes"] - 1
            record[name] = {**measured, "estimated": estimated, "estimate_error": error}
            print(
                f"{name}: peak {measured['peak_bytes'] / 2**30:.2f} GiB, estimated "
                f"{estimated['peak_bytes'] / 2**30:.2f} GiB ({error:+.0%}), "
                f"{measured['seconds']:.0f} s, estimated {estimated['seconds']:.0f} s",
                flush=True,
            )
    record["float32_bytes"] = record[arguments.shape]["float32_bytes"]
    record["bound_bytes"] = BOUND
    record["within_bound"] = record[arguments.shape]["peak_bytes"] < BOUND
    write(arguments.out, f"big_model_{arguments.shape}", record)


def in_a_process(arguments: argparse.Namespace, what: str, model: str) -> dict[str, Any]:
    """Each step has a process of its own, whose peak memory is its own."""
    command = [sys.executable, __file__, "--shape", arguments.shape, "--solver", arguments.solver]
    command += ["--windows", str(arguments.windows), "--length", str(arguments.length)]
    command += ["--out", str(arguments.out)]
    done = subprocess.run([*command, "--child", what, model], check=True, stdout=subprocess.PIPE)
    return last_line(done.stdout.decode())


def child(what: str, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mipprune.calibration import Windows
    from mipprune.job import plan_job, prune_to_folder
    from mipprune.opening import Source
    from mipprune.rules import Rules
    from mipprune.settings import Settings
    from solvers import PerRow

    if what == "write":
        return {"weights": write_llama(Path(model), arguments.shape)}
    random = torch.Generator().manual_seed(0)
    size = arguments.windows, arguments.length
    windows = Windows(torch.randint(2048, size, generator=random), "random tokens")
    settings = Settings(
        Rules(PerRow(sparsity=0.6)),
        arguments.solver,
        samples=arguments.windows,
        seqlen=arguments.length,
    )
    source = Source(model, "cpu", stream=model != "embedded")
    if what == "plan":
        found = plan_job(source, windows, settings)
        return {"peak_bytes": found.peak, "phases": found.phases, "seconds": found.seconds}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
        report = prune_to_folder(source, Path(scratch) / "pruned", windows, settings)
        assert report is not None
        parameters = sum(file.stat().st_size for file in Path(scratch).rglob("*.safetensors"))
    return {
        "peak_bytes": peak_memory(),
        "seconds": time.perf_counter() - began,
        "stored_bytes": parameters,
        "float32_bytes": float32_bytes(model),
        "pruned_weights": report.coverage.prunable,
        "sparsity": report.sparsity,
        "mask_hash": report.mask_hash,
        "loss_over_wanda": report.loss / report.loss_reference,
    }


def float32_bytes(model: str) -> int:
    """What the whole model would take in the type that it computes in."""
    import torch

    from mipprune.folder import build_empty
    from mipprune.models import describe_model

    empty = build_empty(describe_model(model).config, torch.float32)
    return sum(parameter.nbytes for parameter in empty.parameters())


if __name__ == "__main__":
    main()
