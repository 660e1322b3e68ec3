import dataclasses
import itertools
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import make_problem, optimum
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csc_array

import solvers.highs
from solvers import InvalidInput, Linear, MaskProblem, Outcome, Pattern, Solver, Status, solve
from solvers.branch_and_bound import hull
from solvers.branch_and_bound.hull import PatternDomain
from solvers.clock import Clock
from solvers.errors import NoMask
from solvers.highs import TimeUp
from solvers.highs import within as timed
from solvers.registry import _SOLVERS, available

ORACLES = ["highs", "scip"]
SHAPES = [(1, 2), (2, 3), (1, 6), (2, 4)]


def every_mask(shape):
    bits = itertools.product([False, True], repeat=shape[0] * shape[1])
    return torch.tensor(list(bits)).view(-1, *shape)


def masks_of(pattern, shape):
    return torch.stack([mask for mask in every_mask(shape) if pattern.is_feasible(mask)])


def within(masks, lower, upper):
    return masks[~((lower & ~masks) | (masks & ~upper)).flatten(1).any(dim=1)]


@st.composite
def coefficients(draw):
    """A shape, and a random matrix of whole or real numbers."""
    rows, d = draw(st.sampled_from(SHAPES))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    matrix = random.integers(-3, 4, size=(draw(st.integers(1, 3)), rows * d)).astype(float)
    if draw(st.booleans()):
        matrix = matrix + random.normal(size=matrix.shape)
    return (rows, d), matrix * draw(st.sampled_from([1e-6, 1.0, 1e6])), random


@st.composite
def cases(draw, oracle="highs"):
    """A pattern with some masks, its shape, a direction with or without ties, and bounds."""
    shape, matrix, random = draw(coefficients())
    value = matrix @ random.integers(0, 2, size=shape[0] * shape[1])
    slack = np.abs(matrix).sum(axis=1) * draw(st.sampled_from([0.0, 0.2]))
    lower = np.where(random.random(len(matrix)) < 0.5, value - slack, -np.inf)
    direction = random.normal(size=shape)
    if draw(st.booleans()):
        direction = direction.round()
    draws = torch.tensor(random.random(shape))
    pattern = Linear(matrix, lower, value + slack, oracle=oracle)
    return pattern, shape, torch.tensor(direction), draws < 0.2, draws < 0.8


def value(direction, masks):
    return (direction * masks).flatten(-2).sum(dim=-1)


@given(cases())
def test_oracle_minimises_over_all_masks(case):
    pattern, shape, direction, _, _ = case
    answer = pattern.lmo(direction)
    assert answer.dtype == torch.bool
    assert pattern.is_feasible(answer)
    best = value(direction, masks_of(pattern, shape)).min()
    assert float(value(direction, answer)) == pytest.approx(float(best), abs=1e-9)


@given(cases())
def test_bounded_oracle_minimises_over_the_masks_within_bounds(case):
    pattern, shape, direction, lower, upper = case
    inside = within(masks_of(pattern, shape), lower, upper)
    if len(inside) == 0:
        with pytest.raises(InvalidInput, match="The fixed weights leave no mask"):
            pattern.lmo(direction, lower, upper)
        return
    answer = pattern.lmo(direction, lower, upper)
    assert any(torch.equal(answer, mask) for mask in inside)
    best = float(value(direction, inside).min())
    assert float(value(direction, answer)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=50)
@given(cases(oracle="scip"))
def test_scip_minimises_over_the_masks_within_bounds(case):
    pattern, shape, direction, lower, upper = case
    everywhere = masks_of(pattern, shape)
    for bounds in ((None, None), (lower, upper)):
        inside = everywhere if bounds[0] is None else within(everywhere, *bounds)
        if len(inside) == 0:
            with pytest.raises(InvalidInput, match="The fixed weights leave no mask"):
                pattern.lmo(direction, *bounds)
            continue
        answer = pattern.lmo(direction, *bounds)
        assert any(torch.equal(answer, mask) for mask in inside)
        best = float(value(direction, inside).min())
        assert float(value(direction, answer)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_oracles_agree_on_larger_programs(seed):
    random = np.random.default_rng(seed)
    costs = random.integers(1, 50, size=(2, 48)) * 1e4
    budget = costs.sum(axis=1) / 2
    one, other = (Linear(costs, -np.inf, budget, oracle=oracle) for oracle in ORACLES)
    direction = -torch.tensor(random.random((3, 16)))
    first, second = one.lmo(direction), other.lmo(direction)
    assert one.is_feasible(first)
    assert one.is_feasible(second)
    gap = float(value(direction, first) - value(direction, second))
    assert abs(gap) <= 1e-9


@given(cases())
def test_rounding_is_the_nearest_mask(case):
    pattern, shape, relaxed, _, _ = case
    distance = (masks_of(pattern, shape).double() - relaxed).square().flatten(1).sum(dim=1)
    rounded = pattern.round(relaxed)
    assert pattern.is_feasible(rounded)
    nearest = float(distance.min())
    assert float((rounded.double() - relaxed).square().sum()) == pytest.approx(nearest, abs=1e-9)


@given(cases())
def test_the_relaxation_is_a_vertex_no_worse_than_any_mask(case):
    pattern, shape, direction, lower, upper = case
    for bounds in ((None, None), (lower, upper)):
        masks = masks_of(pattern, shape)
        if bounds[0] is not None:
            masks = within(masks, *bounds)
        if len(masks) == 0:
            continue
        vertex = pattern.lmo_relaxed(direction, *bounds)
        assert vertex.dtype == torch.float64
        assert float(value(direction, vertex)) <= float(value(direction, masks).min()) + 1e-9
        spelled = pattern.constraints(shape)
        sums = spelled.matrix @ vertex.flatten().numpy()
        slack = 1e-6 * np.abs(spelled.matrix.toarray()).max()
        assert (spelled.lower - slack <= sums).all()
        assert (sums <= spelled.upper + slack).all()
        fractional = (vertex > 1e-6) & (vertex < 1 - 1e-6)
        assert int(fractional.sum()) <= len(spelled.lower)
        if bounds[0] is not None:
            assert bool((vertex[lower] == 1).all())
            assert bool((vertex[~upper] == 0).all())


def test_the_hull_is_smaller_than_the_relaxation():
    pattern = Linear([[2.0, 2.0, 2.0]], -np.inf, 3.0)
    direction = -torch.ones(1, 3)
    assert float(value(direction, pattern.lmo(direction))) == -1.0
    assert float(value(direction, pattern.lmo_relaxed(direction))) == pytest.approx(-1.5)
    with pytest.raises(InvalidInput, match="leave no mask"):
        Linear([[2.0, 2.0]], 2.0, 2.0).lmo_relaxed(torch.zeros(1, 2), torch.ones(1, 2).bool())


@given(coefficients(), st.integers(-4, 4), st.integers(0, 2), st.sampled_from(ORACLES))
@settings(max_examples=60)
def test_constraints_without_a_mask_are_refused(case, low, width, oracle):
    shape, matrix, _ = case
    unit = np.abs(matrix).max() / 4
    lower, upper = low * unit, (low + width) * unit
    sums = every_mask(shape).flatten(1).double().numpy() @ matrix.T
    margin = 1e-7 * unit
    if ((lower <= sums) & (sums <= upper)).all(axis=1).any():
        Linear(matrix, lower, upper, oracle=oracle).check(shape)
    elif not ((lower - margin <= sums) & (sums <= upper + margin)).all(axis=1).any():
        with pytest.raises(InvalidInput, match="No mask satisfies the constraints"):
            Linear(matrix, lower, upper, oracle=oracle)


@given(cases())
def test_constraints_hold_for_the_masks_of_the_pattern_and_no_other(case):
    pattern, shape, _, _, _ = case
    spelled = pattern.constraints(shape)
    slack = 1e-8 * np.abs(spelled.matrix.toarray()).max()
    for mask in every_mask(shape):
        sums = spelled.matrix @ mask.flatten().double().numpy()
        inside = ((spelled.lower - slack <= sums) & (sums <= spelled.upper + slack)).all()
        assert inside == pattern.is_feasible(mask)


def test_violations_are_named_with_numbers():
    matrix = [[1.0, 1.0, 1.0, 1.0], [5e6, 3e6, 2e6, 1e6]]
    pattern = Linear(matrix, [1, -np.inf], [4, 7e6])
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert pattern.violation(none) == "constraint 0 sums to 0 where at least 1 is allowed"
    assert pattern.violation(~none) == (
        "constraint 1 sums to 11000000 where at most 7000000 is allowed"
    )
    named = Linear(matrix, [1, -np.inf], [4, 7e6], names=["heads", "parameters"])
    assert named.violation(~none).startswith("parameters sums to")
    assert str(named) == "2 linear constraints on 4 weights"


def test_rounding_errors_exclude_no_mask():
    full = torch.ones(1, 3, dtype=torch.bool)
    assert 0.1 + 0.1 + 0.1 > 0.3
    assert torch.equal(Linear([[0.1] * 3], -np.inf, 0.3).lmo(-full.double()), full)
    assert 0.29 * 100 < 29
    assert torch.equal(Linear([[29.0, 0.0, 0.0]], -np.inf, 0.29 * 100).lmo(-full.double()), full)


@pytest.mark.parametrize("oracle", ORACLES)
def test_whole_numbers_hold_exactly(oracle):
    pattern = Linear([[2**33, 2**33, 1]], -np.inf, 2**34, oracle=oracle)
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert pattern.violation(everything) == (
        "constraint 0 sums to 17179869185 where at most 17179869184 is allowed"
    )
    assert int(pattern.lmo(-everything.double()).sum()) == 2


@pytest.mark.parametrize("exponent", [solvers.highs._ROW_EXPONENT, 0, -4])
@pytest.mark.parametrize("oracle", ORACLES)
def test_an_excess_within_the_oracles_tolerance_is_not_accepted(monkeypatch, oracle, exponent):
    monkeypatch.setattr("solvers.highs._ROW_EXPONENT", exponent)
    above = 0.5 + 1e-8
    pattern = Linear([[above, above, 0.5, 0.5]], -np.inf, 1.0, oracle=oracle)
    direction = torch.tensor([[-4.0, -4.0, -1.0, -2.0]])
    assert float(value(direction, pattern.lmo(direction))) == -4.0
    direction = torch.tensor([[-4.0, -4.0, -2.0, -3.0]])
    assert float(value(direction, pattern.lmo(direction))) == -5.0


@st.composite
def uneven(draw):
    """Constraints with coefficients from 1 to 1e15, around the sums of one mask; and its shape."""
    n, count = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = 10.0 ** random.choice([0, 0, 3, 8, 12, 15], size=(count, n))
    matrix = random.integers(-3, 4, size=(count, n)) * sizes
    if draw(st.booleans()):
        matrix += random.integers(-2, 3, size=(count, n))
    if draw(st.booleans()):
        matrix *= random.normal(size=(count, n))
    sums = matrix @ random.integers(0, 2, size=n)
    kind = draw(st.sampled_from(["equal", "between", "below", "above", "apart"]))
    off = random.choice([-1.0, 0.0, 1.0], size=count)
    if kind == "apart":
        off += 0.5
    width = random.integers(0, 3, size=count) if kind == "between" else 0
    lower = np.full(count, -np.inf) if kind == "below" else sums + off
    upper = np.full(count, np.inf) if kind == "above" else sums + off + width
    return matrix, lower, upper, random


def allowed(matrix, lower, upper, mask, slack):
    """Whether a mask is allowed by the documentation, with a share of the slack."""
    for row, low, up in zip(matrix, lower, upper, strict=True):
        total = sum((Fraction(a) for a, m in zip(row, mask, strict=True) if m), Fraction(0))
        whole = (row % 1 == 0).all()
        for sign, bound in ((1, up), (-1, low)):
            if np.isinf(bound):
                continue
            give = slack * 1e-9 * max(abs(row).max(), abs(bound))
            if whole:
                give = min(give, 0.5) if bound % 1 else 0
            if sign * (total - Fraction(bound)) > Fraction(float(give)):
                return False
    return True


@pytest.mark.parametrize("oracle", ORACLES)
@settings(max_examples=150)
@given(uneven(), st.booleans())
def test_coefficients_of_any_size_are_as_by_enumeration(oracle, case, bounded):
    matrix, lower, upper, random = case
    n = matrix.shape[1]
    masks = every_mask((1, n))
    bits = masks.flatten(1).tolist()
    surely = [allowed(matrix, lower, upper, mask, 0.5) for mask in bits]
    perhaps = [allowed(matrix, lower, upper, mask, 2.0) for mask in bits]
    try:
        pattern = Linear(matrix, lower, upper, oracle=oracle)
    except InvalidInput:
        assert not any(surely)
        return
    kept = [pattern.is_feasible(mask) for mask in masks]
    assert any(kept)
    assert all(not sure or keeps for sure, keeps in zip(surely, kept, strict=True))
    assert all(not keeps or may for keeps, may in zip(kept, perhaps, strict=True))
    direction = torch.tensor(random.normal(size=(1, n)))
    draws = torch.tensor(random.random((1, n)))
    low, up = (draws < 0.2, draws < 0.8) if bounded else (draws < 0, draws < 1)
    inside = within(masks[kept], low, up)
    if len(inside) == 0:
        with pytest.raises(NoMask):
            pattern.lmo(direction, low, up)
        return
    answer = pattern.lmo(direction, low, up)
    assert any(torch.equal(answer, mask) for mask in inside)
    best = float(value(direction, inside).min())
    assert float(value(direction, answer)) == pytest.approx(best, abs=1e-9)
    relaxed = pattern.lmo_relaxed(direction, low, up)
    assert float(value(direction, relaxed)) <= best + 1e-6


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("large", [1e9, 1e12, 1e15, 1e30])
def test_masks_are_not_excluded_one_by_one(oracle, large):
    n = 10
    began = time.process_time()
    for bound in (2.0, large, large + 2, 2 * large):
        pattern = Linear([[large] * n + [1.0] * n], -np.inf, bound, oracle=oracle)
        answer = pattern.lmo(-torch.ones(1, 2 * n, dtype=torch.float64))
        rests = (int(bound) - big * int(large) for big in range(3))
        most = max(big + min(n, rest) for big, rest in enumerate(rests) if rest >= 0)
        assert pattern.is_feasible(answer)
        assert int(answer.sum()) == most
    assert time.process_time() - began < 10


def test_a_search_with_a_hard_oracle_keeps_its_time_limit():
    n = 10
    matrix = np.array([[1e12] * n + [1.0] * n])
    problem = MaskProblem(torch.ones(1, 2 * n), torch.eye(2 * n), Linear(matrix, -np.inf, 2.0))
    began = time.process_time()
    solution = solve(problem, "branch_and_bound", time_limit=2.0)
    assert time.process_time() - began < 6
    assert float(solution.objective.sum()) == 18


@pytest.mark.parametrize("oracle", ORACLES)
def test_oracles_stop_when_the_clock_runs_out(oracle):
    # Market split (Cornuejols and Dawande): tiny, and far beyond any solver.
    random = np.random.default_rng(0)
    matrix = random.integers(0, 10**6, size=(6, 60)).astype(float)
    pattern = Linear(matrix, -np.inf, np.floor(matrix.sum(axis=1) / 2), oracle=oracle)
    began = time.perf_counter()
    direction = -torch.tensor(matrix.sum(axis=0))[None]
    with timed(Clock(0.2)), pytest.raises(TimeUp):
        list(map(pattern.lmo, itertools.repeat(direction)))
    assert time.perf_counter() - began < 10


def test_the_oracle_is_silent_and_depends_on_nothing_but_its_arguments(capfd):
    random = np.random.default_rng(0)
    matrix = random.integers(1, 1000, size=(1, 96))  # scipy's HiGHS prints lines for these
    directions = [-torch.tensor(random.random((1, 96))) for _ in range(8)]
    pattern = Linear(matrix, -np.inf, 24000.0)
    fresh = [Linear(matrix, -np.inf, 24000.0).lmo(direction) for direction in directions]
    copied = pickle.loads(pickle.dumps(pattern))
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(pattern.lmo, directions))
    for ask in (pattern.lmo, copied.lmo):
        backwards = [ask(direction) for direction in reversed(directions)][::-1]
        assert all(map(torch.equal, backwards, fresh))
    assert all(map(torch.equal, together, fresh))
    relaxed = [pattern.lmo_relaxed(direction) for direction in directions]
    assert torch.equal(pattern.lmo_relaxed(directions[0]), relaxed[0])
    assert tuple(capfd.readouterr()) == ("", "")


def test_wrong_input_inside_an_oracle_is_not_taken_for_an_empty_node():
    class Refusing(Linear):
        def lmo(self, direction, lower=None, upper=None):
            raise InvalidInput("The oracle cannot do this.")

    matrix = np.ones((1, 3))
    domain = PatternDomain(Refusing(matrix, 1, 2), (1, 3))
    with pytest.raises(InvalidInput, match="cannot do this"):
        domain.lmo(np.zeros(3), domain.lower, domain.upper)
    empty = PatternDomain(Linear(matrix, 1, 2), (1, 3))
    assert empty.lmo(np.zeros(3), np.ones(3), np.ones(3)) is None
    # The domain is that of the pruned ones: all of them, so that none is kept.


def test_a_layer_too_large_for_the_hull_is_refused_with_its_size():
    pattern = Linear(np.ones((1, 20_000)), 0, 20_000)
    problem = MaskProblem(torch.ones(200, 100), torch.eye(100), pattern)
    start = torch.ones(200, 100, dtype=torch.bool)
    with pytest.raises(InvalidInput, match=r"takes 3 GiB; give at most 163 rows of 100 inputs"):
        solve(problem, "branch_and_bound", start=start)


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_the_costs_does_not_matter(oracle, scale):
    random = np.random.default_rng(0)
    pattern = Linear(random.random((1, 20)), -np.inf, 5.0, oracle=oracle)
    direction = -torch.tensor(random.random((2, 10)))
    assert torch.equal(pattern.lmo(direction * scale), pattern.lmo(direction))


@pytest.mark.parametrize("oracle", ORACLES)
def test_a_constraint_may_be_empty(oracle):
    direction = torch.tensor([[-1.0, -2.0]])
    pattern = Linear([[0.0, 0.0], [1.0, 1.0]], [-1.0, -np.inf], [0.0, 1.0], oracle=oracle)
    assert pattern.lmo(direction).tolist() == [[False, True]]
    with pytest.raises(InvalidInput, match="No mask"):
        Linear([[0.0, 0.0]], 1.0, 2.0, oracle=oracle)


def test_every_kind_of_matrix_is_taken_and_copied():
    dense = np.array([[1.0, 0.0, 2.0, 3.0]])
    wide = csc_array(dense)
    wide.indices, wide.indptr = wide.indices.astype(np.int64), wide.indptr.astype(np.int64)
    direction = torch.tensor([[-1.0, -1.0, -1.0, -3.0]])
    kinds = (dense, dense.tolist(), torch.tensor(dense).float(), coo_array(dense), wide)
    described = set()
    for matrix in kinds:
        pattern = Linear(matrix, [-np.inf], 4)
        assert pattern.lmo(direction).tolist() == [[True, True, False, True]]
        described.add(json.dumps(pattern.to_dict()))
    assert len(described) == 1
    pattern = Linear(dense, -np.inf, 4.0)
    dense[:] = 100.0
    assert pattern.lmo(direction).tolist() == [[True, True, False, True]]
    with pytest.raises(ValueError, match="read-only"):
        pattern.constraints((1, 4)).upper[0] = 5.0


def test_the_description_is_json():
    pattern = Linear([[1, 0, 2], [0, 3, 0]], [-np.inf, 0], [2.5, 3], names=["a", "b"])
    assert json.loads(json.dumps(pattern.to_dict())) == {
        "kind": "linear",
        "weights": 3,
        "oracle": "highs",
        "constraints": [
            {"name": "a", "index": [0, 2], "coefficient": [1, 2], "lower": None, "upper": 2.5},
            {"name": "b", "index": [1], "coefficient": [3], "lower": 0, "upper": 3},
        ],
    }


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0, 2.0], 0, 1), {}, r"shape \(2,\)"),
        ((np.zeros((0, 3)), 0, 1), {}, "non-empty"),
        (([[1.0, np.nan]], 0, 1), {}, "NaN or infinite coefficients"),
        (([[1.0, 2.0]], np.nan, 1), {}, "NaN bounds"),
        (([[1.0, 2.0]], [0, 0], 1), {}, r"shape \(2,\); there are 1 constraints"),
        (([[1.0, 2.0]], 2, 1), {}, "No mask .* lower bound 2 and upper bound 1"),
        (([[1.0, 2.0]], np.inf, np.inf), {}, "No mask"),
        (([[1.0, 2.0]], 4, 5), {"names": ["memory"]}, r"No mask satisfies .*\(memory\)"),
        (([[1.0, 2.0]], 0, 1), {"names": ["a", "b"]}, "2 names for 1 constraints"),
        ((np.ma.array([[1.0, 2.0]], mask=[[0, 1]]), 0, 1), {}, "left out"),
        (([["a", "b"]], 0, 1), {}, "real numbers"),
        (([[1.0, 2.0], [1.0]], 0, 1), {}, "rows of one length"),
        (([[1j, 2.0]], 0, 1), {}, "real numbers"),
        ((csc_array(np.array([[1j, 2.0]])), 0, 1), {}, "real numbers"),
        ((torch.ones(1, 2, dtype=torch.complex64), 0, 1), {}, "real numbers"),
        ((torch.ones(1, 2, device="meta"), 0, 1), {}, "meta device"),
        ((None, 0, 1), {}, "real numbers"),
        (([[1.0, 2.0]], "0", 1), {}, "A bound"),
        (([[1.0, 2.0]], 0, [None]), {}, "A bound"),
        (([[1.0, 2.0]], 0, np.ma.array([1.0], mask=[1])), {}, "left out"),
        (([[1.0, 2.0]], 0, 1), {"names": 5}, "names=5 must be"),
        (([[1.0, 2.0]], 0, 1), {"names": "a"}, "names='a' must be"),
        (([[1.0, 2.0]], 0, 1), {"names": [3]}, "must be text"),
        (([[1.0, 2.0]], 0, 1), {"oracle": "glpk"}, "neither highs nor scip"),
    ],
)
def test_wrong_constraints_are_refused(arguments, options, message):
    with pytest.raises(InvalidInput, match=message):
        Linear(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_tensors_of_any_kind_are_constraints(dtype):
    matrix = torch.tensor([[1, 0, 2], [0, 3, 0]]).to(dtype)
    plain = Linear([[1, 0, 2], [0, 3, 0]], 0, [2, 3]).to_dict()
    for coefficients in (matrix, matrix.to_sparse()):
        assert Linear(coefficients, 0, torch.tensor([2, 3])).to_dict() == plain


def test_a_mask_that_an_oracle_should_not_have_given_is_replaced_by_the_start(monkeypatch):
    problem = make_problem(1, 4, Linear([[1.0, 1.0, 1.0, 1.0]], 2, 2))
    start = torch.tensor([[True, True, False, False]])
    real = hull.minimize

    def rounded(*arguments, **options):
        return dataclasses.replace(real(*arguments, **options), x=np.zeros(4))

    monkeypatch.setattr(hull, "minimize", rounded)
    mask, solution, _ = hull.solve_over_hull(
        problem, start, rel_gap=1e-4, hull=False, max_nodes=None, time_limit=None
    )
    assert torch.equal(mask, start)
    assert np.isfinite(solution.bound)
    found = solve(problem, "branch_and_bound", start=start, hull=False)
    assert torch.equal(found.mask, start)
    assert float(found.bound.sum()) <= optimum(problem) + 1e-12


def test_a_missing_scip_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match="needs pyscipopt: pip install pyscipopt"):
        Linear([[1.0]], 0, 1, oracle="scip")


def test_an_oracle_without_an_answer_is_an_error(monkeypatch):
    pattern = Linear([[1.0]], 0, 1)
    monkeypatch.setattr("solvers.highs.Program._status", lambda *arguments: "Solve error")
    with pytest.raises(RuntimeError, match="HiGHS found no answer that can be believed: Solve"):
        pattern.lmo(torch.zeros(1, 1))


def test_it_fits_one_size_of_layer():
    pattern = Linear(np.ones((1, 6)), 0, 3)
    assert make_problem(2, 3, pattern).pattern.coupled
    assert pattern.neighbourhood((2, 3)) is None
    for use in (
        lambda: make_problem(2, 4, pattern),
        lambda: pattern.constraints((1, 5)),
        lambda: pattern.violation(torch.ones(1, 5, dtype=torch.bool)),
        lambda: pattern.lmo(torch.ones(1, 5)),
    ):
        with pytest.raises(InvalidInput, match="constraints are on 6 weights, but the layer has"):
            use()


def test_wrong_directions_and_fixings_are_refused():
    pattern = Linear(np.ones((1, 2)), 0, 1)
    fixed = torch.tensor([[True, False]])
    with pytest.raises(InvalidInput, match="both as kept and as pruned"):
        pattern.lmo(torch.zeros(1, 2), lower=fixed, upper=~fixed)
    with pytest.raises(InvalidInput, match="direction has NaN"):
        pattern.lmo(torch.full((1, 2), torch.nan))


class _Rounds(Solver):
    name, summary, patterns = "rounds", "for tests", (Pattern,)

    def _search(self, search):
        problem = search.problem
        return Outcome(problem.pattern.lmo(-problem.weight.abs()), Status.FEASIBLE)


def test_solvers_say_whether_they_take_linear_constraints(monkeypatch):
    problem = make_problem(2, 4, Linear(np.ones((1, 8)), 2, 5))
    assert isinstance(problem, MaskProblem)
    with pytest.raises(InvalidInput, match="cannot do the pattern 1 linear constraint on 8"):
        solve(problem, "swap", start=problem.pattern.round(torch.rand(2, 4)))
    monkeypatch.setitem(_SOLVERS, "rounds", _Rounds)
    monkeypatch.setattr(_Rounds, "options", tuple)
    listed = {info.name: info.patterns for info in available()}
    assert listed["rounds"] == ("PerRow", "NM", "PerLayer", "Linear")
    assert "Linear" not in listed["swap"]
    assert int(_Rounds().solve(problem).mask.sum()) == 5
