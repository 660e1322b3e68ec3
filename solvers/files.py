"""Files appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_on_success(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _beside(target) as holder:
        temporary = holder / target.name
        yield temporary
        give_usual_permissions(temporary)
        os.replace(temporary, target)


def give_usual_permissions(path: Path) -> None:
    """Files as the user's umask wants them; some writers leave them readable by nobody else."""
    mask = os.umask(0)
    os.umask(mask)
    files = path.rglob("*") if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def to_disk(path: Path) -> None:
    """Have a file's or folder's content on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers left in a folder when their process was killed.

    These are the folders of `replaced_on_success`, and the files that safetensors writes before
    it renames them.
    """
    for holder in folder.glob(".*.tmp"):
        shutil.rmtree(holder)
    for file in folder.glob(".tmp*"):
        file.unlink()


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A private folder on the target's file system, so that a rename is atomic."""
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield holder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
