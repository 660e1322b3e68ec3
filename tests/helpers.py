"""Problems to test on, and answers by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import strategies as st

from solvers import NM, MaskProblem, Pattern, PerLayer, PerRow

KINDS = ("plain", "rank deficient", "zero columns", "ties", "zero rows", "linear", "tiny", "huge")


def make_problem(
    rows: int, d: int, pattern: Pattern, kind: str = "plain", seed: int = 0, dtype=torch.float64
) -> MaskProblem:
    """A small problem with correlated inputs and one difficulty."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, d))
    rank = max(1, d // 3) if kind == "rank deficient" else 4 * d
    inputs = random.normal(size=(d, d)) @ random.normal(size=(d, rank)) + 0.3
    linear = None
    if kind == "zero columns":
        inputs[random.choice(d, size=max(1, d // 4), replace=False)] = 0
    elif kind == "ties":
        weight = np.sign(weight)
        inputs = random.integers(-1, 2, size=inputs.shape).astype(float)
    elif kind == "zero rows":
        weight[0] = 0
    elif kind == "linear":
        linear = random.normal(size=(rows, d)) * d
    elif kind == "tiny":
        weight, inputs = weight * 1e-4, inputs * 1e-4
    elif kind == "huge":
        weight, inputs = weight * 1e4, inputs * 1e4
    gram = inputs @ inputs.T / inputs.shape[1]
    return MaskProblem(
        torch.tensor(weight, dtype=dtype),
        torch.tensor(gram, dtype=dtype),
        pattern,
        None if linear is None else torch.tensor(linear),
    )


def random_mask(problem: MaskProblem, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return problem.pattern.round(torch.rand(problem.shape, generator=generator))


def single_swaps(problem: MaskProblem, mask: torch.Tensor) -> torch.Tensor:
    """Summed objective after every allowed single swap, by evaluating each mask anew."""
    places = list(itertools.product(*map(range, problem.shape)))
    after = []
    for u, p in itertools.permutations(places, 2):
        if mask[u] and not mask[p]:
            swapped = mask.clone()
            swapped[u], swapped[p] = False, True
            if problem.pattern.is_feasible(swapped):
                after.append(float(problem.objective(swapped).sum()))
    return torch.tensor(after, dtype=torch.float64)


def optimum(problem: MaskProblem) -> float:
    """Least summed objective over all masks, by enumeration."""
    rows, d = problem.shape
    if not problem.pattern.coupled:
        return sum(_row_optimum(problem.rows([r])) for r in range(rows))
    return min(
        float(problem.objective(torch.tensor(bits).view(rows, d)).sum())
        for bits in itertools.product([False, True], repeat=rows * d)
        if problem.pattern.is_feasible(torch.tensor(bits).view(rows, d))
    )


def _row_optimum(problem: MaskProblem) -> float:
    d = problem.shape[1]
    masks = torch.tensor(list(itertools.product([False, True], repeat=d)))
    allowed = masks[[problem.pattern.is_feasible(mask[None]) for mask in masks]]
    batch = MaskProblem(
        problem.weight.expand(len(allowed), d),
        problem.gram,
        problem.pattern,
        None if problem.linear is None else problem.linear.expand(len(allowed), d),
    )
    return float(batch.objective(allowed).min())


def patterns(d: int) -> st.SearchStrategy[Pattern]:
    """Patterns that fit ``d`` inputs."""
    groups = [g for g in range(2, d + 1) if d % g == 0]
    choices: list[st.SearchStrategy[Pattern]] = [
        st.floats(0.05, 0.95).map(lambda s: PerRow(sparsity=s)),
        st.integers(0, d).map(lambda k: PerRow(keep=k)),
        st.floats(0.05, 0.95).map(lambda s: PerLayer(sparsity=s)),
    ]
    if groups:
        choices.append(
            st.sampled_from(groups).flatmap(
                lambda g: st.integers(1, g - 1).map(lambda n: NM(keep=n, group=g))
            )
        )
    return st.one_of(choices)


@st.composite
def problems(draw, max_rows: int = 4, max_inputs: int = 10) -> MaskProblem:
    rows, d = draw(st.integers(1, max_rows)), draw(st.integers(2, max_inputs))
    return make_problem(
        rows,
        d,
        draw(patterns(d)),
        draw(st.sampled_from(KINDS)),
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([torch.float32, torch.float64])),
    )


def like_bound(solution):
    """Objective shaped like the bound: summed where the rows share a budget."""
    summed = len(solution.bound) != len(solution.objective)
    return solution.objective.sum().reshape(1) if summed else solution.objective
