"""Seconds for a whole run, shared out among its layers while they last."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping

from solvers import InvalidInput

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}

_LEAST = 1e-3
"""Seconds for a solver where none are left: it gives what it has at once."""

NOTE = (
    "Searches were ended by a time budget, so the masks depend on how fast the machine was; a "
    "repeat may choose others."
)


def parse_seconds(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1.5h`` in seconds.

    Raises
    ------
    InvalidInput
        If it is none of these, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    seconds = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if not seconds > 0:
        raise InvalidInput(
            f"'{text}' is no time; give seconds (90), minutes (10m) or hours (1.5h)."
        )
    return seconds


class TimeBudget:
    """What is left of a run's seconds, and each coming layer's part of it.

    What a layer's search costs is taken to grow as its rows times the square of its inputs, which
    is what an improving exchange of two weights costs times how many there are to make. From the
    seconds left, what forwards, Gram matrices and weight updates will take goes off, as far as
    the layers before tell; the rest is shared out by cost. A layer whose search ends by itself
    leaves its seconds to those after it.

    Parameters
    ----------
    seconds
        From now on.
    shapes
        ``(rows, inputs)`` of all layers that are still to be pruned, by name.
    """

    def __init__(self, seconds: float, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._costs = {name: float(rows) * inputs**2 for name, (rows, inputs) in shapes.items()}
        self._left = sum(self._costs.values())
        self._began = time.perf_counter()
        self._end = self._began + seconds
        self._solved = self._done = 0.0

    @classmethod
    def going_on(
        cls,
        seconds: float,
        passed: float,
        shapes: Mapping[str, tuple[int, int]],
        finished: Collection[str],
    ) -> TimeBudget:
        """Of a run, perhaps resumed: the unfinished layers have their part of all its seconds.

        Parameters
        ----------
        seconds
            For the run as a whole.
        passed
            Seconds since this part of it began.
        shapes, finished
            All layers that are pruned, and those that an earlier part finished.
        """
        whole = cls(seconds, shapes)
        to_do = {name: shape for name, shape in shapes.items() if name not in finished}
        rest = cls(seconds, to_do)
        share = rest._left / whole._left
        return cls(seconds * share - passed, to_do)

    def limit(self, layer: str) -> float:
        """Seconds for a layer's search, which begins now."""
        now = time.perf_counter()
        besides = (now - self._began - self._solved) / self._done if self._done else 0.0
        free = self._end - now - besides * self._left
        return max(_LEAST, free * self._costs[layer] / self._left)

    def spent(self, layer: str, seconds: float) -> None:
        """A layer's search is over, after so many seconds."""
        cost = self._costs.pop(layer)
        self._left -= cost
        self._done += cost
        self._solved += seconds
