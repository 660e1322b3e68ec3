"""One process against two (torchrun, gloo), one thread each: the same masks, and the speed-up."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from random_models import last_line

from mipprune import Windows, load_model, prune
from mipprune.ranks import ranks_of_environment
from solvers import PerRow


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        child(arguments.samples)
        return
    command = ["--child", "--samples", str(arguments.samples)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    one = in_processes([sys.executable, __file__, *command])
    two = in_processes([sys.executable, *launch, __file__, *command])
    record = {
        "samples": arguments.samples,
        "identical": one["mask_hash"] == two["mask_hash"],
        "speedup": one["seconds"] / two["seconds"],
        "one": one,
        "two": two,
    }
    print(
        f"one process {one['seconds']:.1f} s, two {two['seconds']:.1f} s: "
        f"{record['speedup']:.2f} times as fast, masks identical: {record['identical']}"
    )
    write(arguments.out, "two_processes", record)


def in_processes(command: list[str]) -> dict[str, Any]:
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    return last_line(done.stdout.decode())


def child(samples: int) -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(2048, (samples, 256), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens, "random tokens")
    with ranks_of_environment(torch.device("cpu")) as ranks:
        for count in (2 * ranks.size, samples):  # the first compiles what is compiled once
            loaded = load_model("embedded", torch.device("cpu"))
            ranks.gather_objects(None)  # together
            began = time.perf_counter()
            report = prune(
                loaded.model,
                loaded.tokenizer,
                Windows(tokens[:count], "random tokens"),
                PerRow(sparsity=0.6),
                samples=count,
                batch_size=min(8, count // (2 * ranks.size)),
                ranks=ranks,
            )
            seconds = time.perf_counter() - began
        if ranks.first:
            del windows
            print(json.dumps({"seconds": seconds, "mask_hash": report.mask_hash}))


if __name__ == "__main__":
    main()
