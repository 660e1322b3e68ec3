"""Kill a run at random moments, resume it, and compare the folder with the uninterrupted run's.

The embedded model is pruned by the command line in a process of its own, which gets SIGKILL after
a random part of the time that a whole run takes; what is left is resumed, and every file but the
times must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from common import RESULTS, write

from mipprune.checkpoint import TIMINGS_FILE


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=RESULTS)
    arguments = options.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole" / "pruned"
        begin(whole).wait()  # compiles what is compiled once
        shutil.rmtree(whole)
        began = time.perf_counter()
        begin(whole).wait()
        seconds = time.perf_counter() - began
        expected = digests(whole)
        kills: list[dict[str, Any]] = []
        while len(kills) < arguments.kills:
            at = chance.uniform(0, seconds)
            out = Path(scratch) / f"{len(kills)}-{at:.3f}" / "pruned"
            process = begin(out)
            time.sleep(at)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                continue  # it had finished before
            if out.exists() and not out.with_name(f"{out.name}.partial").exists():
                continue  # it had nothing left to do but to end
            journal = out.with_name(f"{out.name}.partial") / "journal"
            left = journal.stat().st_size if journal.exists() else 0
            assert begin(out, "--resume").wait() == 0
            found = digests(out)
            kills.append(
                {
                    "after_seconds": at,
                    "journal_bytes": left,
                    "identical": found == expected,
                }
            )
            print(kills[-1], flush=True)
    record = {
        "run_seconds": seconds,
        "files": expected,
        "identical": sum(kill["identical"] for kill in kills),
        "kills": kills,
    }
    write(arguments.out, "kill_resume", record)


def begin(out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from mipprune.cli import main; main()", "prune", "embedded"]
    command += ["--sparsity", "0.6", "--samples", "8", "--seqlen", "128", "--solver", "wanda"]
    command += ["--out", out.name]  # the record has the command, so it must be the same
    out.parent.mkdir(exist_ok=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, *arguments], cwd=out.parent, **quiet)  # type: ignore[call-overload, no-any-return]


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != TIMINGS_FILE
    }


if __name__ == "__main__":
    main()
