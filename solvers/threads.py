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
from typing import Any

import torch


class SharedSetting:
    """A change of the process that lasts as long as anyone holds it.

    Parameters
    ----------
    change
        Makes it, and returns what takes it back. Called with the arguments of the first holder.
    """

    def __init__(self, change: Callable[..., Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._holders = 0
        self._take_back: Callable[[], None] | None = None

    @contextmanager
    def held(self, *arguments: Any) -> Iterator[None]:
        """With the change made."""
        with self._lock:
            if self._holders == 0:
                self._take_back = self._change(*arguments)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._take_back is not None:
                    take_back, self._take_back = self._take_back, None
                    take_back()


def _limited_per_thread(library: Any) -> bool:
    """Whether every thread has a limit of its own: OpenBLAS whose threads are OpenMP's."""
    layer = getattr(library, "threading_layer", None)
    return bool(library.internal_api == "openblas" and layer == "openmp")


def _set_threads(library: Any, count: int) -> None:
    """Set a library's number of threads, from any thread.

    threadpoolctl 3.8 lets one thread alone set that of OpenBLAS and ignores all others without a
    word, so that the last one out could not restore what the first one in had changed.
    """
    release = getattr(library, "clear_controlling_thread", None)
    if release is None:
        library.set_num_threads(count)
        return
    release(force=True)
    library.set_num_threads(count)
    release(force=True)


def _one_thread(libraries: list[Any]) -> Callable[[], None]:
    before = [library.num_threads for library in libraries]
    for library in libraries:
        _set_threads(library, 1)

    def take_back() -> None:
        for library, count in zip(libraries, before, strict=True):
            _set_threads(library, count)

    return take_back


_ONE_BLAS_THREAD = SharedSetting(_one_thread)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS thread, where threads solve side by side or more would only wait for each other."""
    from threadpoolctl import ThreadpoolController

    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in libraries if _limited_per_thread(library)]
    with _ONE_BLAS_THREAD.held([library for library in libraries if library not in own]):
        take_back = _one_thread(own)
        try:
            yield
        finally:
            take_back()


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
