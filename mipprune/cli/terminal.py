"""What the command line prints on, and how it shows a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.status import Status

if TYPE_CHECKING:
    from ..observer import Observer
    from ..record import PruneReport

out = Console()
err = Console(stderr=True)


def phases(status: Status) -> Observer:
    """An observer that shows the current phase."""
    from ..observer import Observer

    class PhaseObserver(Observer):
        def phase(self, text: str) -> None:
            status.update(escape(text))

    return PhaseObserver()


def quiet_transformers() -> None:
    """Leave the terminal to our own progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def print_warnings(report: PruneReport) -> None:
    """Say what was out of the ordinary."""
    for warning in report.warnings:
        err.print(f"[yellow]Note:[/] {escape(warning)}", soft_wrap=True)
    dead = [layer for layer in report.layers if layer.dead_inputs]
    if dead:
        inputs = sum(layer.dead_inputs for layer in dead)
        err.print(
            f"[yellow]Note:[/] {inputs} inputs of {len(dead)} layers were always zero; "
            "their weights were pruned first.",
            soft_wrap=True,
        )
