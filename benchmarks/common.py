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
from matplotlib.figure import Figure

from solvers.files import replaced_on_success

RESULTS = Path(__file__).parent / "results"
LAYERS = Path(__file__).parents[2] / "shared" / "layers"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--layers", type=Path, default=LAYERS, help="folder of problem files")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return found


def parse_tier(options: argparse.ArgumentParser) -> tuple[argparse.Namespace, str]:
    """The arguments, and where to run: "cuda" or "cpu", as told or as there is a GPU."""
    options.add_argument("--tier", choices=["cpu", "cuda"], help="default: cuda if there is a GPU")
    arguments = options.parse_args()
    tier = arguments.tier or ("cuda" if torch.cuda.is_available() else "cpu")
    if tier == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No CUDA GPU is at hand; run --tier cpu.")
    if tier == "cpu":
        print("The CPU's tier. The GPU's runs where a CUDA GPU is at hand.")
    return arguments, tier


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


def draw(figure: Figure, path: Path) -> None:
    """Write a plot as PNG."""
    with replaced_on_success(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    print(f"Written: {path}")
