import itertools
import math

import numpy as np
import pytest
import torch
from helpers import KINDS, make_problem, optimum, problems, random_mask, single_swaps
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.swap import passes
from solvers.swap.across import _pair_rows
from solvers.swap.cpu import CpuKernel, _scratch
from solvers.swap.rows import ScaledRows

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]
KERNELS = ["numba", "torch"]


def size_of(problem):
    """What rounding errors of an objective are measured against."""
    everything = (problem.weight.double() ** 2 * problem.gram.diagonal().double()).sum()
    return float(everything + (0 if problem.linear is None else problem.linear.abs().sum()))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60)
@given(problem=problems(max_rows=3, max_inputs=8), dtype=st.sampled_from(["float32", "float64"]))
def test_no_improving_single_swap_is_left(kernel, problem, dtype):
    start = random_mask(problem)
    solution = solve(problem, "swap", start=start, kernel=kernel, dtype=dtype)
    assert solution.status is Status.LOCAL_OPTIMUM
    after = single_swaps(problem, solution.mask)
    loss = float(solution.objective.sum())
    slack = 1e-10 * float(solution.objective.abs().sum()) + 1e-12 * size_of(problem)
    if len(after):
        assert float(after.min()) >= loss - slack
    assert loss <= float(problem.objective(start).sum())


@settings(max_examples=40)
@given(problem=problems(max_rows=2, max_inputs=6))
def test_between_its_start_and_the_optimum(problem):
    start = solve(problem, "wanda")
    loss = float(solve(problem, "swap", start=start.mask).objective.sum())
    assert optimum(problem) - 1e-12 * size_of(problem) <= loss <= float(start.objective.sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [PerRow(sparsity=0.5), NM(3, 6)], ids=str)
def test_twelve_inputs_against_enumeration(pattern, kind):
    problem = make_problem(2, 12, pattern, kind, seed=11)
    loss = float(solve(problem, "swap").objective.sum())
    least = optimum(problem)
    assert loss >= least - 1e-12 * size_of(problem)
    assert loss <= float(solve(problem, "wanda").objective.sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_improving_swap_is_left_on_larger_problems(kernel, pattern):
    problem = make_problem(12, 96, pattern, seed=2, dtype=torch.float32)
    solution = solve(problem, "swap", kernel=kernel)
    assert solution.status is Status.LOCAL_OPTIMUM
    assert solution.stats["swaps"] > 0
    assert solution.stats["best_swap_left"] >= -1e-9
    assert least_change(problem, solution.mask) >= -1e-9 * float(solution.objective.sum())


def least_change(problem, mask):
    """Change by the best allowed swap, from the formula with dense float64 matrices."""
    weight, gram = problem.weight.double(), problem.gram.double()
    c = weight.masked_fill(mask, 0.0) @ gram
    prune = (2 * weight * c + weight**2 * gram.diagonal()).where(mask, torch.inf)
    revive = (-2 * weight * c + weight**2 * gram.diagonal()).where(~mask, torch.inf)
    inside = prune[:, :, None] + revive[:, None] - 2 * weight[:, :, None] * weight[:, None] * gram
    if isinstance(problem.pattern, NM):
        group = torch.arange(problem.shape[1]) // problem.pattern.group
        inside = inside.where(group[:, None] == group, torch.inf)
    least = float(inside.min())
    if isinstance(problem.pattern, PerLayer):
        across = prune.amin(dim=1)[:, None] + revive.amin(dim=1)
        least = min(least, float(across.fill_diagonal_(torch.inf).min()))
    return least


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("candidates", [1, 16])
def test_kernels_choose_the_same_swaps(pattern, candidates):
    problem = make_problem(10, 64, pattern, seed=4)
    one, other = (
        solve(problem, "swap", kernel=kernel, candidates=candidates, dtype="float64")
        for kernel in KERNELS
    )
    assert torch.equal(one.mask, other.mask)
    assert one.stats["swaps"] == other.stats["swaps"]
    assert one.stats["passes"] == other.stats["passes"]


def test_one_candidate_is_the_best_swap_of_the_paper():
    problem = make_problem(4, 24, PerRow(sparsity=0.6), seed=9)
    mask = solve(problem, "wanda").mask
    solution = solve(problem, "swap", candidates=1, max_passes=3, dtype="float64")
    for r in range(4):
        row, keep = problem.rows([r]), mask[r].clone()
        for _ in range(3):
            pairs = list(
                itertools.product(
                    keep.nonzero().flatten().tolist(), (~keep).nonzero().flatten().tolist()
                )
            )
            losses = []
            for u, p in pairs:
                trial = keep.clone()
                trial[u], trial[p] = False, True
                losses.append(float(row.objective(trial[None])))
            best = min(range(len(pairs)), key=losses.__getitem__)
            if losses[best] < float(row.objective(keep[None])):
                keep[pairs[best][0]], keep[pairs[best][1]] = False, True
        assert torch.equal(solution.mask[r], keep)


def test_swaps_across_rows_change_row_counts_and_help():
    problem = make_problem(16, 32, PerLayer(sparsity=0.6), seed=1)
    start = PerRow(sparsity=0.6).round(problem.weight.abs())
    start = start if problem.pattern.is_feasible(start) else problem.pattern.round(start.double())
    solution = solve(problem, "swap", start=start)
    assert solution.stats["swaps_across_rows"] > 0
    assert int(solution.mask.sum()) == int(start.sum())
    assert len(set(solution.mask.sum(dim=1).tolist())) > 1
    inside_only = solve(
        MaskProblem(problem.weight, problem.gram, PerRow(keep=13)),
        "swap",
        start=PerRow(keep=13).round(problem.weight.abs()),
    )
    assert float(solution.objective.sum()) < float(inside_only.objective.sum())


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=9))
def test_row_pairs_are_disjoint_and_begin_with_the_best(costs):
    prune, revive = torch.tensor(costs, dtype=torch.float64).T
    pruner, reviver = _pair_rows(prune, revive)
    rows = torch.cat([pruner, reviver]).tolist()
    assert len(set(rows)) == len(rows)
    if len(costs) == 1:
        assert rows == []
        return
    best = min(float(prune[i] + revive[j]) for i, j in itertools.permutations(range(len(costs)), 2))
    assert float(prune[pruner[0]] + revive[reviver[0]]) == best


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pass_limit_is_said(kernel, pattern):
    problem = make_problem(6, 64, pattern, seed=6)
    solution = solve(problem, "swap", kernel=kernel, candidates=1, max_passes=2)
    assert solution.status is Status.ITERATION_LIMIT
    assert math.isnan(solution.stats["best_swap_left"])
    full = solve(problem, "swap", start=solution.mask, kernel=kernel)
    assert full.status is Status.LOCAL_OPTIMUM
    assert float(full.objective.sum()) < float(solution.objective.sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_time_limit_is_said(pattern):
    problem = make_problem(60, 64, pattern, seed=6)
    start = solve(problem, "wanda")
    solution = solve(problem, "swap", start=start.mask, time_limit=1e-9)
    assert solution.status is Status.TIME_LIMIT
    assert float(solution.objective.sum()) <= float(start.objective.sum())


def test_more_passes_than_one_call_makes(monkeypatch):
    monkeypatch.setattr("solvers.swap.search._PASSES_PER_CALL", 2)
    for pattern in PATTERNS:
        problem = make_problem(6, 64, pattern, seed=6)
        solution = solve(problem, "swap", candidates=1)
        assert solution.status is Status.LOCAL_OPTIMUM
        assert least_change(problem, solution.mask) >= -1e-9 * float(solution.objective.sum())


def test_chunks_of_the_difference_tensor_do_not_matter(monkeypatch):
    problem = make_problem(9, 32, PerRow(sparsity=0.5))
    whole = solve(problem, "swap", kernel="torch")
    monkeypatch.setattr("solvers.swap.dense._CHUNK_BYTES", 4096)
    assert torch.equal(solve(problem, "swap", kernel="torch").mask, whole.mask)


def test_dead_inputs_are_pruned_and_their_revival_is_no_improvement():
    problem = make_problem(5, 16, PerRow(sparsity=0.5), kind="zero columns")
    dead = problem.gram.diagonal() == 0
    assert int(dead.sum()) == 4
    solution = solve(problem, "swap")
    assert not bool(solution.mask[:, dead].any())


def test_scaled_rows_keep_the_loss():
    problem = make_problem(4, 12, PerRow(sparsity=0.5), kind="linear")
    mask = random_mask(problem)
    rows = ScaledRows.of(problem)
    loss = rows.loss(mask, rows.correlation(mask)) * rows.unit
    assert torch.allclose(loss, problem.objective(mask), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=8)
@given(d=st.integers(2, 200), sparsity=st.floats(0.2, 0.8), seed=st.integers(0, 10**6))
def test_scans_skip_only_hopeless_indices(kind, dtype, d, sparsity, seed):
    pattern = PerRow(sparsity=sparsity)
    problem = make_problem(3, d, pattern, kind, seed=seed)
    rows = ScaledRows.of(problem)
    mask = random_mask(problem)
    grams = CpuKernel(rows, d, 16, 1e-10, dtype)._grams[0]
    scratch = _scratch(3, grams)
    nothing = np.zeros(3, np.int64), np.zeros(3, np.int64), np.zeros(3), np.zeros(3)
    fixed = (rows.weight, rows.linear, mask, rows.noise)
    block = passes.Block(*(part.numpy() for part in fixed), *nothing)
    c = rows.correlation(mask)
    scratch.c[:] = c.numpy()
    cost = rows.flip_cost(mask, c)
    side = []
    for r in range(3):
        side.append(passes._begin(block, scratch, r))
        scratch.cost[r, :d] = cost[r].numpy()
        passes._only(scratch.cost[r], block.keep[r], not side[r], scratch.outer)
        passes._choose(block, grams, scratch, r, side[r])
    scratch.best[:] = passes.BIG
    passes.scan_tiles(
        grams.scan, scratch.twice, scratch.best, scratch.scalar, scratch.terms, scratch.listed,
        np.arange(3),
    )  # fmt: skip
    for r in range(3):
        w = rows.weight[r]
        pairs = cost[r, :, None] + cost[r] - 2 * w[:, None] * w * rows.gram
        pairs = pairs.where((mask[r] == side[r])[:, None] & (mask[r] != side[r]), torch.inf)
        listed = torch.zeros(d, dtype=torch.bool)
        for t, count in enumerate(scratch.listed[:, r]):
            listed[scratch.scalar[t, r, :count].astype(np.int64)] = True
        small = 1e-4 if dtype == torch.float32 else 0.0
        size = float(cost[r].abs().max()) + 1.0
        assert not bool((pairs.amin(dim=1) < -small * size)[~listed].any())
        best = torch.from_numpy(scratch.best[:, r].reshape(-1)[:d]) + cost[r]
        expected = pairs.where(listed[:, None], torch.inf).amin(dim=0)
        found = expected.isfinite()
        assert torch.allclose(best[found], expected[found], rtol=0, atol=1e-5 * size)


def test_pairs_are_counted():
    problem = make_problem(4, 96, PerRow(sparsity=0.5), seed=3)
    stats = solve(problem, "swap", dtype="float64").stats
    assert 0 < stats["pairs"] <= stats["passes"] * 48 * 48


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("candidates", 0),
        ("max_passes", 0),
        ("tolerance", -1.0),
        ("dtype", "float16"),
        ("kernel", "magic"),
    ],
)
def test_wrong_options_are_refused(option, value):
    with pytest.raises(InvalidInput, match=option):
        solve(make_problem(2, 4, PerRow(sparsity=0.5)), "swap", **{option: value})
