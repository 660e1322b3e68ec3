"""What a run says while it goes on: a progress bar, lines for people, lines for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from solvers import InvalidInput

from .checkpoint import finite
from .observer import Observer
from .record import LayerResult

if TYPE_CHECKING:
    from rich.console import Console


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def begin(self, blocks: int, weights: int) -> None:
        for observer in self._observers:
            observer.begin(blocks, weights)

    def phase(self, text: str) -> None:
        for observer in self._observers:
            observer.phase(text)

    def layer(self, block: int, result: LayerResult) -> None:
        for observer in self._observers:
            observer.layer(block, result)

    def warning(self, text: str) -> None:
        for observer in self._observers:
            observer.warning(text)


class RunLog(Observer):
    """Appends JSON lines, each with "time" (UTC), "seconds" since the log was opened, "event".

    Parameters
    ----------
    stream
        Where to write; every line is flushed, so that a killed run leaves all it did.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.perf_counter()

    def event(self, event: str, /, **values: Any) -> None:
        """Write one line; not-a-number is written as null."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        seconds = round(time.perf_counter() - self._began, 3)
        line = {"time": now, "seconds": seconds, "event": event, **values}
        self._stream.write(json.dumps(finite(line), default=str, allow_nan=False) + "\n")
        self._stream.flush()

    def begin(self, blocks: int, weights: int) -> None:
        self.event("begin", blocks=blocks, weights=weights)

    def phase(self, text: str) -> None:
        self.event("phase", phase=text)

    def layer(self, block: int, result: LayerResult) -> None:
        values = asdict(result)
        values["solving"] = values.pop("seconds")
        self.event("layer", block=block, **values)

    def warning(self, text: str) -> None:
        self.event("warning", text=text)


@contextmanager
def run_log(path: Path | None) -> Iterator[RunLog | None]:
    """A log at the end of a file, closed with an "error" if the block fails; None without a path.

    Raises
    ------
    InvalidInput
        If the file cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        stream = path.expanduser().open("a", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"The log {path} cannot be written ({error.strerror}).") from error
    with stream:
        log = RunLog(stream)
        try:
            yield log
        except BaseException as error:
            log.event("error", kind=type(error).__name__, message=str(error))
            raise


class LineObserver(Observer):
    """A line for every layer."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def layer(self, block: int, result: LayerResult) -> None:
        ratio = (
            f"{result.loss / result.loss_reference:.3f} of wanda"
            if result.loss_reference > 0
            else "no loss"
        )
        note = f", {result.note}" if result.note else ""
        self._console.print(
            f"{result.name} [{result.rows} x {result.inputs}] {result.sparsity:.1%} removed, "
            f"loss {result.loss:.4g} ({ratio}), {result.relative_error:.2%} of the output, "
            f"{result.status.lower().replace('_', ' ')}, {result.seconds:.2f} s{note}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


@contextmanager
def progress(console: Console, runs: int = 1) -> Iterator[Callable[[str], Observer]]:
    """A progress bar with the time left; yields what makes an observer of a run out of its title.

    Parameters
    ----------
    console
        Where to draw it.
    runs
        Equally large runs that share the bar.
    """
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task("", total=None, loss="")

    class BarObserver(Observer):
        def __init__(self, title: str) -> None:
            self._loss, self._reference, self._blocks = 0.0, 0.0, 0
            bar.console.print(title, markup=False)

        def begin(self, blocks: int, weights: int) -> None:
            self._blocks = blocks
            if bar.tasks[0].total is None:
                bar.update(task, total=runs * weights)

        def phase(self, text: str) -> None:
            bar.update(task, description=text)

        def warning(self, text: str) -> None:
            bar.console.print(f"[yellow]Note:[/] {escape(text)}", soft_wrap=True)

        def layer(self, block: int, result: LayerResult) -> None:
            self._loss += result.loss
            self._reference += result.loss_reference
            share = f"{self._loss / self._reference:.3f} of wanda" if self._reference else ""
            bar.update(
                task,
                advance=result.rows * result.inputs,
                loss=f"block {block + 1}/{self._blocks}, loss {share}",
            )

    with bar:
        yield BarObserver
