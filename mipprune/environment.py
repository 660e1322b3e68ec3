"""Versions and machine, for the records of runs."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn


def environment(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Versions of ours, torch, NumPy, numba and ``packages``; machine, device and time."""
    names = dict.fromkeys(["mipprune", "torch", "numpy", "numba", *packages])
    return {
        **{name: _version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def model_environment(model: nn.Module, device: torch.device | None = None) -> dict[str, Any]:
    """The record's environment, with the type that the model computes in."""
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    return {**environment(device or parameter.device, ["transformers"]), "dtype": dtype}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
