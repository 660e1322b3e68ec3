"""What ``--dry-run`` estimates against what the run then takes: peak memory and seconds.

The embedded model, several methods and sizes of text; every estimate and every run has a process
of its own, so both begin with imports. Seconds are those from the reading of the model to the
finished folder.
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
from random_models import last_line, peak_memory

RUNS: dict[str, dict[str, Any]] = {
    "wanda": {"solver": "wanda", "samples": 8, "seqlen": 128},
    "wanda, more text": {"solver": "wanda", "samples": 64, "seqlen": 256},
    "swap": {"solver": "swap", "samples": 32, "seqlen": 256},
    "alps and least squares": {"solver": "alps", "samples": 32, "seqlen": 256, "update": True},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--child", nargs=2, metavar=("WHAT", "RUN"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    record: dict[str, Any] = {}
    for name in arguments.runs:
        estimated, measured = in_a_process("plan", name), in_a_process("run", name)
        record[name] = {
            "settings": RUNS[name],
            "estimated": estimated,
            "measured": measured,
            "memory_ratio": estimated["peak_bytes"] / measured["peak_bytes"],
            "time_ratio": estimated["seconds"] / measured["seconds"],
        }
        print(
            f"{name}: {measured['seconds']:.1f} s, estimated {estimated['seconds']:.1f} s "
            f"({record[name]['time_ratio']:.2f}); {measured['peak_bytes'] / 2**20:.0f} MiB, "
            f"estimated {estimated['peak_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    write(arguments.out, "dry_run", {"runs": record})


def in_a_process(what: str, run: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", what, run]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return last_line(done.stdout.decode())


def child(what: str, run: str) -> dict[str, Any]:
    from mipprune.job import plan_job, prune_to_folder
    from mipprune.layer_step import LayerStep
    from mipprune.opening import Source
    from mipprune.rules import Rules
    from mipprune.settings import Settings
    from solvers import PerRow

    options = dict(RUNS[run])
    step = LayerStep(update="least_squares" if options.pop("update", False) else "none")
    settings = Settings(Rules(PerRow(sparsity=0.6)), layer_step=step, **options)
    source = Source("embedded", "cpu")
    if what == "plan":
        found = plan_job(source, None, settings)
        return {"peak_bytes": found.peak, "seconds": found.seconds}
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        prune_to_folder(source, Path(scratch) / "pruned", None, settings)
        return {"peak_bytes": peak_memory(), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
