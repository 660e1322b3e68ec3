"""What a factorisation will take here, so that none is begun that the clock does not allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_TRIAL = {"eigh": 320, "cholesky": 1024}
"""Sizes that are tried: a small factorisation takes more time per operation than a large one."""


def eigen_seconds(d: int) -> float:
    """About the seconds of an eigenvalue decomposition, float64 ``[d, d]`` on the CPU."""
    return _unit("eigh") * d**3


def cholesky_seconds(d: int) -> float:
    """About the seconds of a Cholesky factorisation, float64 ``[d, d]`` on the CPU."""
    return _unit("cholesky") * d**3


@cache
def _unit(name: str) -> float:
    """Seconds of a small one, divided by the cube of its size; the smaller of two."""
    factorise: Callable[[Tensor], object] = getattr(torch.linalg, name)
    d = _TRIAL[name]
    trial = torch.eye(d, dtype=torch.float64) + 1.0 / d
    took = []
    for _ in range(2):
        began = time.perf_counter()
        factorise(trial)
        took.append(time.perf_counter() - began)
    return min(took) / d**3
