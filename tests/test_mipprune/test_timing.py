import pytest
import torch

from mipprune.checkpoint import MASKS_FILE, save_masks
from mipprune.timing import shapes_2to4, time_2to4, time_layers
from solvers import NM, InvalidInput, PerRow


def masks_of(pattern, *shapes):
    return {
        f"layer{i}": pattern.round(torch.rand(shape, generator=torch.Generator().manual_seed(i)))
        for i, shape in enumerate(shapes)
    }


@pytest.fixture
def folder(tmp_path):
    masks = masks_of(NM(2, 4), (64, 128), (64, 128), (32, 64), (33, 64), (32, 96))
    save_masks(tmp_path / MASKS_FILE, masks)
    return tmp_path


def test_suitable_sizes_are_found_with_their_number(folder):
    found = shapes_2to4(folder)
    assert {shape: count for shape, (_, count) in found.items()} == {(64, 128): 2, (32, 64): 1}
    assert all(NM(2, 4).is_feasible(mask) for mask, _ in found.values())


def test_other_patterns_are_refused(tmp_path):
    save_masks(tmp_path / MASKS_FILE, masks_of(PerRow(sparsity=0.5), (64, 128)))
    with pytest.raises(InvalidInput, match="has no 2:4 layer"):
        shapes_2to4(tmp_path)


def test_every_size_is_timed_at_every_batch_and_checked(folder):
    called = []

    def milliseconds(product):
        called.append(product().shape)
        return float(len(called))

    shapes, cpu = shapes_2to4(folder), torch.device("cpu")
    timings = time_layers(shapes, (1, 8), torch.clone, milliseconds, cpu, torch.float32)
    assert [(t.outputs, t.inputs, t.layers, t.batch) for t in timings] == [
        (64, 128, 2, 1), (64, 128, 2, 8), (32, 64, 1, 1), (32, 64, 1, 8),
    ]  # fmt: skip
    assert (timings[1].dense, timings[1].sparse, timings[1].ratio) == (3.0, 4.0, 0.75)
    assert called[2] == (8, 64)
    with pytest.raises(AssertionError, match="is wrong"):
        time_layers(shapes, (1,), torch.zeros_like, milliseconds, cpu, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(folder):
    with pytest.raises(InvalidInput, match="only be timed on a CUDA GPU"):
        time_2to4(folder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_both_products_are_timed(folder):
    timings = time_2to4(folder, batches=(1, 64), repeats=5)
    assert len(timings) == 4
    assert all(timing.dense > 0 and timing.sparse > 0 for timing in timings)
