"""Small random problems with every known difficulty, their optima, and what solvers owe on them.

An instance follows from a seed, a kind of difficulty and a kind of pattern. Its allowed masks are
counted here, apart from `solvers.pattern`, and all are evaluated; where float64 does not decide, in
fractions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from solvers import (
    NM,
    CellPattern,
    Evidence,
    InvalidInput,
    Linear,
    MaskProblem,
    MaskSolution,
    Pattern,
    PerLayer,
    PerRow,
    Status,
    get_solver,
    solve,
)
from solvers.certificate import check
from solvers.rounding import gamma
from solvers.solution import ABSOLUTE_GAP

Floats = npt.NDArray[np.float64]
Masks = npt.NDArray[np.bool_]
Random = np.random.Generator

_MOST_WEIGHTS = 12
"""Of rows that share a budget: 4096 masks."""

_MOST_IN_FRACTIONS = 200
"""Masks, equal up to rounding, that are evaluated in fractions."""


# What may be difficult: weight, inputs [d, tokens] and the linear term, to be changed.
@dataclass
class _Draft:
    random: Random
    weight: Floats
    inputs: Floats
    linear: Floats | None = None

    @property
    def size(self) -> Floats:
        """``trace(Q_r)``, ``[rows, 1]``."""
        energy: Floats = (self.inputs**2).mean(axis=1)
        return np.asarray((self.weight**2 @ energy)[:, None])

    def add_linear(self, strength: float, low: float = -1.0, high: float = 1.0) -> None:
        spread = self.random.uniform(low, high, size=self.weight.shape)
        self.linear = strength * self.size * spread


def _plain(draft: _Draft) -> None:
    pass


def _zero_row(draft: _Draft) -> None:
    draft.weight[draft.random.integers(len(draft.weight))] = 0


def _zero_weights(draft: _Draft) -> None:
    draft.weight[draft.random.random(draft.weight.shape) < 0.4] = 0


def _dead_inputs(draft: _Draft) -> None:
    d = len(draft.inputs)
    draft.inputs[draft.random.choice(d, size=draft.random.integers(1, d + 1), replace=False)] = 0


def _duplicate_inputs(draft: _Draft) -> None:
    d = len(draft.inputs)
    draft.inputs = draft.inputs[draft.random.integers(d, size=d)]
    if draft.random.random() < 0.5:  # and of opposite effect: pruned together, nothing is lost
        draft.weight = np.sign(draft.weight)


def _rank_one(draft: _Draft) -> None:
    d, tokens = draft.inputs.shape
    draft.inputs = np.outer(draft.random.normal(size=d), draft.random.normal(size=tokens))


def _ill_conditioned(draft: _Draft) -> None:
    d, tokens = draft.inputs.shape
    common = draft.random.normal(size=tokens)
    noise = 10.0 ** draft.random.uniform(-8, -2)
    draft.inputs = common + noise * draft.random.normal(size=(d, tokens))
    draft.inputs *= 10.0 ** draft.random.uniform(-3, 3, size=(d, 1))


def _ties(draft: _Draft) -> None:
    draft.weight = draft.random.choice([-1.0, 1.0], size=draft.weight.shape)
    draft.inputs = draft.random.integers(-1, 2, size=draft.inputs.shape).astype(float)


def _all_equal(draft: _Draft) -> None:
    draft.weight[:] = 1.0
    draft.inputs = np.eye(len(draft.inputs))


def _zero_optimum(draft: _Draft) -> None:
    """What is pruned cancels: the same inputs twice, with weights of opposite sign."""
    half = len(draft.inputs) // 2
    draft.inputs[half : 2 * half] = draft.inputs[:half]
    draft.weight[:, half : 2 * half] = -draft.weight[:, :half]


def _cancelling_linear(draft: _Draft) -> None:
    """The linear term takes away what one mask loses, so that its loss is about zero."""
    gram = draft.inputs @ draft.inputs.T / draft.inputs.shape[1]
    pruned = draft.weight * (draft.random.random(draft.weight.shape) < 0.5)
    draft.linear = -2 * draft.weight * (pruned @ gram)


def _scaled(change: Callable[[_Draft], None]) -> Callable[[_Draft], None]:
    def scaled(draft: _Draft) -> None:
        if draft.random.random() < 0.4:
            draft.add_linear(draft.random.choice([0.1, 1.0, 10.0]))
        change(draft)

    return scaled


def _weight_scale(draft: _Draft) -> None:
    draft.weight *= draft.random.choice([1e-12, 1e12])


def _gram_scale(draft: _Draft) -> None:
    draft.inputs *= draft.random.choice([1e-6, 1e6])


def _linear_scale(draft: _Draft) -> None:
    draft.add_linear(draft.random.choice([1e-12, 1e12]))


def _row_scales(draft: _Draft) -> None:
    draft.weight *= 10.0 ** draft.random.uniform(-6, 6, size=(len(draft.weight), 1))


KINDS: dict[str, Callable[[_Draft], None]] = {
    "plain": _plain,
    "zero row": _zero_row,
    "zero weights": _zero_weights,
    "dead inputs": _dead_inputs,
    "duplicate inputs": _duplicate_inputs,
    "rank 1": _rank_one,
    "ill-conditioned": _ill_conditioned,
    "ties": _ties,
    "all equal": _all_equal,
    "zero optimum": _zero_optimum,
    "weak linear": lambda draft: draft.add_linear(1e-3),
    "linear": lambda draft: draft.add_linear(1.0),
    "positive linear": lambda draft: draft.add_linear(1.0, 0.0, 1.0),
    "negative linear": lambda draft: draft.add_linear(1.0, -1.0, 0.0),
    "strong linear": lambda draft: draft.add_linear(1e3),
    "cancelling linear": _cancelling_linear,
    "weight scale": _scaled(_weight_scale),
    "gram scale": _scaled(_gram_scale),
    "linear scale": _linear_scale,
    "row scales": _scaled(_row_scales),
}
"""Kinds of difficulty."""


def _count_rows(random: Random, shape: tuple[int, int]) -> Pattern:
    """As many per row as some mask has: whole coefficients of 1."""
    rows, d = shape
    matrix = np.kron(np.eye(rows), np.ones((1, d)))
    kept = random.integers(0, d + 1, size=rows).astype(float)
    return Linear(matrix, kept, kept)


def _at_most(random: Random, shape: tuple[int, int]) -> Pattern:
    """A knapsack with positive whole coefficients."""
    matrix = random.integers(1, 10, size=(1, shape[0] * shape[1])).astype(float)
    return Linear(matrix, -np.inf, float(random.integers(0, matrix.sum() + 1)))


def _mixed(random: Random, shape: tuple[int, int]) -> Pattern:
    """Several constraints of any sign, some with two sides, about the sums of some mask."""
    size, count = shape[0] * shape[1], int(random.integers(1, 4))
    matrix = random.normal(size=(count, size))
    if random.random() < 0.5:
        matrix = np.rint(4 * matrix)
    matrix *= 10.0 ** random.integers(-6, 7, size=(count, 1))
    matrix[random.random(matrix.shape) < 0.3] = 0
    sums = matrix @ (random.random(size) < 0.6)
    wide = np.abs(matrix).sum(axis=1)
    lower, upper = (sums + sign * random.random(count) * wide / 4 for sign in (-1, 1))
    lower[random.random(count) < 0.3] = -np.inf
    upper[random.random(count) < 0.3] = np.inf
    return Linear(matrix, lower, upper)


def _large_and_small(random: Random, shape: tuple[int, int]) -> Pattern:
    """Whole coefficients of very different sizes, whose sums must hold exactly."""
    size = shape[0] * shape[1]
    matrix = random.integers(1, 10, size=(1, size)) * 10.0 ** random.integers(0, 10, size=(1, size))
    end = float((matrix @ (random.random(size) < 0.5))[0])
    return Linear(matrix, -np.inf, end) if random.random() < 0.5 else Linear(matrix, end, np.inf)


PATTERNS: dict[str, Callable[[Random, tuple[int, int]], Pattern]] = {
    "PerRow": lambda random, shape: PerRow(sparsity=float(random.uniform(0.1, 0.9))),
    "PerRow keep 0": lambda random, shape: PerRow(keep=0),
    "PerRow keep 1": lambda random, shape: PerRow(keep=1),
    "PerRow keep d": lambda random, shape: PerRow(keep=shape[1]),
    "2:4": lambda random, shape: NM(2, 4),
    "1:2": lambda random, shape: NM(1, 2),
    "NM odd": lambda random, shape: (
        NM(int(random.integers(1, shape[1])), shape[1])
        if shape[1] in (5, 7)
        else NM(int(random.integers(1, 3)), 3)
    ),
    "PerLayer": lambda random, shape: PerLayer(keep=int(random.integers(shape[0] * shape[1] + 1))),
    "Linear counts": _count_rows,
    "Linear at most": _at_most,
    "Linear mixed": _mixed,
    "Linear large and small": _large_and_small,
}
"""Kinds of patterns."""

_WIDTHS = {"2:4": (4, 8), "1:2": (2, 4, 6, 8), "NM odd": (3, 5, 6, 7)}


def _shape(random: Random, pattern: str) -> tuple[int, int]:
    rows = int(random.integers(1, 4))
    d = int(random.choice(_WIDTHS.get(pattern, tuple(range(2, 9)))))
    shared = pattern == "PerLayer" or pattern.startswith("Linear")
    return (max(1, min(rows, _MOST_WEIGHTS // d)), d) if shared else (rows, d)


def draw(seed: int, kind: str | None = None, pattern: str | None = None) -> Instance:
    """The instance of a seed; a kind and a pattern that are not given follow from it too."""
    random = np.random.default_rng(seed)
    kind = kind or list(KINDS)[random.integers(len(KINDS))]
    pattern = pattern or list(PATTERNS)[random.integers(len(PATTERNS))]
    rows, d = _shape(random, pattern)
    draft = _Draft(
        random=random,
        weight=random.normal(size=(rows, d)),
        inputs=random.normal(size=(d, d)) @ random.normal(size=(d, 4 * d)) + 0.3,
    )
    KINDS[kind](draft)
    allowed = PATTERNS[pattern](random, (rows, d))
    dtype = (torch.float32, torch.float64)[random.integers(2)]
    problem = MaskProblem(
        torch.tensor(draft.weight, dtype=dtype),
        torch.tensor(draft.inputs @ draft.inputs.T / draft.inputs.shape[1], dtype=dtype),
        allowed,
        None if draft.linear is None else torch.tensor(draft.linear),
    )
    mean = torch.tensor(draft.inputs.mean(axis=1))
    return Instance(seed, kind, pattern, problem, mean)


@dataclass(frozen=True)
class Instance:
    """A problem, what is difficult about it, and the mean of its inputs."""

    seed: int
    kind: str
    pattern: str
    problem: MaskProblem
    mean: torch.Tensor

    @cached_property
    def units(self) -> list[Unit]:
        """Parts whose masks do not depend on each other: rows, or all of them together."""
        rows, d = self.problem.shape
        parts = [list(range(rows))] if self.problem.pattern.coupled else [[r] for r in range(rows)]
        masks = np.array(list(itertools.product([False, True], repeat=len(parts[0]) * d)))
        allowed = masks[_allowed(self.problem.pattern, masks, d)].reshape(-1, len(parts[0]), d)
        return [Unit.of(self.problem, part, allowed) for part in parts]

    def start(self) -> torch.Tensor:
        """An allowed mask at random."""
        random = np.random.default_rng(self.seed + 1)
        chosen = [unit.masks[random.integers(len(unit.masks))] for unit in self.units]
        return torch.from_numpy(np.concatenate(chosen))


def _allowed(pattern: Pattern, masks: Masks, d: int) -> Masks:
    """Which masks ``[n, weights]`` a pattern allows, counted anew; of a row, or of the layer."""
    size = masks.shape[1]
    if isinstance(pattern, NM):
        groups = masks.reshape(len(masks), -1, pattern.group).sum(axis=2)
        return np.asarray((groups == pattern.keep).all(axis=1))
    if isinstance(pattern, (PerRow, PerLayer)):
        keep = pattern.keep
        if keep is None:
            keep = size - int(Fraction(repr(pattern.sparsity)) * size)
        return np.asarray(masks.sum(axis=1) == keep)
    spelled = pattern.constraints((size // d, d))
    matrix = spelled.matrix.toarray()
    sums = masks @ matrix.T
    # As documented: exact where all coefficients are whole, else with a slack of 1e-9.
    whole = (matrix == np.rint(matrix)).all(axis=1)
    ends = np.nan_to_num(np.maximum(abs(spelled.lower), abs(spelled.upper)), posinf=0.0)
    slack = np.where(whole, 0.0, 1e-9 * np.maximum(abs(matrix).max(axis=1), ends))
    low, high = spelled.lower - slack, spelled.upper + slack
    return np.asarray(((sums >= low) & (sums <= high)).all(axis=1))


@dataclass(frozen=True)
class Unit:
    """Rows with their allowed masks and what these lose.

    Attributes
    ----------
    rows
        Of the problem.
    masks
        Bool ``[n, rows, d]``.
    loss
        Float64 ``[n]``.
    error
        By how much the loss may differ from the exact one, here and in the problem's evaluation:
        ``gamma(2 d + 8)`` times the sum of absolute terms.
    scale
        ``trace(Q) + sum |linear|``.
    """

    rows: list[int]
    masks: Masks
    loss: Floats
    error: Floats
    scale: float
    _parts: tuple[Floats, Floats, Floats] = field(repr=False)

    @classmethod
    def of(cls, problem: MaskProblem, rows: list[int], masks: Masks) -> Unit:
        """Evaluate all masks."""
        weight, gram = problem.weight[rows].double().numpy(), problem.gram.double().numpy()
        linear = np.zeros(weight.shape)
        if problem.linear is not None:
            linear = problem.linear[rows].double().numpy()
        q = np.where(masks, 0.0, weight)
        loss = ((q @ gram) * q).sum(axis=(1, 2)) + np.where(masks, 0.0, linear).sum(axis=(1, 2))
        terms = ((abs(q) @ abs(gram)) * abs(q)).sum(axis=(1, 2))
        terms += np.where(masks, 0.0, abs(linear)).sum(axis=(1, 2))
        error = gamma(2 * weight.size + 8) * terms + np.finfo(np.float64).tiny
        scale = float((weight**2 @ gram.diagonal()).sum() + abs(linear).sum())
        return cls(rows, masks, loss, error, scale, (weight, gram, linear))

    @cached_property
    def least(self) -> float:
        """Least loss of the masks, in float64; exact up to `least_error`."""
        return float(self.loss.min())

    @cached_property
    def least_error(self) -> float:
        """What evaluating an optimal mask may add."""
        near = self.loss - self.error <= (self.loss + self.error).min()
        return float(self.error[near].max())

    @cached_property
    def exactly(self) -> Fraction:
        """Least loss in rational arithmetic, of the masks that may have it."""
        near = np.flatnonzero(self.loss - self.error <= (self.loss + self.error).min())
        return min(self._exact(self.masks[i]) for i in near[:_MOST_IN_FRACTIONS])

    def _exact(self, mask: Masks) -> Fraction:
        weight, gram, linear = self._parts
        total = Fraction(0)
        for row, kept in enumerate(mask):
            pruned = np.flatnonzero(~kept).tolist()
            q = {j: Fraction(weight[row, j]) for j in pruned}
            total += sum((Fraction(linear[row, j]) for j in pruned), Fraction(0))
            total += sum(
                (q[i] * q[j] * Fraction(gram[i, j]) for i in pruned for j in pruned if q[i]),
                Fraction(0),
            )
        return total

    def excess(self, bound: float) -> float:
        """By how much a bound is above the optimum and the rounding of an evaluation; 0 if not."""
        if bound <= self.least - self.least_error:
            return 0.0
        above = Fraction(bound) - self.exactly - Fraction(self.least_error)
        return max(0.0, float(above))

    def best_swap(self, mask: Masks) -> float:
        """How much the best exchange of a kept for a pruned weight changes the loss."""
        flat = self.masks.reshape(len(self.masks), -1)
        apart = flat != mask.reshape(-1)
        swaps = (apart.sum(axis=1) == 2) & (flat.sum(axis=1) == mask.sum())
        here = float(self.loss[~apart.any(axis=1)][0])
        return float(self.loss[swaps].min()) - here if swaps.any() else 0.0


@dataclass(frozen=True)
class Contender:
    """A solver with options, and on which instances it is tried."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    every: int = 1
    one_unit: bool = False
    """Whether it refuses rows that share a budget."""
    cells: bool = False
    """Whether it refuses patterns without cells."""

    def meets(self, instance: Instance) -> bool:
        """Whether it is tried on an instance: it can answer, and it is its turn."""
        linear = isinstance(instance.problem.pattern, Linear)
        # Hundreds of calls of a mixed-integer oracle.
        turns = self.every * (
            4 if linear and self.name in ("frank_wolfe", "branch_and_bound") else 1
        )
        return instance.seed % turns == 0 and self.takes(instance)

    def takes(self, instance: Instance) -> bool:
        """Whether it should give an answer."""
        pattern = instance.problem.pattern
        if not isinstance(pattern, type(get_solver(self.name)).patterns):
            return False
        if self.cells and not isinstance(pattern, CellPattern):
            return False
        return not (self.one_unit and pattern.coupled and instance.problem.shape[0] > 1)


CONTENDERS = [
    Contender("magnitude", "magnitude"),
    Contender("wanda", "wanda"),
    Contender("ria", "ria"),
    Contender("dsnot", "dsnot"),
    Contender("sparsegpt", "sparsegpt"),
    Contender("alps", "alps", every=4),
    Contender("swap", "swap"),
    Contender("swap float64", "swap", {"dtype": "float64", "kernel": "torch"}, every=2),
    Contender("sparseswaps", "sparseswaps", every=2),
    Contender("sparsefw", "sparsefw", {"iterations": 50}, every=2),
    Contender("tabu", "tabu", {"iterations": 40, "stall": 20}),
    Contender("joint", "joint", every=2),
    Contender("chain", "chain", {"stages": ["frank_wolfe", "swap"]}, every=4),
    Contender("best_of", "best_of", {"members": ["ria", "swap"]}, every=4),
    Contender("restarts", "restarts", {"restarts": 2}, every=4),
    Contender("frank_wolfe", "frank_wolfe", {"iterations": 300}),
    Contender("frank_wolfe open_loop", "frank_wolfe", {"step": "open_loop", "iterations": 50}, 4),
    Contender(
        "frank_wolfe line_search", "frank_wolfe", {"step": "line_search", "iterations": 99}, 8
    ),
    Contender("frank_wolfe pairwise", "frank_wolfe", {"step": "pairwise", "iterations": 99}, 4),
    Contender("frank_wolfe bfloat16", "frank_wolfe", {"dtype": "bfloat16", "iterations": 99}, 4),
    Contender("frank_wolfe fixed", "frank_wolfe", {"fixed": 0.5}, every=4, cells=True),
    Contender("semidefinite", "semidefinite", every=2),
    Contender("semidefinite wide", "semidefinite", {"wide_from": 1}, every=16),
    Contender("semidefinite decomposed", "semidefinite", {"decompose": True}, every=4),
    Contender("branch_and_bound", "branch_and_bound"),
    Contender("branch_and_bound plain", "branch_and_bound", {"reformulation": False}, every=2),
    Contender(
        "branch_and_bound relaxed", "branch_and_bound", {"hull": False, "branching": "strong"}, 4
    ),
    Contender("scip", "scip", every=2),
    Contender("scip reformulated", "scip", {"reformulation": True}, every=4, cells=True),
    Contender("cvxpy qp", "cvxpy", every=2),
    Contender("cvxpy sdp", "cvxpy", {"relaxation": "sdp"}, every=8, one_unit=True),
    Contender("cvxpy sdp cuts", "cvxpy", {"relaxation": "sdp", "cuts": True}, 8, one_unit=True),
]
"""Every solver, the bounding ones in all their ways."""


@dataclass(frozen=True)
class Judgement:
    """What came of one solver on one instance.

    Attributes
    ----------
    violations
        Sentences; empty if all is as it should be.
    status, gap, lost
        Status by name; the reported gap, its largest unit's; by how much the mask is above the
        optimum, as a share of the scale. None without.
    """

    violations: list[str]
    status: str | None = None
    gap: float | None = None
    lost: float = 0.0


def judge(contender: Contender, instance: Instance, *, with_start: bool = False) -> Judgement:
    """Solve and check everything that a solver owes."""
    options = dict(contender.options)
    if contender.name == "dsnot":
        options["mean"] = instance.mean
    start = instance.start() if with_start else None
    try:
        solution = solve(
            instance.problem, contender.name, start=start, seed=instance.seed % 1000, **options
        )
    except InvalidInput as refusal:
        return Judgement([f"refuses: {refusal}"])
    except Exception as error:
        return Judgement([f"raises {type(error).__name__}: {error}"])
    if not _fits(solution, instance):
        return Judgement(["the mask is not allowed, or no bool tensor of the problem's shape"])
    if solution.bound is not None and len(solution.bound) != len(instance.units):
        return Judgement([f"a bound of shape {tuple(solution.bound.shape)}"])
    rel_gap = getattr(get_solver(contender.name, **options), "rel_gap", None)
    exact = type(get_solver(contender.name)).exact
    if contender.name == "scip" and _beyond_tolerance(instance.problem):
        exact = False
    violations = [
        *_of_values(solution, instance, start),
        *_of_bounds(solution, instance),
        *_of_status(solution, instance, rel_gap, exact),
        *_of_certificates(solution, instance),
    ]
    units = [unit for unit in instance.units if unit.scale]
    lost = max(((_loss(solution, unit) - unit.least) / unit.scale for unit in units), default=0.0)
    gap = None if solution.gap is None else float(solution.gap.max())
    return Judgement(violations, solution.status.name, gap, max(0.0, lost))


def _beyond_tolerance(problem: MaskProblem) -> bool:
    """Whether coefficients of one constraint differ by more than SCIP's tolerance, 1e-7.

    SCIP then takes masks for allowed that are not; its bound holds for them too, and stays below
    the optimum, which the answer says by its status.
    """
    if not isinstance(problem.pattern, Linear):
        return False
    sizes = abs(problem.pattern.constraints(problem.shape).matrix.toarray())
    least = np.where(sizes > 0, sizes, np.inf).min(axis=1)
    return bool((least < 1e-6 * sizes.max(axis=1)).any())


def _fits(solution: MaskSolution, instance: Instance) -> bool:
    mask = solution.mask
    if mask.dtype != torch.bool or tuple(mask.shape) != instance.problem.shape:
        return False
    found = mask.numpy()
    return all((unit.masks == found[unit.rows]).all(axis=(1, 2)).any() for unit in instance.units)


def _loss(solution: MaskSolution, unit: Unit) -> float:
    return float(solution.objective[unit.rows].sum())


def _of_values(solution: MaskSolution, instance: Instance, start: torch.Tensor | None) -> list[str]:
    found, problem = [], instance.problem
    if not torch.equal(solution.objective, problem.objective(solution.mask)):
        found.append("the objective is not the problem's")
    for unit in instance.units:
        same = (unit.masks == solution.mask.numpy()[unit.rows]).all(axis=(1, 2))
        loss, error = float(unit.loss[same][0]), float(unit.error[same][0])
        if not abs(_loss(solution, unit) - loss) <= 2 * error:
            found.append(f"rows {unit.rows}: objective {_loss(solution, unit)!r}, not {loss!r}")
        if start is not None:
            before = float(problem.objective(start)[unit.rows].sum())
            if not _loss(solution, unit) <= before:
                found.append(f"rows {unit.rows}: the start {before!r} was made worse")
    return found


def _of_bounds(solution: MaskSolution, instance: Instance) -> list[str]:
    if solution.bound is None:
        return [] if solution.evidence is None else ["evidence without a bound"]
    found = []
    if not isinstance(solution.evidence, Evidence):
        found.append("a bound without evidence")
    if solution.bound.dtype != torch.float64:
        found.append(f"a bound in {solution.bound.dtype}")
    for bound, unit in zip(solution.bound.tolist(), instance.units, strict=True):
        if not np.isfinite(bound):
            found.append(f"rows {unit.rows}: bound {bound}")
        elif excess := unit.excess(bound):
            found.append(
                f"rows {unit.rows}: bound {bound!r} is {excess:.3g} above the optimum "
                f"{float(unit.exactly)!r} ({excess / unit.scale:.3g} of the scale)"
            )
    return found


def _unresolved(solution: MaskSolution, instance: Instance) -> bool:
    """Whether no gap is larger than what the numbers of all weights leave open."""
    assert solution.bound is not None
    units = zip(solution.bound.tolist(), instance.units, strict=True)
    return all(_loss(solution, unit) - bound <= ABSOLUTE_GAP * unit.scale for bound, unit in units)


def _of_status(
    solution: MaskSolution, instance: Instance, rel_gap: float | None, exact: bool
) -> list[str]:
    found = []
    # Bounds are made of the numbers of all weights; what those cannot tell apart may stay open,
    # where the best mask prunes next to nothing or there is an outlier.
    if exact and solution.status is not Status.OPTIMAL and not _unresolved(solution, instance):
        found.append(f"no limit, but {solution.status.name} with gap {solution.gap}")
    if solution.status is Status.OPTIMAL:
        if solution.bound is None:
            return [*found, "optimal without a bound"]
        for bound, unit in zip(solution.bound.tolist(), instance.units, strict=True):
            loss = _loss(solution, unit)
            tolerance = max((rel_gap or 0.0) * abs(loss), ABSOLUTE_GAP * unit.scale * (1 + 1e-12))
            if not loss - bound <= tolerance:
                found.append(f"rows {unit.rows}: optimal with bound {bound!r} of {loss!r}")
            if not loss - unit.least <= tolerance + 2 * unit.least_error:
                found.append(f"rows {unit.rows}: {loss!r} optimal, but there is {unit.least!r}")
    # Of "joint" the exchanges are those that do not pay once the weights are made best again.
    if solution.status is Status.LOCAL_OPTIMUM and solution.solver != "joint":
        for unit in instance.units:
            # Smaller changes cannot be told from rounding (`ScaledRows.noise`).
            noise = 4 * unit.masks[0].size * np.finfo(np.float64).eps * unit.scale
            change = unit.best_swap(solution.mask.numpy()[unit.rows])
            if change < -noise - 2 * float(unit.error.max()):
                found.append(f"rows {unit.rows}: local optimum, but a swap gains {-change:.3g}")
    return found


def _of_certificates(solution: MaskSolution, instance: Instance) -> list[str]:
    if not solution.certificates:
        lacks = solution.evidence is Evidence.CERTIFIED
        return ["certified without a certificate"] if lacks else []
    try:
        proven = check(instance.problem, solution.certificates)
    except InvalidInput as refusal:
        return [f"a certificate is refused: {refusal}"]
    found = []
    for one in proven:
        at = 0 if one.row is None else one.row
        unit = instance.units[at]
        if excess := unit.excess(one.bound):
            found.append(f"row {one.row}: the certificate proves {excess:.3g} too much")
        if solution.evidence is Evidence.CERTIFIED:
            assert solution.bound is not None
            missing = float(solution.bound[at]) - one.bound
            if missing > ABSOLUTE_GAP * unit.scale:
                found.append(f"row {one.row}: certified, but {missing:.3g} above what is proven")
    if solution.evidence is Evidence.CERTIFIED and len(proven) != len(instance.units):
        found.append("certified, but not every row has a certificate")
    return found
