"""The progress table of a search."""

from __future__ import annotations

from .oracle import Oracle
from .solution import HullProgress

_EVERY = 100
"""Nodes between two lines."""


class Table:
    """Prints a line every hundred nodes, and one marked ``*`` for each better point."""

    def __init__(self) -> None:
        self._shown = -_EVERY
        print(
            f"  {'nodes':>8} {'open':>8} {'bound':>14} {'best':>14} {'gap':>9} "
            f"{'oracle':>9} {'seconds':>8}"
        )

    def show(self, progress: HullProgress, oracle: Oracle, improved: bool) -> None:
        """Print the state if it is time to."""
        if not improved and progress.nodes < self._shown + _EVERY:
            return
        self._shown = progress.nodes
        gap = progress.objective - progress.bound
        print(
            f"{'*' if improved else ' '} {progress.nodes:8d} {progress.open:8d} "
            f"{progress.bound:14.7g} {progress.objective:14.7g} {gap:9.2e} "
            f"{oracle.calls + oracle.relaxed_calls:9d} {progress.time:8.1f}"
        )
