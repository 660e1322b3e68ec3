"""Runs that write folders: what they begin with, how they are cut off, what they leave."""

from contextlib import contextmanager

import pytest
import torch

import mipprune
from mipprune.checkpoint import TIMINGS_FILE
from mipprune.journal import FileJournal


def save_source(model, folder):
    """A model's folder, by name; its tokenizer is another model's and not used."""
    model.save_pretrained(folder)
    mipprune.load_model("embedded", torch.device("cpu")).tokenizer.save_pretrained(folder)
    return str(folder)


def content(folder):
    """The bytes of all files by name, but for the times."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != TIMINGS_FILE)
    return {path.name: path.read_bytes() for path in files}


@contextmanager
def interrupted(after=1):
    """A run in here is interrupted when so many layers are finished."""
    finish, left = FileJournal.finish, [after]

    def crash(self, layer, pruned):
        finish(self, layer, pruned)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileJournal, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            yield
