"""Branch and bound over hulls: Boscia's test problems, oracles by enumeration, and limits."""

import itertools
import math
import time
from fractions import Fraction

import boscia_problems as boscia
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from solvers import InvalidInput, Status
from solvers.highs import TimeUp
from solvers.hull import (
    Birkhoff,
    Box,
    Hypersimplex,
    Knapsack,
    MixedInteger,
    Quadratic,
    ReverseKnapsack,
    Simplex,
    SumRange,
    UnitSimplex,
    minimize,
)
from solvers.solution import Evidence

SMALL = [
    (boscia.planted_cube, {}),
    (boscia.worst_case, {"n": 8}),
    (boscia.worst_case, {"n": 8, "alpha": 0.05}),
    (boscia.planted_simplex, {"n": 10}),
    (boscia.planted_unit_simplex, {"n": 10}),
    (boscia.planted_reverse_knapsack, {"n": 8}),
    (boscia.sparse_quadratic, {"n": 16}),
    (boscia.low_dimension, {"n": 10}),
    (boscia.nonlinear, {"n": 14}),
    (boscia.integer_regression, {}),
    (boscia.sparse_regression, {"p": 12}),
    (boscia.birkhoff, {}),
    (boscia.birkhoff, {"order": 4}),
]

VARIANTS = [
    {"variant": "blended_pairwise"},
    {"variant": "away"},
    {"lazy": False},
    {"variant": "away", "lazy": False},
    {"node_selection": "depth_first"},
    {"branching": "strong"},
    {"branching": "pseudocost"},
    {"tightening": False},
    {"heuristics": ("rounding", "nearest", "gradient")},
    {"heuristics": ()},
    {"hull": False},
    {"store": 0},
    {"node_gap": 0.0},
    {"node_gap": 10.0, "node_gap_floor": 1.0},
]

FIVE = 5
DOMAINS = {
    "box": lambda: Box(np.full(FIVE, -1), np.full(FIVE, 2)),
    "simplex": lambda: Simplex(FIVE, 3),
    "unit simplex": lambda: UnitSimplex(FIVE, 3),
    "reverse knapsack": lambda: ReverseKnapsack(FIVE, 3),
    "range": lambda: SumRange(-1, 2, np.full(FIVE, -1), np.full(FIVE, 2)),
    "k-hot": lambda: Hypersimplex(FIVE, 2),
    "at most k": lambda: Hypersimplex(FIVE, 2, at_most=True),
    "knapsack": lambda: Knapsack([3, 1, 4, 0, 5], 8),
    "Birkhoff": lambda: Birkhoff(3),
    "linear": lambda: MixedInteger(
        [[3, 1, 4, 2, 5], [1, -1, 0, 1, 0]], [-np.inf, 0], [8, 1], upper=2
    ),
}


def members(domain):
    """The whole points of a domain, by its definition."""
    points = np.array(list(boscia.integer_points(domain)))
    if isinstance(domain, SumRange):
        sums = points.sum(axis=1)
        return points[(domain.least <= sums) & (sums <= domain.most)]
    if isinstance(domain, Knapsack):
        return points[points @ domain.weights <= domain.capacity]
    if isinstance(domain, Birkhoff):
        squares = points.reshape(-1, domain.order, domain.order)
        return points[(squares.sum(axis=1) == 1).all(axis=1) & (squares.sum(axis=2) == 1).all(1)]
    if isinstance(domain, MixedInteger):
        sums = points @ domain.matrix.toarray().T
        return points[((domain.least <= sums) & (sums <= domain.most)).all(axis=1)]
    return points


ENTRIES = {name: members(make()) for name, make in DOMAINS.items()}


@st.composite
def boxes(draw, domain):
    """Bounds of a node."""
    lower, upper = domain.lower.copy(), domain.upper.copy()
    for j in range(domain.n):
        if draw(st.booleans()):
            lower[j] = draw(st.integers(int(lower[j]), int(upper[j])))
            upper[j] = draw(st.integers(int(lower[j]), int(upper[j])))
    return lower, upper


def directions(n):
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(-10, 10, width=32))
    return st.lists(values, min_size=n, max_size=n).map(lambda v: np.array(v, dtype=float))


@pytest.mark.parametrize("name", DOMAINS)
@settings(max_examples=60)
@given(data=st.data())
def test_oracles_match_enumeration_under_bounds(name, data):
    domain, points = DOMAINS[name](), ENTRIES[name]
    lower, upper = data.draw(boxes(domain))
    direction = data.draw(directions(domain.n))
    inside = points[((points >= lower) & (points <= upper)).all(axis=1)]
    vertex = domain.lmo(direction, lower, upper)
    multipliers = domain.lagrangian(direction, lower, upper)
    if len(inside) == 0:
        assert vertex is None
        return
    size = 1e-9 * (1 + np.abs(direction).sum()) * (1 + np.abs(points).max())
    least = (inside @ direction).min()
    assert (inside == vertex).all(axis=1).any()
    assert direction @ vertex == pytest.approx(least, abs=size)
    assert direction @ domain.lmo_relaxed(direction, lower, upper) <= least + size
    # The inequality that tightening rests on holds for every point.
    side = np.where(multipliers.cost > 0, lower, upper)
    away = (np.abs(multipliers.cost) * np.abs(inside - side)).sum(axis=1)
    assert (inside @ direction >= multipliers.value + away - size).all()


@pytest.mark.parametrize("name", [n for n in DOMAINS if n not in ("linear", "knapsack")])
@settings(max_examples=30)
@given(data=st.data())
def test_multipliers_of_integral_polytopes_leave_no_gap(name, data):
    domain = DOMAINS[name]()
    lower, upper = data.draw(boxes(domain))
    direction = data.draw(directions(domain.n))
    vertex = domain.lmo(direction, lower, upper)
    if vertex is not None:
        value = domain.lagrangian(direction, lower, upper).value
        assert value == pytest.approx(direction @ vertex, abs=1e-9 * (1 + np.abs(direction).sum()))


def check(solution, f, optimum, rel_gap=1e-6, abs_gap=1e-6):
    """An answer is honest, and optimal within the tolerance."""
    slack = 1e-9 * (1 + abs(optimum))
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(f(solution.x), abs=slack)
    assert optimum - slack <= solution.objective
    assert solution.objective <= optimum + max(abs_gap, rel_gap * abs(optimum)) + slack
    honest(solution, optimum)


def honest(solution, optimum):
    slack = 1e-9 * (1 + abs(optimum))
    assert solution.trace
    for before, after in itertools.pairwise(solution.trace):
        assert before.objective >= after.objective
        assert before.bound <= after.bound
        assert before.time <= after.time
    assert all(point.bound <= optimum + slack for point in solution.trace)
    assert all(point.objective >= optimum - slack for point in solution.trace)
    assert solution.bound <= min(solution.objective, optimum + slack)


@pytest.mark.parametrize(
    ("build", "size"), SMALL, ids=[f"{b.__name__}-{list(s.values())}" for b, s in SMALL]
)
def test_boscias_problems_are_solved_to_their_optima(build, size):
    instance = build(seed=1, **size)
    solution = minimize(instance.f, None, instance.domain, rel_gap=1e-6)
    check(solution, instance.f, instance.optimum)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_portfolios_match_scip(share):
    pytest.importorskip("pyscipopt")
    instance = boscia.portfolio(8, seed=2, share=share)
    solution = minimize(instance.f, None, instance.domain, rel_gap=1e-6)
    assert solution.objective == pytest.approx(instance.optimum, rel=3e-6)
    assert solution.bound <= instance.optimum + 1e-6 * abs(instance.optimum)


def test_worst_case_needs_the_whole_tree():
    instance = boscia.worst_case(6)
    solution = minimize(instance.f, None, instance.domain, rel_gap=1e-6)
    assert solution.stats["nodes"] == 127
    assert solution.objective == 0.75


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda: boscia.nonlinear(9, seed=4),
        lambda: boscia.planted_simplex(6, seed=4),
        lambda: boscia.sparse_quadratic(10, seed=4),
        lambda: boscia.birkhoff(4, seed=4),
        lambda: boscia.sparse_regression(rows=6, p=5, seed=4),
    ],
    ids=["T8", "T3", "T6", "T13", "T11"],
)
def test_options_change_the_way_and_not_the_answer(build, options):
    instance = build()
    solution = minimize(instance.f, None, instance.domain, rel_gap=1e-6, **options)
    check(solution, instance.f, instance.optimum)


@pytest.mark.parametrize("build", [boscia.planted_cube, boscia.planted_simplex], ids=["T1", "T3"])
def test_strong_convexity_saves_nodes(build):
    instance = build(8, seed=1)
    plain = minimize(instance.f, None, instance.domain, rel_gap=1e-6)
    lifted = minimize(instance.f, None, instance.domain, rel_gap=1e-6, strong_convexity=1.0)
    check(lifted, instance.f, instance.optimum)
    assert lifted.stats["nodes"] < plain.stats["nodes"]


@pytest.mark.parametrize("name", DOMAINS)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 9), choice=st.integers(0, 2**16))
def test_random_quadratics_match_enumeration(name, seed, rank, choice):
    domain, points = DOMAINS[name](), ENTRIES[name]
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank, domain.n))
    f = Quadratic(root.T @ root, 3 * random.normal(size=domain.n), random.normal())
    options = VARIANTS[choice % len(VARIANTS)]
    mu = f.strong_convexity if choice % 3 == 0 else 0.0
    solution = minimize(f, None, domain, rel_gap=1e-7, abs_gap=1e-7, strong_convexity=mu, **options)
    check(solution, f, boscia.least(f, points), 1e-7, 1e-7)
    assert (points == solution.x).all(axis=1).any()


@pytest.mark.parametrize("variant", ["corrective", "blended_pairwise", "away"])
@pytest.mark.parametrize("name", ["box", "simplex", "linear"])
def test_functions_that_are_not_quadratic(name, variant):
    domain, points = DOMAINS[name](), ENTRIES[name]
    random = np.random.default_rng(5)
    data, counts = random.normal(size=(12, FIVE)), random.poisson(2, size=12)

    def f(x):
        return float(np.exp(data @ x).sum() - counts @ (data @ x))

    def grad(x):
        return data.T @ (np.exp(data @ x) - counts)

    solution = minimize(f, grad, domain, rel_gap=1e-6, variant=variant)
    check(solution, f, min(map(f, points)))


def exact_value(f, point):
    """A quadratic in rational arithmetic."""
    y = {j: int(v) for j, v in enumerate(point) if v}
    matrix = f.matrix.tolist()
    value = Fraction(f.constant) + sum(Fraction(float(f.linear[j])) * v for j, v in y.items())
    return (
        value + sum(Fraction(matrix[i][j]) * v * w for i, v in y.items() for j, w in y.items()) / 2
    )


@st.composite
def badly_scaled(draw, domain, points):
    """A convex quadratic with scales from 1e-8 to 1e8, often zero or nearly so at some point."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, rank = domain.n, draw(st.integers(1, domain.n + 1))
    root = random.normal(size=(rank, n)) * 10.0 ** random.uniform(-8, 8, n)
    if draw(st.booleans()):
        root = np.round(root)
    matrix = root.T @ root
    matrix = (matrix + matrix.T) / 2
    if draw(st.booleans()):  # the loss of a point in its expanded form: everything cancels
        point = points[random.integers(len(points))]
        linear, constant = -(matrix @ point), float(point @ matrix @ point) / 2
    else:
        size = np.abs(matrix).max() ** random.uniform(0.5, 1)
        linear, constant = random.normal(size=n) * size, random.normal() * size
    unit = draw(st.sampled_from([1e-120, 1e-12, 1.0, 1.0, 1.0, 1e12, 1e120]))
    return Quadratic(matrix * unit, linear * unit, constant * unit)


EXACT = [name for name in DOMAINS if name != "linear"]


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=25)
@given(data=st.data())
def test_no_bound_is_above_the_exact_optimum(name, data):
    domain, points = DOMAINS[name](), ENTRIES[name]
    f = data.draw(badly_scaled(domain, points))
    options = data.draw(st.sampled_from(VARIANTS))
    mu = f.strong_convexity if data.draw(st.booleans()) else 0.0
    solution = minimize(
        f, None, domain, rel_gap=0.0, abs_gap=0.0, node_limit=200, strong_convexity=mu, **options
    )
    assert solution.evidence is Evidence.GUARDED
    # Exact values of those points alone that could be the least.
    values = np.array([f(point) for point in points])
    errors = np.array([f.error(point) for point in points])
    near = points[values - errors <= (values + errors).min()]
    near = near[np.argsort([f(point) for point in near])][:50]
    assert Fraction(solution.bound) <= min(exact_value(f, point) for point in near)
    for point, value, error in zip(points[:3], values, errors, strict=False):
        assert abs(Fraction(float(value)) - exact_value(f, point)) <= Fraction(float(error))


@pytest.mark.parametrize("seed", range(12))
def test_a_loss_that_cancels_is_bounded_below_its_exact_optimum(seed):
    random, n = np.random.default_rng(seed), 24
    weight = np.abs(random.normal(size=n)) * 10.0 ** random.uniform(-3, 0, n)
    inputs = random.normal(size=(n, 4 * n)) * 0.3 + 1.0
    matrix = weight[:, None] * (inputs @ inputs.T / (4 * n)) * weight
    matrix = (matrix + matrix.T) / 2
    sums = matrix.sum(axis=1)
    f = Quadratic(2 * matrix, -2 * sums, float(sums.sum()))
    domain = Hypersimplex(n, n - 1)
    solution = minimize(f, None, domain, rel_gap=0.0, abs_gap=0.0, node_limit=200)
    optimum = min(exact_value(f, point) for point in 1 - np.eye(n))
    assert optimum - Fraction(1e-13 * f.constant) <= Fraction(solution.bound) <= optimum


@settings(max_examples=50)
@given(st.data())
def test_the_tangent_lies_below_the_function_by_exact_arithmetic(data):
    domain, points = DOMAINS["box"](), ENTRIES["box"]
    f = data.draw(badly_scaled(domain, points))
    lower, upper = data.draw(boxes(domain))
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    x = lower + (upper - lower) * random.random(domain.n)
    value, gradient, error = f(x), f.grad(x), f.error(x, lower, upper)
    inside = points[((points >= lower) & (points <= upper)).all(axis=1)]
    for y in inside[random.integers(len(inside), size=5)]:
        tangent = Fraction(value) + sum(
            Fraction(g) * (Fraction(b) - Fraction(a))
            for g, a, b in zip(gradient.tolist(), x.tolist(), y.tolist(), strict=True)
        )
        assert exact_value(f, y) >= tangent - Fraction(error)


def test_a_matrix_that_is_not_quite_convex_is_paid_for():
    matrix = np.array([[1.0, 1.0], [1.0, 1.0]])
    matrix[0, 1] = matrix[1, 0] = 1 + 1e-10  # the eigenvalue -1e-10
    f = Quadratic(matrix, [0.0, 0.0])
    assert f.deficit.min() >= 1e-10
    assert np.linalg.eigvalsh(matrix + np.diag(f.deficit))[0] > -1e-15
    assert f.strong_convexity == 0
    solution = minimize(f, None, Box([-1, -1], [1, 1]), rel_gap=0.0, abs_gap=0.0)
    assert solution.objective == exact_value(f, [1, -1]) < 0
    assert Fraction(solution.bound) <= exact_value(f, [1, -1])


def test_strong_convexity_is_proven():
    for seed in range(20):
        random = np.random.default_rng(seed)
        root = random.normal(size=(8, 8)) * 10.0 ** random.uniform(-4, 4, 8)
        f = Quadratic(root.T @ root + np.eye(8))
        least = float(np.linalg.eigvalsh(f.matrix)[0])
        assert 0 < f.strong_convexity <= least * (1 + 1e-6) or least < 1e-6 * f.matrix.max()
    assert Quadratic(np.eye(5)).strong_convexity == pytest.approx(1, abs=1e-10)
    assert Quadratic(np.eye(5)).strong_convexity < 1


def test_evidence_says_what_a_bound_rests_on():
    class Stated:
        def __init__(self, error):
            self.stated = error
            self.grad = SQUARE.grad

        def __call__(self, x):
            return SQUARE(x)

        def error(self, x):
            return self.stated

    cube = Box.cube(3)
    linear = MixedInteger([[1.0, 1.0, 1.0]], -np.inf, 2.0)
    for f, grad, domain, mu, evidence in (
        (SQUARE, None, cube, 0.0, Evidence.GUARDED),
        (SQUARE, None, cube, SQUARE.strong_convexity, Evidence.GUARDED),
        (SQUARE, None, cube, 1.0, Evidence.CLAIMED),
        (SQUARE, SQUARE.grad, cube, 0.0, Evidence.CLAIMED),
        (lambda x: SQUARE(x), SQUARE.grad, cube, 0.0, Evidence.CLAIMED),
        (Stated(1e-12), None, cube, 0.0, Evidence.GUARDED),
        (SQUARE, None, linear, 0.0, Evidence.CLAIMED),
    ):
        solution = minimize(f, grad, domain, rel_gap=0.0, abs_gap=1e-9, strong_convexity=mu)
        assert solution.evidence is evidence
        assert f"({evidence.name.lower()})" in repr(solution)
    exact = minimize(SQUARE, None, cube, rel_gap=0.0, abs_gap=0.0)
    stated = minimize(Stated(0.01), None, cube, rel_gap=0.0, abs_gap=0.0)
    assert stated.objective - 0.05 < stated.bound <= exact.objective - 0.01
    with pytest.raises(InvalidInput, match="f's error is nan"):
        minimize(Stated(math.nan), None, cube)


class OutOfTime(Box):
    """Its oracle's clock runs out at some call."""

    def __init__(self, n, calls):
        super().__init__(np.zeros(n), np.ones(n))
        self.calls = calls

    def lmo(self, direction, lower, upper):
        self.calls -= 1
        if self.calls < 0:
            raise TimeUp
        return super().lmo(direction, lower, upper)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 8, 20, 50])
@pytest.mark.parametrize("options", [{}, {"branching": "strong"}, {"lazy": False}], ids=str)
def test_an_oracle_out_of_time_leaves_an_honest_bound(calls, options):
    instance = boscia.worst_case(8)
    solution = minimize(instance.f, None, OutOfTime(8, calls), rel_gap=1e-6, **options)
    assert solution.status is Status.TIME_LIMIT
    assert -np.inf < solution.bound <= instance.optimum <= solution.objective
    honest(solution, instance.optimum)
    with pytest.raises(InvalidInput, match="Time was up before a feasible point"):
        minimize(instance.f, None, OutOfTime(8, 0))


def test_mixed_integer_oracles_keep_the_time_limit():
    random = np.random.default_rng(0)
    matrix = random.integers(0, 10**6, size=(6, 60)).astype(float)
    domain = MixedInteger(matrix, -np.inf, np.floor(matrix.sum(axis=1) / 2))
    f = Quadratic(np.eye(60), -matrix.sum(axis=0) / 1e6)
    began = time.perf_counter()
    solution = minimize(f, None, domain, start=np.zeros(60), time_limit=1.0, rel_gap=1e-6)
    assert time.perf_counter() - began < 10
    assert solution.status is Status.TIME_LIMIT
    assert -np.inf < solution.bound < solution.objective


def test_tightening_does_not_mistake_the_gradient_for_reduced_costs():
    # On sum(x) = k, adding a constant to the gradient changes nothing but must not fix anything.
    instance = boscia.sparse_quadratic(10, seed=3)
    for shift in (0.0, 100.0, -100.0):
        f = Quadratic(instance.f.matrix, instance.f.linear + shift)
        solution = minimize(f, None, instance.domain, rel_gap=1e-8)
        assert solution.objective == pytest.approx(instance.optimum + 5 * shift, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_hull_needs_fewer_nodes_than_the_relaxation(seed):
    both = {}
    for oracle, hull in itertools.product(("dynamic", "highs"), (True, False)):
        instance = boscia.knapsack_quadratic(12, seed, oracle)
        both[oracle, hull] = minimize(instance.f, None, instance.domain, rel_gap=1e-6, hull=hull)
    points = boscia.cube_points(12)
    knapsack = boscia.knapsack_quadratic(12, seed)
    allowed = points[points @ knapsack.domain.weights <= knapsack.domain.capacity]
    for (_, hull), solution in both.items():
        check(solution, knapsack.f, boscia.least(knapsack.f, allowed))
        assert (solution.stats["lmo_calls"] > 0) == hull
        assert (solution.stats["relaxed_lmo_calls"] > 0) != hull
    assert both["dynamic", True].stats["nodes"] <= both["dynamic", False].stats["nodes"]
    assert both["highs", True].stats["nodes"] <= both["highs", False].stats["nodes"]


def test_a_start_is_never_made_worse():
    instance = boscia.nonlinear(12, seed=2)
    best = minimize(instance.f, None, instance.domain, rel_gap=1e-6).x
    again = minimize(instance.f, None, instance.domain, start=best, node_limit=1)
    assert again.objective <= instance.f(best)
    assert again.trace[0].objective <= instance.f(best)


@pytest.mark.parametrize("selection", ["best_first", "depth_first"])
def test_limits_are_honest(selection):
    instance = boscia.worst_case(12)
    options = {"rel_gap": 1e-6, "node_selection": selection}
    few = minimize(instance.f, None, instance.domain, node_limit=5, **options)
    assert few.status is Status.ITERATION_LIMIT
    assert few.stats["nodes"] == 5
    short = minimize(instance.f, None, instance.domain, time_limit=0.05, **options)
    assert short.status is Status.TIME_LIMIT
    assert short.stats["time"] < 1
    for solution in (few, short):
        honest(solution, instance.optimum)
        assert solution.gap > 0


@pytest.mark.parametrize("heuristics", [(), ("rounding",)], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda: boscia.nonlinear(8, seed=5),
        lambda: boscia.planted_simplex(5, seed=5),
        lambda: boscia.sparse_regression(rows=6, p=5, seed=5),
    ],
    ids=["T8", "T3", "T11"],
)
def test_nodes_that_are_hardly_solved_stay_honest(build, heuristics):
    instance = build()
    solution = minimize(
        instance.f, None, instance.domain, rel_gap=1e-6, node_iterations=1, heuristics=heuristics
    )
    honest(solution, instance.optimum)
    assert solution.status in (Status.OPTIMAL, Status.FEASIBLE)
    if instance.domain.integer.all():
        check(solution, instance.f, instance.optimum)


def test_the_same_call_gives_the_same_tree():
    instance = boscia.nonlinear(12, seed=2)
    first, second = (minimize(instance.f, None, instance.domain) for _ in range(2))
    assert np.array_equal(first.x, second.x)
    assert [(p.objective, p.bound) for p in first.trace] == [
        (p.objective, p.bound) for p in second.trace
    ]


def test_progress_is_told(capsys):
    instance = boscia.worst_case(4)
    seen = []
    minimize(instance.f, None, instance.domain, callback=seen.append, verbose=True)
    assert [p.nodes for p in seen] == list(range(1, len(seen) + 1))
    assert "bound" in capsys.readouterr().out

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        minimize(instance.f, None, instance.domain, callback=stop)


SQUARE = Quadratic(np.eye(3), [-0.9, -0.2, -0.6])


class Misshapen(Box):
    def __init__(self):
        super().__init__([0, 0, 0], [1, 1, 1])
        self.upper = np.ones(2)


class Stated:
    """A square that says more of itself."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, x):
        return float((x - 0.3) @ (x - 0.3))

    def grad(self, x):
        return 2 * (x - 0.3)


def stated(name, value):
    return minimize(Stated(**{name: value}), None, Box.cube(3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: minimize(SQUARE, None, Hypersimplex(3, 4)), "no feasible point"),
        (lambda: minimize(SQUARE, None, MixedInteger([[1, 1, 1]], 4, 5)), "no feasible point"),
        (lambda: minimize(SQUARE, None, Box.cube(3), time_limit=0), "Time limit"),
        (lambda: minimize(SQUARE, None, Box.cube(3), node_limit=0), "node_limit"),
        (lambda: minimize(SQUARE, None, Box.cube(3), rel_gap=-1), "rel_gap"),
        *(
            (lambda o=option: minimize(SQUARE, None, Box.cube(3), **o), next(iter(option)))
            for option in (
                {"rel_gap": math.nan},
                {"rel_gap": math.inf},
                {"rel_gap": True},
                {"abs_gap": "1"},
                {"node_limit": 2.5},
                {"node_limit": True},
                {"node_iterations": 0},
                {"node_iterations": 3.0},
                {"store": -1},
                {"store": None},
                {"lazy": 1},
                {"hull": None},
                {"lazy_tolerance": 0.5},
                {"strong_convexity": math.nan},
                {"heuristics": "rounding"},
                {"heuristics": ("rounding", 1)},
                {"heuristics": None},
                {"callback": 3},
                {"branching": None},
            )
        ),
        (lambda: minimize(SQUARE, None, Box.cube(3), start="here"), "start must be 3"),
        (lambda: minimize(SQUARE, None, Box.cube(3), start=[[0, 0, 0]]), "start must be 3"),
        (lambda: minimize(SQUARE, None, Box.cube(4)), "on 3 variables, but the domain has 4"),
        (lambda: minimize(SQUARE, None, None), "NoneType is no domain: it has no 'n'"),
        (lambda: minimize(3, None, Box.cube(3)), "f is 3"),
        (lambda: minimize(SQUARE, None, Misshapen()), r"upper has shape \(2,\)"),
        (lambda: MixedInteger([1, 1], 0, 1), r"shape \(2,\)"),
        (lambda: MixedInteger([[1, 1]], [0, 0], 1), "least has shape"),
        (lambda: MixedInteger([[1, 1]], 0, 1, upper=[1, 1, 1]), "upper has shape"),
        (lambda: Knapsack([1], math.nan), "whole"),
        (lambda: minimize(SQUARE, None, Box.cube(3), branching="best"), "branching 'best'"),
        (lambda: minimize(SQUARE, None, Box.cube(3), variant="lazy"), "variant 'lazy'"),
        (lambda: minimize(SQUARE, None, Box.cube(3), start=[0, 0, 2]), "start"),
        (lambda: minimize(SQUARE, None, Box.cube(3), start=[0, 0, 0.5]), "start"),
        (lambda: minimize(SQUARE, None, Hypersimplex(3, 2), start=[0, 0, 1]), "start"),
        (lambda: minimize(lambda x: math.nan, SQUARE.grad, Box.cube(3)), "f is nan"),
        (lambda: minimize(SQUARE, lambda x: x * np.nan, Box.cube(3)), "grad has NaN"),
        (lambda: minimize(SQUARE, lambda x: x[:2], Box.cube(3)), "shape"),
        (lambda: minimize(lambda x: 0.0, None, Box.cube(3)), "no gradient"),
        (lambda: minimize(SQUARE, lambda x: -SQUARE.grad(x), Box.cube(3)), "tangents"),
        (
            lambda: minimize(lambda x: float(-(x @ x)), lambda x: -2 * x, Box([-1] * 3, [1] * 3)),
            "tangents",
        ),
        (lambda: Quadratic([[1, 0], [0, -1]]), "eigenvalue"),
        (lambda: Quadratic([[1, 2], [0, 1]]), "symmetric"),
        (lambda: Quadratic([[np.inf]]), "NaN or infinite"),
        (lambda: Quadratic(np.eye(2), [1, 2, 3]), "shape"),
        (lambda: Box([0, 1], [1, 0]), "Variable 1"),
        (lambda: Box([0], [np.inf]), "finite"),
        (lambda: Box([0], [1, 2]), "shapes"),
        (lambda: SumRange(0.5, 2, [0], [1]), "whole"),
        (lambda: Knapsack([1.5], 2), "whole"),
        *(
            (lambda make=make, values=values: make(values), words)
            for make in (
                Quadratic,
                lambda v: Quadratic(np.eye(2), v),
                lambda v: Box(v, [1, 1]),
                lambda v: SumRange(0, 1, [0, 0], v),
                lambda v: Knapsack(v, 1),
                lambda v: MixedInteger(v, 0, 1),
                lambda v: MixedInteger([[1, 1]], v, 2),
            )
            for values, words in (
                (np.ma.array([[1.0, 2.0]], mask=[[True, False]]), "left out"),
                ([["a", "b"]], "real numbers"),
                ([["1", "2"]], "real numbers"),
                ([[1j, 2.0]], "real numbers"),
                ([[1.0, 2.0], [1.0]], "rows of one length"),
                ([[10**400, 1]], "too large"),
                ([[None, 1.0]], "real numbers"),
            )
        ),
        *(
            (lambda value=value: Box([0], [1], integer=value), "integer")
            for value in ([2], ["x"], [None], [math.nan], [True, False])
        ),
        (lambda: Quadratic(np.eye(2), None, None), "constant"),
        (lambda: Quadratic(np.eye(2), None, 10**400), "constant"),
        *(
            (lambda make=make, n=n: make(n), "must be a whole number of at least 1")
            for make in (
                Box.cube,
                Birkhoff,
                lambda n: Simplex(n, 2),
                lambda n: UnitSimplex(n, 2),
                lambda n: ReverseKnapsack(n, 2),
                lambda n: Hypersimplex(n, 2),
            )
            for n in (-1, 0, 2.5, "2", None)
        ),
        *(
            (lambda value=value: SumRange(value, 2, [0, 0], [1, 1]), words)
            for value, words in (
                (math.nan, "NaN"),
                (None, "least"),
                ("1", "least"),
                (1j, "least"),
                ([1, 2], "least"),
                (True, "least"),
                (10**400, "least"),
            )
        ),
        (lambda: SumRange(0, math.nan, [0, 0], [1, 1]), "NaN"),
        (lambda: Simplex(2, "2"), "total"),
        (lambda: Knapsack([math.inf, 1], 3), "whole"),
        (lambda: Knapsack([1, 2], None), "capacity"),
        *(
            (lambda value=value: minimize(SQUARE, None, Box.cube(3), rel_gap=value), "rel_gap=")
            for value in (10**400, 10**5000)
        ),
        *(
            (lambda value=value: minimize(lambda x: value, SQUARE.grad, Box.cube(3)), "f's value")
            for value in (None, "1", 1j, np.zeros(3), 10**400)
        ),
        *(
            (lambda value=value: minimize(SQUARE, lambda x: value, Box.cube(3)), "grad")
            for value in (None, np.zeros(3) * 1j, ["1", "2", "3"], [[1.0], [1.0, 2.0]])
        ),
        *(
            (lambda name=name, value=value: stated(name, value), f"f's {name}")
            for name in ("curvature", "error")
            for value in (5, "a", lambda *_: "a", lambda *_: None)
        ),
        (lambda: MixedInteger([[np.nan]], 0, 1), "NaN"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(call, words):
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert str(caught.value).endswith(".")


def test_an_oracle_that_leaves_its_bounds_is_caught():
    class Broken(Box):
        def lmo(self, direction, lower, upper):
            return self.upper + 1

    with pytest.raises(InvalidInput, match="outside of its bounds"):
        minimize(SQUARE, None, Broken([0] * 3, [1] * 3))
    cube = Box.cube(3)
    with pytest.raises(InvalidInput, match="lmo_relaxed"):
        minimize(SQUARE, None, OnlyHull(cube), hull=False)
    plain = minimize(SQUARE, None, OnlyHull(cube))
    assert plain.objective == minimize(SQUARE, None, cube).objective
    assert plain.stats["tightened_local"] == 0


class OnlyHull:
    """The least that a domain may be."""

    def __init__(self, domain):
        self.n, self.integer = domain.n, domain.integer
        self.lower, self.upper = domain.lower, domain.upper
        self.lmo = domain.lmo


def test_a_knapsack_has_room_for_all_its_weights_at_most():
    f = Quadratic(csr_array(np.eye(2)), [-1.0, -1.0])
    for capacity in (10**13, 10**400):
        assert minimize(f, None, Knapsack([1, 2], capacity)).x.tolist() == [1.0, 1.0]
    assert Knapsack([1, 2], np.int64(2)).capacity == 2
    assert sorted(minimize(f, None, Knapsack([1, 2], 2.0)).x.tolist()) == [0.0, 1.0]


def test_a_number_may_be_an_array_without_dimensions():
    domain = SumRange(np.array(1.0), np.int64(1), [0, 0], np.array([1, 1]), integer=[1, 0])
    assert (domain.least, domain.most, domain.integer.tolist()) == (1.0, 1.0, [True, False])
