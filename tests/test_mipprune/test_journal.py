"""A journal in whatever state a crash or a bad disk leaves it."""

import random

import pytest
import torch
from torch import nn

from mipprune.journal import _HEAD, FileJournal
from mipprune.models import Coverage, PrunableLayer
from mipprune.record import LayerResult, PrunedLayer, PruneReport

DECISIVE = ("mipprune", "torch", "numpy", "numba", "transformers", "device", "dtype", "threads")


def report():
    about = dict.fromkeys(DECISIVE, "as always")
    return PruneReport({"seed": 0}, {"sha256": "?"}, about, Coverage(72, 72), 0.0)


def layers():
    """Four layers, each with what was done to it; two with new weights."""
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        module = nn.Linear(6, 3, bias=False)
        module.weight.data = torch.randn(3, 6, generator=generator)
        name = f"blocks.{number}"
        result = LayerResult(
            name, 3, 6, 9, 0, 0.5, None, 1 / 3, 0.25, 0.5, 1 / 3, 0.1, "FEASIBLE", 0.01, {"n": 1}
        )
        mask = torch.rand(3, 6, generator=generator) < 0.5
        weight = module.weight.data * mask * 1.1 if number % 2 else None
        yield PrunableLayer(name, module), PrunedLayer(result, mask, weight)


def go_on(file):
    """How many layers a journal still has, after the run was gone through once more."""
    journal = FileJournal(file, {"model": "x"})
    finished = journal.begin(report())
    for layer, pruned in layers():
        again = finished.get(layer)
        if again is None:
            journal.finish(layer, pruned)
            continue
        assert again.result == pruned.result
        assert torch.equal(again.mask, pruned.mask)
        assert (again.weight is None) == (pruned.weight is None)
        assert again.weight is None or torch.equal(again.weight, pruned.weight)
    journal.close()
    return len(finished)


@pytest.fixture
def whole(tmp_path):
    """A journal's bytes, and where each of its records begins."""
    file = tmp_path / "whole"
    assert go_on(file) == 0
    content, begins = file.read_bytes(), [0]
    while begins[-1] < len(content):
        begins.append(begins[-1] + _HEAD.size + _HEAD.unpack_from(content, begins[-1])[1])
    assert len(begins) == 6
    return content, begins


def test_a_last_record_cut_short_at_any_byte_is_written_again(tmp_path, whole):
    content, begins = whole
    file = tmp_path / "journal"
    for length in range(begins[-2], len(content)):
        file.write_bytes(content[:length])
        assert go_on(file) == 3
        assert file.read_bytes() == content
    for records, length in enumerate(begins):
        file.write_bytes(content[:length])
        assert go_on(file) == max(0, records - 1)
        assert file.read_bytes() == content


def test_damaged_bytes_cost_what_follows_them_and_no_more(tmp_path, whole):
    content, begins = whole
    file, chance = tmp_path / "journal", random.Random(0)
    places = [start + at for start in begins[:-1] for at in range(_HEAD.size)]
    places += [chance.randrange(len(content)) for _ in range(300)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        before = sum(begin <= place for begin in begins) - 1
        assert go_on(file) == max(0, before - 1)
        assert file.read_bytes() == content


def test_what_is_no_journal_is_begun_anew(tmp_path, whole):
    file = tmp_path / "journal"
    for content in (b"", b"mipj", b"\xff" * 1000, whole[0][1:]):
        file.write_bytes(content)
        assert go_on(file) == 0
        assert file.read_bytes() == whole[0]
