"""Test problems of Boscia.jl (arXiv 2208.11010), with seeds of our own and known optima.

The distributions are those of Boscia's tests and examples; Julia's random streams cannot be
repeated in NumPy. T numbers follow our notes. Optima come from closed forms, enumeration or SCIP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from solvers.hull import (
    Birkhoff,
    Box,
    Domain,
    Hypersimplex,
    Knapsack,
    MixedInteger,
    Quadratic,
    ReverseKnapsack,
    Simplex,
    UnitSimplex,
)


@dataclass(frozen=True)
class Instance:
    """A problem, its optimum, and a strong convexity constant if one is known."""

    name: str
    f: Quadratic
    domain: Domain
    optimum: float
    strong_convexity: float = 0.0


def distance(point: np.ndarray) -> Quadratic:
    """``|x - point|^2 / 2``."""
    return Quadratic(np.eye(len(point)), -point, float(point @ point) / 2)


def cube_points(n: int) -> np.ndarray:
    """All 0/1 vectors, ``[2^n, n]``."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float)


def least(f: Quadratic, points: np.ndarray) -> float:
    """Smallest value of a quadratic over ``points`` ``[points, n]``."""
    chunks = np.array_split(points, 1 + len(points) // 50_000)
    return (
        min(float((((p @ f.matrix) * p).sum(axis=1) / 2 + p @ f.linear).min()) for p in chunks)
        + f.constant
    )


def planted_cube(n: int = 20, seed: int = 0) -> Instance:
    """T1: the nearest 0/1 point of a point with entries 0.3 and 0.9."""
    point = np.random.default_rng(seed).choice([0.3, 0.9], n)
    optimum = 0.045 * (point == 0.3).sum() + 0.005 * (point == 0.9).sum()
    return Instance("T1 planted, cube", distance(point), Box.cube(n), float(optimum), 1.0)


def worst_case(n: int = 10, seed: int = 0, alpha: float = 0.0) -> Instance:
    """T2: the centre of the cube; every vertex is optimal (``alpha > 0``: nearly so)."""
    shift = alpha * np.random.default_rng(seed).uniform(size=n) / n
    point = 0.5 + shift
    optimum = float(((1 - point) ** 2).sum() / 2)
    return Instance("T2 worst case", distance(point), Box.cube(n), optimum)


def planted_simplex(n: int = 20, seed: int = 0) -> Instance:
    """T3: a whole point moved by 0.3 in every entry, the sum kept."""
    whole = np.random.default_rng(seed).integers(1, 6, n)
    point = whole + 0.3 * np.where(np.arange(n) < n // 2, 1, -1)
    domain = Simplex(n, int(whole.sum()))
    return Instance("T3 planted, simplex", distance(point), domain, n * 0.045, 1.0)


def planted_unit_simplex(n: int = 20, seed: int = 0) -> Instance:
    """T4: random signs, the sum at most ten more."""
    random = np.random.default_rng(seed)
    whole = random.integers(1, 6, n)
    point = whole + 0.3 * random.choice([-1, 1], n)
    domain = UnitSimplex(n, int(whole.sum()) + 10)
    return Instance("T4 planted, unit simplex", distance(point), domain, n * 0.045, 1.0)


def planted_reverse_knapsack(n: int = 20, seed: int = 0) -> Instance:
    """T5: random signs, the sum at least ten less."""
    random = np.random.default_rng(seed)
    whole = random.integers(1, 6, n)
    point = whole + 0.3 * random.choice([-1, 1], n)
    domain = ReverseKnapsack(n, int(whole.sum()) - 10)
    return Instance("T5 planted, reverse knapsack", distance(point), domain, n * 0.045, 1.0)


def sparse_quadratic(n: int = 20, seed: int = 0) -> Instance:
    """T6: a convex quadratic over binaries with half of them one; like one row to prune."""
    random = np.random.default_rng(seed)
    root = random.uniform(size=(n, n))
    f = Quadratic(root.T @ root, -random.uniform(size=n))
    points = np.zeros((math.comb(n, n // 2), n))
    chosen = np.array(list(itertools.combinations(range(n), n // 2)))
    np.put_along_axis(points, chosen, 1.0, axis=1)
    domain = Hypersimplex(n, n // 2)
    return Instance("T6 k-sparse quadratic", f, domain, least(f, points), f.strong_convexity)


def low_dimension(n: int = 12, m: int = 500, seed: int = 0) -> Instance:
    """T7: least squares with many equations and an all-half target."""
    wide = np.random.default_rng(seed).uniform(size=(m, n))
    gram = wide.T @ wide
    f = Quadratic(gram, -gram @ np.full(n, 0.5))
    return Instance("T7 low in high dimension", f, Box.cube(n), least(f, cube_points(n)))


def nonlinear(n: int = 20, seed: int = 0) -> Instance:
    """T8: ``(x - y)^T A (x - y)`` over the cube, A a Gram matrix of normals."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(n, n))
    point = random.choice([0.3, 0.9], n)
    matrix = root.T @ root
    f = Quadratic(2 * matrix, -2 * matrix @ point, float(point @ matrix @ point))
    known = least(f, cube_points(n)) if n <= 20 else scip(f, Box.cube(n))
    return Instance("T8 nonlinear, cube", f, Box.cube(n), known)


def integer_regression(n: int = 10, m: int = 30, seed: int = 0) -> Instance:
    """T9: a regression with whole coefficients 0..5, at most four of them not zero."""
    random = np.random.default_rng(seed)
    data = random.uniform(size=(m, n))
    truth = random.integers(1, 6, n).astype(float)
    truth[random.choice(n, n - 4, replace=False)] = 0
    target = data @ truth
    gram = np.zeros((2 * n, 2 * n))
    gram[:n, :n] = data.T @ data
    f = Quadratic(gram, np.concatenate([-data.T @ target, np.zeros(n)]), float(target @ target) / 2)
    eye = np.eye(n)
    matrix = np.vstack([np.hstack([eye, -5 * eye]), np.repeat([0.0, 1.0], n)])
    domain = MixedInteger(
        matrix,
        -np.inf,
        np.append(np.zeros(n), 4.0),
        upper=np.repeat([5.0, 1.0], n),
    )
    return Instance("T9 integer regression", f, domain, 0.0)


def portfolio(n: int = 30, seed: int = 0, share: float = 1.0) -> Instance:
    """T10: mean and risk of whole (or, for a share of the variables, any) amounts in a budget."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(n, n))
    returns, aversion, prices = random.uniform(size=n), random.uniform(), random.uniform(size=n)
    budget = prices.sum()
    f = Quadratic(aversion * root.T @ root, -returns)
    domain = MixedInteger(
        np.stack([prices, np.ones(n)]),
        [-np.inf, 1.0],
        [budget, np.inf],
        upper=budget / prices,
        integer=np.arange(n) < share * n,
    )
    name = "T10 portfolio, integer" if share == 1 else "T10 portfolio, mixed"
    return Instance(name, f, domain, scip(f, domain))


def sparse_regression(rows: int = 10, p: int = 50, k: int = 2, seed: int = 0) -> Instance:
    """T11: ridge regression with a price per non-zero coefficient and at most ``k`` of them."""
    random = np.random.default_rng(seed)
    data, target = random.uniform(size=(rows, p)), random.uniform(size=rows)
    price, ridge = random.uniform(), 10 * random.uniform()
    big = 2 * float(data.var())
    matrix = np.zeros((2 * p, 2 * p))
    matrix[:p, :p] = 2 * (data.T @ data + ridge * np.eye(p))
    linear = np.concatenate([-2 * data.T @ target, np.full(p, price)])
    f = Quadratic(matrix, linear, float(target @ target))
    eye = np.eye(p)
    rows_ = np.vstack(
        [np.hstack([eye, -big * eye]), np.hstack([-eye, -big * eye]), np.repeat([0.0, 1.0], p)]
    )
    domain = MixedInteger(
        rows_,
        -np.inf,
        np.append(np.zeros(2 * p), k),
        lower=np.repeat([-big, 0.0], p),
        upper=np.repeat([big, 1.0], p),
        integer=np.repeat([False, True], p),
    )
    optimum = min(
        f.constant + price * size + _box_minimum(f, support, big)
        for size in range(k + 1)
        for support in map(list, itertools.combinations(range(p), size))
    )
    return Instance("T11 sparse regression", f, domain, optimum)


def birkhoff(order: int = 3, seed: int = 0) -> Instance:
    """T13: the nearest permutation matrix of a doubly stochastic one."""
    matrix = np.random.default_rng(seed).uniform(size=(order, order))
    for _ in range(1000):
        matrix /= matrix.sum(axis=1, keepdims=True)
        matrix /= matrix.sum(axis=0)
    f = distance(matrix.ravel())
    eye = np.eye(order)
    points = np.array([eye[list(p)].ravel() for p in itertools.permutations(range(order))])
    return Instance("T13 Birkhoff", f, Birkhoff(order), least(f, points), 1.0)


def knapsack_quadratic(
    n: int = 24, seed: int = 0, oracle: Literal["highs", "dynamic"] = "dynamic"
) -> Instance:
    """Half a quadratic minus a linear term over binaries in a knapsack; optimum not computed."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(n, n))
    weights = random.integers(10, 100, n).astype(float)
    capacity = int(0.3 * weights.sum())
    f = Quadratic(root.T @ root / n, -random.uniform(1, 3, n))
    if oracle == "dynamic":
        return Instance("knapsack, dynamic programming", f, Knapsack(weights, capacity), np.nan)
    domain = MixedInteger(weights[None], -np.inf, capacity)
    return Instance("knapsack, HiGHS", f, domain, np.nan)


BUILDERS: tuple[Callable[..., Instance], ...] = (
    planted_cube,
    worst_case,
    planted_simplex,
    planted_unit_simplex,
    planted_reverse_knapsack,
    sparse_quadratic,
    low_dimension,
    nonlinear,
    integer_regression,
    portfolio,
    sparse_regression,
    birkhoff,
)


def scip(f: Quadratic, domain: Box | MixedInteger, seconds: float = 120.0) -> float:
    """Optimum by SCIP to a relative gap of 1e-7; NaN if it does not get there."""
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    model.setParam("limits/time", seconds)
    model.setParam("limits/gap", 1e-7)
    model.setParam("numerics/feastol", 1e-7)
    x = [
        model.addVar(lb=low, ub=up, vtype="I" if whole else "C")
        for low, up, whole in zip(domain.lower, domain.upper, domain.integer, strict=True)
    ]
    if isinstance(domain, MixedInteger):
        for low, row, up in zip(domain.least, domain.matrix.toarray(), domain.most, strict=True):
            total = quicksum(a * v for a, v in zip(row, x, strict=True) if a)
            if np.isfinite(low):
                model.addCons(total >= low)
            if np.isfinite(up):
                model.addCons(total <= up)
    value = model.addVar(lb=None)
    values, vectors = np.linalg.eigh(f.matrix)
    factor = vectors * np.sqrt(values.clip(0))
    squares = []
    for column in factor.T:
        part = model.addVar(lb=None)
        model.addCons(part == quicksum(a * v for a, v in zip(column, x, strict=True)))
        squares.append(part * part)
    model.addCons(value >= quicksum(squares) / 2)
    linear = quicksum(a * v for a, v in zip(f.linear, x, strict=True))
    model.setObjective(value + linear + f.constant)
    model.optimize()
    if model.getStatus() not in ("optimal", "gaplimit"):
        return float("nan")
    return float(f(np.array([model.getVal(v) for v in x])))


def _box_minimum(f: Quadratic, support: list[int], bound: float) -> float:
    """Least ``b^T Q b / 2 + linear^T b`` over a box, by trying which entries sit at a bound."""
    matrix, linear = f.matrix[np.ix_(support, support)], f.linear[support]
    best = 0.0
    for ends in itertools.product((-bound, None, bound), repeat=len(support)):
        free = [i for i, end in enumerate(ends) if end is None]
        point = np.array([0.0 if end is None else end for end in ends])
        if free:
            rhs = -(linear + matrix @ point)[free]
            point[free] = np.linalg.solve(matrix[np.ix_(free, free)], rhs)
        if (np.abs(point) <= bound * (1 + 1e-12)).all():
            best = min(best, float(point @ matrix @ point / 2 + linear @ point))
    return best


def integer_points(domain: Domain) -> Iterator[np.ndarray]:
    """Whole points of a domain's box."""
    ranges = (range(int(a), int(b) + 1) for a, b in zip(domain.lower, domain.upper, strict=True))
    for point in itertools.product(*ranges):
        yield np.array(point, dtype=float)
