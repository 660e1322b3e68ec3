"""Settings of the whole process, changed for a while by whoever needs it, from any thread.

Threads that save, change and restore such a setting each for itself overtake each other: the one
that leaves last restores what another had set. Here the first one in changes the setting, and the
last one out restores it, in whatever order they come and go, and whatever they raise.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch


class SharedSetting:
    """A change of the process that lasts as long as anyone holds it.

    Parameters
    ----------
    change
        Makes it, and returns what takes it back.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._holders = 0
        self._take_back: Callable[[], None] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """With the change made."""
        with self._lock:
            if self._holders == 0:
                self._take_back = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._take_back is not None:
                    take_back, self._take_back = self._take_back, None
                    take_back()


def _limit_blas() -> Callable[[], None]:
    from threadpoolctl import threadpool_limits

    limits = threadpool_limits(1, user_api="blas")
    restore: Callable[[], None] = limits.restore_original_limits
    return restore


_ONE_BLAS_THREAD = SharedSetting(_limit_blas)


def one_blas_thread() -> AbstractContextManager[None]:
    """One BLAS thread, where threads solve side by side or more would only wait for each other."""
    return _ONE_BLAS_THREAD.held()


class _Precision:
    """Which precision of float32 matrix products is in force, and who relies on it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0
        self._held = self._before = ""

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """With this precision; waits while another one is held."""
        with self._changed:
            while self._holders and self._held != name:
                self._changed.wait()
            if self._holders == 0:
                self._held, self._before = name, torch.get_float32_matmul_precision()
                if name != self._before:
                    torch.set_float32_matmul_precision(name)
            self._holders += 1
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                if self._holders == 0:
                    if name != self._before:
                        torch.set_float32_matmul_precision(self._before)
                    self._changed.notify_all()


_PRECISION = _Precision()


def matmul_precision(name: str, device: torch.device) -> AbstractContextManager[None]:
    """Float32 matrix products on a device in this precision, for one product.

    The CPU has no other than float32 and is left alone. Elsewhere a thread that wants another
    precision waits until the holders of this one are done, so that one must not hold two.

    Parameters
    ----------
    name
        As for `torch.set_float32_matmul_precision`.
    device
        Where the product is computed.
    """
    return nullcontext() if device.type == "cpu" else _PRECISION.held(name)


def _ignore(message: str) -> Callable[[], None]:
    """Add a filter of warnings to those of the process."""
    warnings.filterwarnings("ignore", message=message)
    lists = [warnings.filters]
    item = warnings.filters[0]

    def take_back() -> None:
        # `warnings.catch_warnings` puts a copy in the place of the list and brings the list back
        # later: the filter is taken from both.
        for filters in (*lists, warnings.filters):
            if item in filters:
                filters.remove(item)  # type: ignore[attr-defined]

    return take_back


@cache
def _ignored(message: str) -> SharedSetting:
    return SharedSetting(lambda: _ignore(message))


def quiet_warnings(message: str) -> AbstractContextManager[None]:
    """Without the warnings that match, in all threads, for they share their filters.

    `warnings.catch_warnings` brings back the filters that it found, which in threads that overlap
    may be another's.

    Parameters
    ----------
    message
        Regular expression for the beginning of the text.
    """
    return _ignored(message).held()
