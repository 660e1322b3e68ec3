import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, like_bound, make_problem, optimum, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers import NM, Evidence, InvalidInput, MaskProblem, PerLayer, PerRow, Status, solve
from solvers.certificate import check
from solvers.semidefinite.cuts import FAMILIES, Cuts, separate
from solvers.semidefinite.dual import DualAscent, Iterate, Multipliers, projected
from solvers.semidefinite.layer import marginal_prices
from solvers.semidefinite.program import BinaryProgram
from solvers.semidefinite.witness import ConvexForm, Witness, is_verified, verified_shift

PATTERNS = [PerRow(sparsity=0.5), NM(keep=2, group=4), PerRow(keep=0), PerRow(keep=8)]


def allowed(program):
    """All binary x with the right counts."""
    every = np.array(list(itertools.product([0.0, 1.0], repeat=program.inputs)))
    sums = [every[:, program.cell == g].sum(axis=1) for g in range(len(program.pruned))]
    return every[np.all(np.array(sums) == program.pruned[:, None], axis=0)]


def random_multipliers(program, seed):
    """Multipliers of the right signs and nothing else."""
    random = np.random.default_rng(seed)
    d, count = program.inputs, 40
    index = np.array([random.choice(d, 3, replace=False) for _ in range(count)])
    family = random.integers(0, len(FAMILIES), count)
    size = program.size / d
    return Multipliers(
        size * random.normal(),
        size * random.normal(size=d),
        Cuts(family, index),
        0.1 * size * random.exponential(size=count),
    )


def test_cuts_hold_for_binaries_and_are_tight_somewhere():
    for family in range(len(FAMILIES)):
        values = []
        for bits in itertools.product([0.0, 1.0], repeat=3):
            x = np.array(bits)
            cut = Cuts(np.array([family]), np.array([[0, 1, 2]]))
            values.append(float(cut.value(x, np.outer(x, x))[0]))
        assert min(values) == 0.0


def test_combined_cuts_are_their_sum():
    random = np.random.default_rng(0)
    index = np.array([random.choice(6, 3, replace=False) for _ in range(30)])
    cuts = Cuts(random.integers(0, 5, 30), index)
    multiplier = random.random(30)
    products, linear, constant = cuts.combined(multiplier, 6)
    for bits in itertools.product([0.0, 1.0], repeat=6):
        x = np.array(bits)
        direct = multiplier @ cuts.value(x, np.outer(x, x))
        assert x @ products @ x + linear @ x + constant == pytest.approx(direct)


def test_separation_finds_the_most_violated():
    random = np.random.default_rng(1)
    x, products = random.random(7), random.normal(size=(7, 7))
    products = (products + products.T) / 2
    found = separate(x, products, most=5, threshold=0.1, triangles=True)
    values = found.value(x, products)
    assert (values < -0.1).all()
    assert len(set(found.keys(7).tolist())) == len(found)
    i, j = np.unravel_index(np.argmin(products + 9 * np.tri(7)), (7, 7))
    assert [0, i, j] in np.column_stack([found.family, found.index[:, :2]]).tolist()
    exact = separate(np.ones(7), np.ones((7, 7)), most=5, threshold=1e-9, triangles=True)
    assert len(exact) == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_multipliers_give_a_valid_bound_and_convex_form(kind, pattern):
    program = BinaryProgram.of(make_problem(1, 8, pattern, kind, seed=5))
    points = allowed(program)
    losses = np.array([program.objective(x) for x in points])
    for seed in range(3):
        multipliers = random_multipliers(program, seed)
        assert Witness.of(program, multipliers).bound(program) <= losses.min()
        form = ConvexForm.of(program, multipliers)
        values = np.array([form.value(x) for x in points])
        assert (values <= losses + 1e-9 * program.size).all()
        normals = np.zeros((8, len(program.pruned)))
        normals[np.arange(8), program.cell] = 1
        normals /= np.linalg.norm(normals, axis=0)
        least = np.linalg.eigvalsh(projected(form.quadratic, normals))[0]
        assert least >= -1e-12 * np.linalg.norm(form.quadratic)


def test_the_ascent_raises_the_bound_to_the_optimum():
    problem = make_problem(1, 12, PerRow(sparsity=0.5), seed=3)
    program = BinaryProgram.of(problem)
    program = program.scaled(1 / program.size)
    ascent = DualAscent(program, Iterate.zero(12))
    bounds = []
    for _ in range(25):
        ascent.ascend(1e-3, 30)
        bounds.append(Witness.of(program, ascent.at.multipliers).bound(program))
        ascent.add_cuts(100, 1e-3, triangles=True)
    least = min(program.objective(x) for x in allowed(program))
    assert bounds[0] < max(bounds) <= least
    assert max(bounds) >= 0.995 * least


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_never_exceed_the_optimum(kind):
    for pattern in (PerRow(sparsity=0.6), NM(1, 5), PerLayer(sparsity=0.5)):
        problem = make_problem(2, 5 if pattern.coupled else 10, pattern, kind, seed=8)
        solution = solve(problem, "semidefinite", rounds=10)
        size = float((problem.weight**2 * problem.gram.diagonal()).sum())
        assert float(solution.bound.sum()) <= optimum(problem) + 1e-12 * size
        assert bool((solution.bound <= like_bound(solution)).all())


def test_closed_rows_are_called_optimal():
    solution = solve(make_problem(3, 16, PerRow(sparsity=0.5), seed=1), "semidefinite", rel_gap=0.1)
    assert solution.status is Status.OPTIMAL
    assert float(solution.gap.max()) <= 0.1
    weak = solve(make_problem(1, 40, PerRow(sparsity=0.5), seed=1), "semidefinite", rounds=1)
    assert weak.status is Status.FEASIBLE


def test_the_bound_is_far_above_the_plain_relaxation_on_real_rows(embedded):
    from mipprune import layer_problem

    layer = "model.layers.1.self_attn.q_proj"
    whole = layer_problem(embedded.model, embedded.tokenizer, None, layer, samples=16, seqlen=256)
    problem = MaskProblem(whole.weight[:2, :64], whole.gram[:64, :64], PerRow(sparsity=0.6))
    solution = solve(problem, "semidefinite", row_seconds=20.0)
    assert float(solution.gap.max()) < 0.05


def test_verification_is_not_fooled():
    random = np.random.default_rng(0)
    a = random.normal(size=(20, 20))
    matrix = a @ a.T - 3 * np.eye(20)
    normals = np.linalg.qr(random.normal(size=(20, 2)))[0]
    shift = verified_shift(matrix, normals)
    least = np.linalg.eigvalsh(projected(matrix, normals))[0]
    assert is_verified(matrix, normals, shift)
    assert shift >= max(0.0, -least)
    assert shift <= max(0.0, -least) + 1e-8
    assert not is_verified(matrix - 10 * np.eye(20), normals, shift)


def test_what_is_no_single_program_is_refused():
    with pytest.raises(InvalidInput, match="separate programs"):
        BinaryProgram.of(make_problem(2, 4, PerRow(sparsity=0.5)))
    problem = make_problem(1, 4, PerRow(sparsity=0.5))
    for option in (
        {"rel_gap": -1.0},
        {"rounds": 0},
        {"row_seconds": 0.0},
        {"price": float("nan")},
    ):
        with pytest.raises(InvalidInput):
            solve(problem, "semidefinite", **option)


def test_a_start_decides_the_first_incumbent():
    problem = make_problem(2, 12, PerRow(sparsity=0.5), seed=4)
    start = random_mask(problem)
    solution = solve(problem, "semidefinite", start=start, rounds=1)
    assert bool((solution.objective <= problem.objective(start)).all())
    assert torch.equal(solution.objective, problem.objective(solution.mask))


@settings(max_examples=12)
@given(
    shape=st.sampled_from([(1, 5), (2, 4), (3, 3), (4, 2)]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
    pattern=st.one_of(
        st.floats(0.1, 0.9).map(lambda s: PerLayer(sparsity=s)),
        st.integers(0, 6).map(lambda k: PerLayer(keep=k)),
    ),
    price=st.one_of(st.none(), st.floats(-2.0, 2.0)),
)
def test_decomposed_layers_are_bounded_at_any_price(shape, kind, seed, pattern, price):
    if pattern.keep is not None:
        pattern = PerLayer(keep=min(pattern.keep, shape[0] * shape[1]))
    problem = make_problem(*shape, pattern, kind, seed)
    size = float((problem.weight**2 * problem.gram.diagonal()).sum())
    size += 0.0 if problem.linear is None else float(problem.linear.abs().sum())
    solution = solve(
        problem, "semidefinite", decompose=True, rounds=3, price=price and price * size
    )
    least = optimum(problem)
    assert float(solution.bound.sum()) <= least + 1e-12 * size
    assert bool((solution.bound <= like_bound(solution)).all())
    proven = sum(row.bound for row in check(problem, solution.certificates))
    assert proven <= least + 1e-12 * size
    if solution.evidence is Evidence.CERTIFIED:
        assert proven >= float(solution.bound)


def test_a_decomposed_layer_comes_close_to_the_whole():
    problem = make_problem(4, 8, PerLayer(sparsity=0.6), seed=2)
    whole = solve(problem, "semidefinite", rel_gap=1e-3)
    rows = solve(problem, "semidefinite", decompose=True)
    assert whole.certificates == ()
    assert len(rows.certificates) == 4
    assert float(rows.bound.sum()) >= 0.9 * float(whole.bound.sum())
    lost = solve(problem, "semidefinite", decompose=True, price=3 * rows.stats["price"])
    assert float(lost.bound.sum()) < float(rows.bound.sum())


def test_marginal_prices_are_single_moves():
    problem = make_problem(3, 5, PerLayer(keep=6), "linear", seed=9)
    mask = random_mask(problem)
    before = float(problem.objective(mask).sum())
    saves, costs = [], []
    for place in itertools.product(range(3), range(5)):
        other = mask.clone()
        other[place] = not other[place]
        change = float(problem.objective(other).sum()) - before
        (costs if mask[place] else saves).append(change)
    low, high = marginal_prices(problem, mask)
    assert low == pytest.approx(-min(saves))
    assert high == pytest.approx(min(costs))
    nothing = marginal_prices(problem, torch.ones_like(mask))
    assert nothing[0] == nothing[1]
