"""Kill a run at random moments, resume it, and compare the folder with the uninterrupted run's.

The embedded model is pruned by the command line in a process of its own (forked from one that has
imported what takes long), which gets SIGKILL: once before its journal begins, within each tenth of
its layers (a random moment after a random record of the journal), and after the last layer, while
the output is written. What is left is resumed, and every file but the times must be the same, byte
for byte. So for masks alone, for corrected weights, for a model that is read and written block by
block, for one pruned stage by stage towards the dense model's outputs, and for inputs reordered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from typing import Any

from common import RESULTS, write

from mipprune.checkpoint import RECORD_FILE, TIMINGS_FILE
from mipprune.journal import _HEAD

SHARED = ["--sparsity", "0.6", "--solver", "wanda"]
UPDATED = [*SHARED, "--update", "least_squares"]
RUNS = {
    "masks": SHARED,
    "weights": UPDATED,
    "streamed": [*SHARED, "--stream"],
    "sequential": [*UPDATED, "--grams", "sequential", "--targets", "stream:0.5"],
    "permuted": ["--pattern", "2:4", "--solver", "wanda", "--permute", "neurons"],
}
SERVER = multiprocessing.get_context("forkserver")
IMPORTED = ["mipprune.cli", "mipprune.job", "mipprune.demo", "numba"]
IMPORTED += ["transformers.models.llama.modeling_llama"]
_TRIES = 5
"""For a kill that came when the run had finished already."""


@dataclass(frozen=True)
class Times:
    """Seconds until an uninterrupted run had its first record, its last one, and its output."""

    first: float
    last: float
    end: float
    records: int


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kills", type=int, default=10, help="per run, within its layers")
    options.add_argument("--writing", type=int, default=2, help="per run, after its last record")
    options.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=RESULTS)
    arguments = options.parse_args()
    chance = random.Random(arguments.seed)
    SERVER.set_forkserver_preload(IMPORTED)
    record: dict[str, Any] = {"runs": {}}
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as scratch:
            record["runs"][name] = interrupted(Path(scratch), RUNS[name], arguments, chance)
    runs = record["runs"].values()
    record["kills"] = sum(len(run["kills"]) for run in runs)
    record["identical"] = sum(kill["identical"] for run in runs for kill in run["kills"])
    write(arguments.out, "kill_resume", record)
    if record["identical"] < record["kills"]:
        raise SystemExit("Not all resumed runs are the same.")


def interrupted(
    scratch: Path, said: list[str], arguments: argparse.Namespace, chance: random.Random
) -> dict[str, Any]:
    """A run without and with kills."""
    whole = scratch / "whole" / "pruned"
    ended(begin(whole, said))  # compiles what is compiled once
    shutil.rmtree(whole)
    times = uninterrupted(whole, said)
    expected = digests(whole)
    parts = [times.records * part / arguments.kills for part in range(arguments.kills + 1)]
    points = [0.0, *(chance.uniform(*part) for part in pairwise(parts))]
    points += [float(times.records)] * arguments.writing
    kills = []
    for number, point in enumerate(points):
        out, found = killed(scratch / f"{number}", said, int(point), chance, times)
        assert ended(begin(out, [*said, "--resume"])) == 0
        kills.append({**found, "identical": digests(out) == expected})
        print(kills[-1], flush=True)
        shutil.rmtree(out.parent)
    return {"options": said, "times": vars(times), "files": expected, "kills": kills}


def uninterrupted(out: Path, said: list[str]) -> Times:
    began = time.perf_counter()
    process = begin(out, said)
    journal = journal_of(out)
    seen: list[float] = []
    size, end = 0, 0.0
    while process.is_alive():
        now, elapsed = journal_size(journal), time.perf_counter() - began
        if now > size:
            size = now
            seen.append(elapsed)
        if not end and out.exists() and not journal.parent.exists():
            end = elapsed
        time.sleep(0.001)
    assert process.exitcode == 0
    layers = json.loads((out / RECORD_FILE).read_text())["layers"]
    return Times(seen[0], seen[-1], end, len(layers) + 1)


def killed(
    parent: Path, said: list[str], wanted: int, chance: random.Random, times: Times
) -> tuple[Path, dict[str, Any]]:
    """Kill a run at a random moment between that record of its journal and the next."""
    if wanted == 0:
        span = times.first
    elif wanted < times.records:
        span = (times.last - times.first) / times.records
    else:
        span = times.end - times.last
    for attempt in range(_TRIES):
        out = parent / f"{attempt}" / "pruned"
        journal = journal_of(out)
        wait = chance.uniform(0, span)
        process = begin(out, said)
        while process.is_alive() and records(journal) < wanted:
            time.sleep(0.001)
        time.sleep(wait)
        process.kill()
        if (ended(process) == -signal.SIGKILL and journal.parent.exists()) or wanted == 0:
            left = max(0, records(journal) - 1)
            return out, {"record": wanted, "seconds_later": wait, "layers_finished": left}
    raise SystemExit(f"The run was over before it could be killed, {_TRIES} times.")


def begin(out: Path, said: list[str]) -> Process:
    command = ["mipprune", "prune", "embedded", "--quiet"]
    command += ["--samples", "8", "--seqlen", "128", *said]
    command += ["--out", out.name]  # the record has the command, so it must be the same
    out.parent.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=run, args=(command, out.parent))
    process.start()
    return process


def run(command: list[str], folder: Path) -> None:
    from mipprune.cli import main

    os.chdir(folder)
    sys.argv = command
    main()


def ended(process: Process) -> int | None:
    process.join()
    return process.exitcode


def journal_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial") / "journal"


def journal_size(journal: Path) -> int:
    try:
        return journal.stat().st_size
    except FileNotFoundError:
        return 0


def records(journal: Path) -> int:
    """Whole records of a journal, the one of the settings included."""
    count, end = 0, 0
    try:
        with journal.open("rb") as file:
            size = journal.stat().st_size
            while len(head := file.read(_HEAD.size)) == _HEAD.size:
                end = file.seek(_HEAD.unpack(head)[1], 1)
                count += end <= size
    except FileNotFoundError:
        return 0
    return count


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != TIMINGS_FILE
    }


if __name__ == "__main__":
    main()
