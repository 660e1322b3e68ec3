"""Published methods against their definitions, worked out independently on small cases."""

import itertools

import numpy as np
import pytest
from helpers import make_problem, random_mask

from solvers import (
    NM,
    InvalidInput,
    LeastSquares,
    MaskProblem,
    PerLayer,
    PerRow,
    SparseGPTUpdate,
    solve,
    updated_loss,
)

PATTERNS = [PerRow(sparsity=0.5), NM(keep=2, group=4), PerLayer(sparsity=0.5)]


def brain_surgeon(row, gram, keep, damping):
    """SparseGPT's weights of one row by its definition: at each pruned column the exact update of
    all later columns, from the inverse of the remaining submatrix."""
    w = row.copy()
    H = gram + damping * np.diag(gram).mean() * np.eye(len(row))
    for j in range(len(row)):
        inverse = np.linalg.inv(H[j:, j:])
        if not keep[j]:
            w[j:] -= w[j] * inverse[:, 0] / inverse[0, 0]
            w[j] = 0.0
    return w


@pytest.mark.parametrize("d", [12, 200])  # within one block, and over two
def test_sparsegpt_updates_as_the_optimal_brain_surgeon_does(d):
    problem = make_problem(3, d, PerRow(sparsity=0.5))
    mask = random_mask(problem)
    updated = SparseGPTUpdate(damping=0.01)(problem.weight, problem.gram, mask)
    for row, keep, found in zip(problem.weight.numpy(), mask.numpy(), updated, strict=True):
        expected = brain_surgeon(row, problem.gram.numpy(), keep, 0.01)
        assert found.numpy() == pytest.approx(expected, abs=1e-8)


def test_sparsegpt_chooses_by_the_cost_of_removal_after_earlier_updates():
    problem = make_problem(4, 16, PerRow(sparsity=0.5), seed=3)
    mask = solve(problem, "sparsegpt", block=4).mask
    H = problem.gram.numpy()
    H = H + 0.01 * np.diag(H).mean() * np.eye(16)
    for row, found in zip(problem.weight.numpy(), mask.numpy(), strict=True):
        keep = np.ones(16, bool)
        for begin in range(0, 16, 4):
            current = brain_surgeon(row, problem.gram.numpy(), keep, 0.01)
            pivots = [np.linalg.inv(H[j:, j:])[0, 0] for j in range(begin, begin + 4)]
            cost = current[begin : begin + 4] ** 2 / np.array(pivots)
            keep[begin + np.argsort(cost)[:2]] = False
        assert np.array_equal(keep, found)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_follows_every_pattern_and_least_squares_is_better(pattern):
    problem = make_problem(6, 40, pattern)
    solution = solve(problem, "sparsegpt", block=12)
    assert pattern.is_feasible(solution.mask)
    args = problem.weight, problem.gram, solution.mask
    swept = updated_loss(*args[:2], SparseGPTUpdate(damping=0.0)(*args)).sum()
    exact = updated_loss(*args[:2], LeastSquares(damping=0.0)(*args)).sum()
    assert float(exact) <= float(swept) < float(solution.objective.sum())


def test_sparsegpt_drops_dead_inputs_first():
    problem = make_problem(4, 16, PerRow(sparsity=0.5), "zero columns")
    mask = solve(problem, "sparsegpt").mask
    assert not bool(mask[:, problem.gram.diagonal() == 0].any())
    with pytest.raises(InvalidInput, match="singular; give more damping"):
        solve(make_problem(4, 16, PerRow(sparsity=0.5), "rank deficient"), "sparsegpt", damping=0)


def least_squares_optimum(problem):
    """Least loss of mask and weights together, by enumeration of one row's masks."""
    d = problem.shape[1]
    kept = problem.pattern.kept_per_cell(problem.shape)
    gram, w = problem.gram.numpy(), problem.weight.numpy()[0]
    best = np.inf
    for support in itertools.combinations(range(d), kept):
        chosen = list(support)
        target = gram[chosen] @ w
        v = np.linalg.solve(gram[np.ix_(chosen, chosen)], target)
        best = min(best, w @ gram @ w - target @ v)
    return best


def test_alps_is_near_the_best_mask_and_weights():
    ratios = []
    for seed in range(8):
        problem = make_problem(1, 10, PerRow(sparsity=0.5), seed=seed)
        losses = {}
        for solver in ("magnitude", "alps"):
            mask = solve(problem, solver).mask
            updated = LeastSquares(damping=0.0)(problem.weight, problem.gram, mask)
            losses[solver] = float(updated_loss(problem.weight, problem.gram, updated).sum())
        ratios.append([losses[s] / least_squares_optimum(problem) for s in losses])
    magnitude, alps = np.array(ratios).T
    assert np.all(alps >= 1 - 1e-9)
    assert np.isclose(alps, 1.0).sum() >= 4
    assert alps.mean() < magnitude.mean() / 2


def test_alps_makes_the_iterations_it_states():
    problem = make_problem(2, 8, PerRow(sparsity=0.5), seed=5)
    gram = problem.gram.numpy()
    gram = gram + 0.01 * np.diag(gram).mean() * np.eye(8)
    norm = np.sqrt(np.diag(gram))
    H, B0 = gram / np.outer(norm, norm), problem.weight.numpy() * norm

    def sparse(dense):
        out = dense.copy()
        np.put_along_axis(out, np.argsort(dense**2, axis=1)[:, :4], 0.0, axis=1)
        return out

    D, Y = sparse(B0), np.zeros_like(B0)
    for _ in range(2):
        B = np.linalg.solve(H + 0.1 * np.eye(8), (B0 @ H - Y + 0.1 * D).T).T
        D = sparse(B + Y / 0.1)
        Y = Y + 0.1 * (B - D)
    found = solve(problem, "alps", iterations=2)
    assert np.array_equal(found.mask.numpy(), sparse(B) != 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_follows_every_pattern_and_comes_to_rest(pattern):
    problem = make_problem(6, 40, pattern)
    solution = solve(problem, "alps")
    assert pattern.is_feasible(solution.mask)
    assert solution.stats["iterations"] < 300


def dsnot_by_hand(w, mean, second, keep, threshold, cycles, group=None):
    """The exchanges of one row, one by one."""
    variance, norm = second - mean**2, np.sqrt(second)
    keep, moved = keep.copy(), set()
    error = sum(w[j] * mean[j] for j in range(len(w)) if not keep[j])
    first = np.sign(error)
    for _ in range(cycles):
        side = 1 if error > 0 else -1
        grow = [
            (side * w[j] * mean[j] / variance[j], j)
            for j in range(len(w))
            if not keep[j] and j not in moved and side * w[j] * mean[j] > 0
        ]
        if not grow or abs(error) <= threshold:
            break
        revived = max(grow)[1]
        prune = [
            (abs(w[j]) * norm[j], j)
            for j in range(len(w))
            if keep[j]
            and j not in moved
            and (side * w[j] * mean[j] < 0 if group is None else j // group == revived // group)
        ]
        if not prune:
            break
        pruned = min(prune)[1]
        after = error + w[pruned] * mean[pruned] - w[revived] * mean[revived]
        if np.sign(after) != first:
            break
        keep[revived], keep[pruned], error = True, False, after
        moved |= {revived, pruned}
    return keep


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_dsnot_makes_the_published_exchanges(pattern):
    random = np.random.default_rng(0)
    inputs = random.normal(size=(24, 300)) + 0.2 * random.normal(size=(24, 1))
    weight, mean = random.normal(size=(8, 24)), inputs.mean(axis=1)
    problem = MaskProblem(weight, inputs @ inputs.T / 300, pattern)
    found = solve(problem, "dsnot", mean=mean, threshold=0.05)
    start = solve(problem, "wanda").mask.numpy()
    group = 4 if isinstance(pattern, NM) else None
    second = np.diag(problem.gram.numpy())
    for w, before, after in zip(weight, start, found.mask.numpy(), strict=True):
        assert np.array_equal(dsnot_by_hand(w, mean, second, before, 0.05, 50, group), after)
    assert found.stats["exchanges"] == (start & ~found.mask.numpy()).sum() > 2


def test_dsnot_needs_the_mean():
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match="needs the mean of the inputs"):
        solve(problem, "dsnot")
    with pytest.raises(InvalidInput, match=r"must be \(8,\)"):
        solve(problem, "dsnot", mean=[0.0])


def test_sparsefw_as_published_is_an_option_of_frank_wolfe():
    """Alpha 0.9 fixed by Wanda, then 2000 open-loop steps on the rest, worked out in NumPy."""
    problem = make_problem(2, 20, PerRow(keep=10), seed=2)
    found = solve(problem, "sparsefw")
    Q = [np.outer(w, w) * problem.gram.numpy() for w in problem.weight.numpy()]
    wanda = np.abs(problem.weight.numpy()) * np.sqrt(np.diag(problem.gram.numpy()))
    for q, score, mask in zip(Q, wanda, found.mask.numpy(), strict=True):
        fixed = np.zeros(20)
        fixed[np.argsort(-score)[:9]] = 1.0
        z = np.zeros(20)
        z[np.argsort(-score)[9:10]] = 1.0
        for t in range(2000):
            gradient = -2 * q @ (1 - fixed - z)
            gradient[fixed == 1] = np.inf
            vertex = np.zeros(20)
            vertex[gradient.argmin()] = 1.0
            z += 2 / (t + 2) * (vertex - z)
        fixed[z.argmax()] = 1.0
        assert np.array_equal(fixed == 1, mask)
    assert found.solver == "sparsefw"


def test_sparseswaps_as_published_is_the_best_swap_of_every_pass():
    problem = make_problem(3, 16, PerRow(sparsity=0.5), seed=2)
    found = solve(problem, "sparseswaps", max_passes=3)
    masks = solve(problem, "wanda").mask.numpy().copy()
    Q = [np.outer(w, w) * problem.gram.numpy() for w in problem.weight.numpy()]
    for q, mask in zip(Q, masks, strict=True):
        for _ in range(3):
            x = (~mask).astype(float)
            best = (x @ q @ x, None)
            for u, p in itertools.product(np.flatnonzero(mask), np.flatnonzero(~mask)):
                y = x.copy()
                y[u], y[p] = 1.0, 0.0
                best = min(best, (y @ q @ y, (u, p)), key=lambda pair: pair[0])
            if best[1] is not None:
                mask[best[1][0]], mask[best[1][1]] = False, True
    assert np.array_equal(found.mask.numpy(), masks)
