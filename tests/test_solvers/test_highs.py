"""What is believed of HiGHS, and what is not."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from solvers.clock import Clock
from solvers.highs import Program, TimeUp, within

CUBE = np.zeros(3), np.ones(3)


def program(rows, least, most, integer=None):
    return Program(csr_array(np.array(rows, dtype=float)), np.array(least), np.array(most), integer)


ODD = program([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [1.0] * 3, [1.0] * 3)
"""Its only point is (1/2, 1/2, 1/2)."""

APART = program([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [-np.inf, 1.9], [0.5, np.inf])
"""x_0 + x_1 <= 0.5 and x_0 + x_2 >= 1.9 have no common point, though each has some."""


def test_points_are_found_with_and_without_fractions():
    assert ODD.minimise(np.ones(3), *CUBE, whole=False) == pytest.approx([0.5] * 3)
    assert ODD.minimise(np.ones(3), *CUBE) is None
    assert APART.minimise(np.ones(3), *CUBE, whole=False) is None
    assert APART.minimise(np.ones(3), *CUBE) is None
    free = Program(csr_array((0, 3)), np.zeros(0), np.zeros(0))
    assert free.minimise(np.array([1.0, -1.0, 0.5]), *CUBE).tolist() == [0, 1, 0]
    assert free.minimise(np.ones(3), np.ones(3), np.zeros(3)) is None


@pytest.mark.parametrize("seed", range(40))
def test_the_proof_that_there_is_no_point_holds_where_there_is_none_and_nowhere_else(seed):
    random = np.random.default_rng(seed)
    matrix, inside = random.normal(size=(4, 6)), random.random(6)
    lower, upper = np.zeros(6), np.ones(6)
    sums = matrix @ inside
    some = program(matrix, sums, sums)
    found = some.minimise(random.normal(size=6), lower, upper, whole=False)
    assert np.abs(matrix @ found - sums).max() < 1e-6
    for _ in range(20):
        assert not some._is_farkas(random.normal(size=4), lower, upper)
    # Beyond the largest sum in some direction there is no point.
    y = random.normal(size=4)
    most = float((y @ matrix).clip(min=0).sum())
    apart = sums + y * (most + 1e-6 - y @ sums) / (y @ y)
    none = program(matrix, apart, apart)
    scaled = np.ldexp(y, -none._exponent)
    assert none._is_farkas(scaled, lower, upper)
    assert not none._is_farkas(-scaled, lower, upper)


def test_multipliers_bound_the_minimum():
    random = np.random.default_rng(0)
    matrix, cost = random.normal(size=(3, 8)) * 1e5, random.normal(size=8)
    lower, upper = np.zeros(8), np.ones(8)
    most = np.abs(matrix).sum(axis=1) / 10
    relaxed = program(matrix, np.full(3, -np.inf), most)
    y = relaxed.multipliers(cost, lower, upper)
    assert (y <= 0).all()
    reduced = cost - matrix.T @ y
    best = float(cost @ relaxed.minimise(cost, lower, upper, whole=False))
    assert float(y @ most + reduced.clip(max=0).sum()) == pytest.approx(best)


def saying(monkeypatch, *words):
    """HiGHS says these, one by one, and then the truth."""
    real, left = Program._status, list(words)

    def status(self, *arguments):
        said = real(self, *arguments)
        return left.pop(0) if left else said

    monkeypatch.setattr(Program, "_status", status)


def test_infeasible_is_not_believed_without_proof(monkeypatch):
    easy = program([[1.0, 1.0, 1.0]], [1.0], [2.0])
    saying(monkeypatch, "Infeasible")
    assert easy.minimise(np.ones(3), *CUBE, whole=False).sum() == pytest.approx(1)
    saying(monkeypatch, "Infeasible", "Infeasible")
    with pytest.raises(RuntimeError, match="no answer that can be believed: Infeasible"):
        easy.minimise(np.ones(3), *CUBE, whole=False)
    # A mixed-integer program is solved again, and its relaxation looked at, before that.
    saying(monkeypatch, "Infeasible")
    assert easy.minimise(np.ones(3), *CUBE).sum() == 1


def test_points_are_checked(monkeypatch):
    easy = program([[1.0, 1.0, 1.0]], [1.0], [2.0])
    other = program([[1.0, 1.0, 1.0]], [0.0], [0.5])
    model = other._model(False, False)
    monkeypatch.setattr(Program, "_model", lambda self, whole, careful: model)
    with pytest.raises(RuntimeError, match="outside of the constraints"):
        easy.minimise(np.ones(3), *CUBE, whole=False)


def test_a_clock_stops_it_and_only_inside_its_context():
    with within(Clock(1e-9)):
        for ask in (ODD.minimise, ODD.multipliers):
            with pytest.raises(TimeUp):
                ask(np.ones(3), *CUBE)
        with within(Clock()), pytest.raises(TimeUp):  # the outer one ends first
            ODD.minimise(np.ones(3), *CUBE)
    with within(Clock()):
        assert ODD.minimise(np.ones(3), *CUBE) is None
    assert ODD.minimise(np.ones(3), *CUBE) is None


def test_a_long_life_does_not_use_up_the_time_limit():
    easy = program([[1.0, 1.0, 1.0]], [1.0], [2.0])
    for _ in range(300):
        easy.minimise(np.ones(3), *CUBE, whole=False)
    used = easy._model(False, False).getRunTime()
    assert used > 0
    with within(Clock(max(used / 2, 0.05))):
        assert easy.minimise(np.ones(3), *CUBE, whole=False).sum() == pytest.approx(1)
