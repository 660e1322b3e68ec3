"""What the benchmarks share: where layers lie, and how results are written."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from solvers.files import replaced_on_success

RESULTS = Path(__file__).parent / "results"
LAYERS = Path(__file__).parents[2] / "shared" / "layers"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--layers", type=Path, default=LAYERS, help="folder of problem files")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return found


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba"),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write(out: Path, name: str, record: dict[str, Any]) -> None:
    """Write ``name.json``."""
    with replaced_on_success(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")
    print(f"Written: {out / name}.json")
