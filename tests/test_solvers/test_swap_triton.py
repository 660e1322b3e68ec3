"""The Triton kernels, interpreted on the CPU (on the GPU with TRITON_INTERPRET=0)."""

import builtins
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import KINDS, make_problem, problems, random_mask, single_swaps
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.swap import search
from solvers.swap.rows import ScaledRows, largest_correlation

pytest.importorskip("triton")
from solvers.swap import triton as kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]


def on_device(problem):
    linear = None if problem.linear is None else problem.linear.to(DEVICE)
    return MaskProblem(problem.weight.to(DEVICE), problem.gram.to(DEVICE), problem.pattern, linear)


def both(problem, **options):
    """The same search by the reference kernel and by the Triton kernel."""
    return tuple(
        solve(on_device(problem), "swap", kernel=kernel, **options)
        for kernel in ("torch", "triton")
    )


def assert_same(problem, **options):
    reference, found = both(problem, **options)
    assert torch.equal(found.mask, reference.mask)
    for name in ("swaps", "swaps_across_rows", "passes"):
        assert found.stats[name] == reference.stats[name]
    left = reference.stats["best_swap_left"]
    assert found.stats["best_swap_left"] == pytest.approx(left, rel=0, abs=1e-14, nan_ok=True)
    assert found.status is reference.status
    assert found.stats["kernel"] == "triton"
    return found


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        *itertools.product([PerRow(sparsity=0.6)], KINDS),
        *itertools.product(PATTERNS[1:], ["ties", "zero columns", "linear"]),
    ],
    ids=str,
)
def test_the_reference_kernels_swaps(pattern, kind):
    assert_same(make_problem(2, 16, pattern, kind, seed=5))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "d", "pattern"),
    [
        (9, 21, PerRow(sparsity=0.6)),  # two blocks of rows, one of them a single row
        (1, 65, PerRow(sparsity=0.3)),  # one more than a power of two; the pruned side is smaller
        (2, 36, NM(keep=4, group=6)),
        (2, 48, NM(keep=1, group=16)),
    ],
    ids=str,
)
def test_shapes_that_tiles_do_not_divide(rows, d, pattern, dtype):
    found = assert_same(make_problem(rows, d, pattern, seed=2), dtype=dtype)
    assert found.status is Status.LOCAL_OPTIMUM
    assert found.stats["swaps"] > 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_candidate_is_the_best_swap(pattern):
    assert_same(make_problem(2, 24, pattern, seed=9), candidates=1, max_passes=3)


@pytest.mark.parametrize("pattern", [PerRow(keep=8), NM(keep=4, group=8)], ids=str)
def test_exact_ties_go_to_the_lower_index(pattern):
    """Weights of one size and a Gram matrix of small integers: all values are exact and tie."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (3, 16), generator=generator) * 2.0 - 1
    gram = torch.eye(16).repeat_interleave(2, 0)[:16] @ torch.eye(16).repeat_interleave(2, 0)[:16].T
    problem = MaskProblem(signs, gram, pattern)
    start = torch.arange(16).expand(3, 16) % 8 < 4
    found = assert_same(problem, start=start)
    numba = solve(problem, "swap", kernel="numba", start=start)
    assert torch.equal(found.mask.cpu(), numba.mask)
    assert found.stats["swaps"] > 0


@settings(max_examples=10)
@given(problem=problems(max_rows=2, max_inputs=6), dtype=st.sampled_from(["float32", "float64"]))
def test_no_improving_single_swap_is_left(problem, dtype):
    start = random_mask(problem)
    solution = solve(on_device(problem), "swap", start=start, kernel="triton", dtype=dtype)
    assert solution.status is Status.LOCAL_OPTIMUM
    after = single_swaps(problem, solution.mask.cpu())
    size = float((problem.weight.double() ** 2 * problem.gram.diagonal().double()).sum())
    size += 0 if problem.linear is None else float(problem.linear.abs().sum())
    loss = float(solution.objective.sum())
    if len(after):
        slack = 1e-10 * float(solution.objective.abs().sum()) + 1e-12 * size
        assert float(after.min()) >= loss - slack
    assert loss <= float(problem.objective(start).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("block", "step", "tile"), [(1, 1, 16), (2, 8, 32), (4, 2, 128)])
def test_tiles_do_not_matter(monkeypatch, block, step, tile, dtype):
    rows = ScaledRows.of(on_device(make_problem(5, 40, PerRow(sparsity=0.5), seed=6)))
    mask = torch.arange(40, device=DEVICE).expand(5, 40) % 2 == 0
    index = torch.arange(5, device=DEVICE)
    results = []
    for _ in range(2):
        kernel = kernels.TritonKernel(rows, 40, 16, 1e-10, dtype)
        state = kernels._State(rows, mask, dtype)
        kernel._swap(state, index, None)
        results.append(kernel._scan(state, index))
        monkeypatch.setattr(kernels, "_ROWS", block)
        monkeypatch.setattr(kernels, "_STEP", step)
        monkeypatch.setattr(kernels.TritonKernel, "_tile", lambda self, blocks: (tile, 1))
    whole, tiled = results
    threshold = -1e-10 * float(rows.loss(mask, rows.correlation(mask)).max())
    assert torch.equal(whole.isfinite(), tiled.isfinite())
    assert torch.equal(whole.clamp_max(threshold), tiled.clamp_max(threshold))


@pytest.mark.parametrize("kind", ["plain", "linear", "spread", "ties"])
@pytest.mark.parametrize("width", [32, 8])
def test_float32_leaves_no_improvement_unexamined(width, kind):
    """What is not evaluated again has no improving pair in float64, and the rest is exact."""
    problem = make_problem(4, 32, PerRow(sparsity=0.5), "plain" if kind == "spread" else kind)
    if kind == "spread":
        scale = torch.logspace(-9, 0, 32, dtype=torch.float64)
        problem = MaskProblem(
            problem.weight * scale.flip(0) ** 0.5,
            problem.gram * scale * scale[:, None],
            problem.pattern,
        )
    rows = ScaledRows.of(on_device(problem))
    mask = random_mask(problem).to(DEVICE)
    index = torch.arange(4, device=DEVICE)
    kernel = kernels.TritonKernel(rows, width, 16, 1e-10, torch.float32)
    state = kernels._State(rows, mask, torch.float32)
    kernel._swap(state, index, None)
    exact = kernel._recheck(state, index, kernel._scan(state, index))

    cost = rows.flip_cost(mask, rows.correlation(mask))
    pair = 2 * rows.weight[:, :, None] * rows.weight[:, None] * rows.gram
    value = cost[:, :, None] + cost[:, None] - pair
    block = torch.arange(32, device=DEVICE) // width
    scalar = (mask == state.scalar_kept.bool()[:, None])[:, :, None]
    allowed = scalar & ~scalar.transpose(1, 2) & (block[:, None] == block)
    best = value.where(allowed, torch.inf).amin(dim=1)
    examined = exact.isfinite()
    assert bool((best[~examined] >= 0).all())
    assert torch.allclose(exact[examined], best[examined], rtol=1e-12, atol=1e-12)
    assert bool(examined.any())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_limits_are_said_and_a_search_goes_on(monkeypatch, pattern):
    problem = make_problem(2, 24, pattern, seed=6)
    start, problem = random_mask(problem), on_device(problem)
    options = {"start": start, "candidates": 1, "max_passes": 2}
    solution = solve(problem, "swap", kernel="triton", **options)
    assert solution.status is Status.ITERATION_LIMIT
    assert math.isnan(solution.stats["best_swap_left"])
    monkeypatch.setattr("solvers.swap.search._PASSES_PER_CALL", 2)
    full = solve(problem, "swap", start=solution.mask, kernel="triton")
    assert full.status is Status.LOCAL_OPTIMUM
    assert float(full.objective.sum()) < float(solution.objective.sum())


def test_calls_on_parts_of_the_rows_change_nothing(monkeypatch):
    problem = on_device(make_problem(3, 12, PerRow(sparsity=0.5), seed=1))
    whole = solve(problem, "swap", kernel="triton")
    monkeypatch.setattr(kernels, "_BYTES_PER_CALL", 1)
    assert torch.equal(solve(problem, "swap", kernel="triton").mask, whole.mask)


def test_the_largest_correlation_of_each_input():
    gram = make_problem(1, 12, PerRow(keep=1), "zero columns").gram
    scale = gram.diagonal().clamp_min(1e-300).rsqrt()
    correlation = (gram * scale * scale[:, None]).abs().fill_diagonal_(0)
    found = largest_correlation(gram)
    assert bool((found >= correlation.amax(dim=0)).all())
    assert torch.allclose(found, correlation.amax(dim=0), rtol=1e-11)


def test_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(InvalidInput, match="CUDA"):
        solve(make_problem(2, 4, PerRow(sparsity=0.5)), "swap", kernel="triton")


def test_a_gpu_without_triton_is_said_once(monkeypatch):
    real = builtins.__import__

    def without_triton(name, *arguments, **options):
        if name == "triton":
            raise ImportError("no triton here")
        return real(name, *arguments, **options)

    gpu = torch.device("cuda")
    assert search._kernel_for(gpu) == "triton"
    monkeypatch.setattr(builtins, "__import__", without_triton)
    search._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install triton"):
        assert search._kernel_for(gpu) == "torch"
    assert search._kernel_for(gpu) == "torch"  # a second warning would be an error
    with pytest.raises(InvalidInput, match="pip install triton"):
        solve(make_problem(2, 4, PerRow(sparsity=0.5)), "swap", kernel="triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from solvers.swap import triton as kernels

KINDS = {
    "*i64": "active slots indices",
    "*i32": "order count applied",
    "*u8": "keep hopeful scalar_kept",
    "*fp64": "correlation linear noise loss least tolerance diagonal rho",
    "i32": "n d length width candidates",
}
NAMED = {name: kind for kind, names in KINDS.items() for name in names.split()}

def compiled(kernel, double, **sizes):
    kinds = dict(NAMED, **{name: "*fp64" for name in double.split()})
    signature = {
        name: "constexpr" if name in sizes else kinds.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

tile = dict(rows=kernels._ROWS, step=kernels._STEP)
for kernel, double, sizes in (
    (kernels._pack, "", dict(tile, size=128)),
    (kernels._scan_rows, "", dict(tile, tile=512)),
    (kernels._scan_blocks, "", dict(tile=512)),
    (kernels._recheck, "gram weight best", dict(tile=512)),
    (kernels._swap, "gram weight", dict(size=128)),
):
    ptx = compiled(kernel, double, **sizes).asm["ptx"]
    assert "tf32" not in ptx and "tensor" not in ptx, kernel
"""


def test_the_kernels_compile_for_a_gpu():
    """What the interpreter accepts, a compiler need not; no GPU is needed for compiling."""
    if sys.platform != "linux":
        pytest.skip("compiles on Linux only")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
