"""The best point so far, and what it rules out."""

from __future__ import annotations

import math
from collections.abc import Callable

from .domain import Floats


class Incumbent:
    """Best feasible point found.

    Parameters
    ----------
    rel_gap, abs_gap
        A node is given up when its bound comes this close to the best value.
    improved
        Called after every improvement.
    """

    def __init__(
        self, rel_gap: float, abs_gap: float, improved: Callable[[], None] | None = None
    ) -> None:
        self.x: Floats | None = None
        self.value = math.inf
        self._rel_gap, self._abs_gap = rel_gap, abs_gap
        self._improved = improved

    @property
    def tolerance(self) -> float:
        """Gap at which the search may stop."""
        if self.value == math.inf:
            return self._abs_gap
        return max(self._abs_gap, self._rel_gap * abs(self.value))

    @property
    def cutoff(self) -> float:
        """Nodes whose bound reaches this hold nothing better than the tolerance."""
        return self.value - self.tolerance

    def offer(self, x: Floats, value: float) -> None:
        """Take a feasible point if it is better."""
        if value < self.value:
            self.x, self.value = x.copy(), value
            if self._improved is not None:
                self._improved()
