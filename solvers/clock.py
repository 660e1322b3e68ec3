"""How much time a search has left."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from torch import Tensor

from .arrays import number, short
from .errors import InvalidInput


def _seconds(value: Any) -> float:
    """A number of any kind, also an array or a tensor without dimensions; or `InvalidInput`."""
    try:
        if isinstance(value, (np.ndarray, np.generic, Tensor)):
            return number(value, "time_limit")
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise TypeError
        return float(value)
    except InvalidInput:
        raise
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InvalidInput(f"time_limit={short(value)} is no number; give seconds.") from None


class Clock:
    """Seconds since a search began, and whether its time is up.

    Parameters
    ----------
    time_limit
        Seconds; None or infinity for no limit.

    Raises
    ------
    InvalidInput
        If the limit is not a positive number.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        if time_limit is not None:
            time_limit = _seconds(time_limit)
            if not time_limit > 0:
                raise InvalidInput(
                    f"Time limit {time_limit} s leaves no time; give a positive number."
                )
        self._began = time.perf_counter()
        self._limit = math.inf if time_limit is None else time_limit

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    @property
    def remaining(self) -> float:
        """Seconds left, 0 at least; infinite without a limit."""
        return max(0.0, self._limit - self.seconds)

    @property
    def limit(self) -> float | None:
        """What is left as the ``time_limit`` of another solver; None without a limit."""
        return None if math.isinf(self._limit) else max(1e-9, self.remaining)

    @property
    def expired(self) -> bool:
        """Whether the limit has passed."""
        return self.seconds >= self._limit

    def part(self, share: float, most: float = math.inf, least: float = 0.0) -> Clock:
        """A clock that starts now and has a share of the time left.

        ``least`` seconds at least, if there are so many left, and ``most`` at most.
        """
        part = Clock()
        remaining = self.remaining
        part._limit = min(max(share * remaining, least), remaining, most)
        return part
