"""The folder of a run that is not finished, beside the output that it becomes.

It appears when all checks are passed, belongs to one process at a time, survives whatever kills
that process, and is gone when the output stands.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from solvers import InvalidInput
from solvers.files import give_usual_permissions, remove_leftovers, to_disk

from .checkpoint import check_new
from .errors import Interrupted
from .journal import FileJournal, Finished
from .record import PruneReport

_NO_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM
}  # fmt: skip


_COMPLETE = "complete"
"""File that says that the model is whole and only has to be renamed."""


class Busy(InvalidInput):
    """Another process works on this output."""


class WorkFolder:
    """Journal and unfinished model of one output.

    Parameters
    ----------
    out
        The output folder, which must not exist.
    resume
        Go on with what is there, if anything is.

    Raises
    ------
    InvalidInput
        If the output exists or cannot be written, if there is an unfinished run and ``resume`` is
        false, or if another process works on it.
    """

    def __init__(self, out: str | Path, resume: bool = False) -> None:
        self.out = Path(out).expanduser()
        self.path = self.out.absolute().with_name(f"{self.out.absolute().name}.partial")
        self.model = self.path / "model"
        self._lock: IO[Any] | None = None
        self._journal: FileJournal | None = None
        self._created = False
        there = self.path.exists()
        emptied = there and self.out.exists() and not any(self.path.iterdir())
        if there and resume:
            self._take()
            remove_leftovers(self.model)
        self.finished = there and resume and (emptied or (self.path / _COMPLETE).exists())
        if self.finished:
            self._rename()
            return
        check_new(out)
        if there and not resume:
            raise InvalidInput(
                f"{self.path} holds an unfinished run; give --resume to go on with it, "
                "or remove that folder."
            )

    def journal(self, what: dict[str, Any]) -> FileJournal:
        """A journal that makes this folder when the run begins."""
        self._journal = _FolderJournal(self, what)
        return self._journal

    def create(self) -> None:
        """Make the folder and take it, unless it was there."""
        if self._lock is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir()
        except FileExistsError:
            raise Busy(f"Another process has just begun to write {self.out}.") from None
        self._created = True
        self._take()

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Say what became of the run when it cannot go on; a refused one leaves nothing."""
        try:
            yield
        except InvalidInput as error:
            if self._created and not isinstance(error, Interrupted):
                self._remove()
            raise
        except Exception as error:
            reason = _storage_trouble(error)
            if reason is None:
                raise
            raise Interrupted(
                f"{self.out} cannot be written ({reason}); mend that and go on with --resume."
            ) from error
        finally:
            self._release()

    def publish(self) -> None:
        """Turn the finished model into the output."""
        give_usual_permissions(self.model)
        for path in (*self.model.rglob("*"), self.model):
            to_disk(path)
        (self.path / _COMPLETE).touch()
        self._rename()

    def _rename(self) -> None:
        if self.model.exists():
            os.replace(self.model, self.out)
            to_disk(self.out.absolute().parent)
        self._remove()

    def _take(self) -> None:
        self._lock = (self.path / "lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release()
            raise Busy(f"Another process is at work on {self.path}.") from None

    def _release(self) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _remove(self) -> None:
        """Remove the folder, and last what says that the model was whole."""
        shutil.rmtree(self.model, ignore_errors=True)
        for name in ("journal", "lock", _COMPLETE):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)
        self._release()


class _FolderJournal(FileJournal):
    def __init__(self, work: WorkFolder, what: dict[str, Any]) -> None:
        super().__init__(work.path / "journal", what)
        self._work = work

    def begin(self, report: PruneReport) -> Finished:
        self._work.create()
        return super().begin(report)


def _storage_trouble(error: Exception) -> str | None:
    """The file system's complaint behind an error, if that is what it is."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno in _NO_STORAGE:
        return os.strerror(error.errno).lower()
    if isinstance(error, SafetensorError) and (code := re.search(r"os error (\d+)", str(error))):
        return os.strerror(int(code[1])).lower()
    return None
