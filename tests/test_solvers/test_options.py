import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import make_problem

from solvers import (
    NM,
    InvalidInput,
    LeastSquares,
    PerRow,
    SparseGPTUpdate,
    available,
    get_solver,
    order_inputs,
    register,
    solve,
    structured,
)
from solvers.across_layers import cheapest_counts, lowest
from solvers.options import _checks, option
from solvers.registry import _SOLVERS

WHOLE = "must be a whole number of at least 1"

REFUSED = [
    ("branch_and_bound", {"max_nodes": 0}, f"max_nodes=0 {WHOLE}, or None"),
    ("branch_and_bound", {"max_nodes": -3}, f"max_nodes=-3 {WHOLE}, or None"),
    ("branch_and_bound", {"root_gain": math.nan}, "root_gain=nan must be a finite number"),
    ("branch_and_bound", {"rel_gap": math.inf}, "rel_gap=inf must be a finite number"),
    ("branch_and_bound", {"rel_gap": -1e-9}, "rel_gap=-1e-09 must be a finite number"),
    ("branch_and_bound", {"batch": 2.5}, f"batch=2.5 {WHOLE}"),
    ("branch_and_bound", {"branching": 2}, "branching=2 must be one of most_infeasible, "),
    ("branch_and_bound", {"root_share": 0}, "root_share=0 must be a finite number above 0 and"),
    ("frank_wolfe", {"iterations": 2.5}, f"iterations=2.5 {WHOLE}"),
    ("frank_wolfe", {"iterations": "10"}, f"iterations='10' {WHOLE}"),
    ("frank_wolfe", {"fixed": 1.5}, "fixed=1.5 must be .* of at least 0 and at most 1"),
    ("sparsefw", {"fixed": 1.5}, "fixed=1.5 must be .* of at least 0 and at most 1"),
    ("swap", {"candidates": 2.5}, f"candidates=2.5 {WHOLE}"),
    ("swap", {"candidates": 2.0}, f"candidates=2.0 {WHOLE}"),
    ("swap", {"candidates": True}, f"candidates=True {WHOLE}"),
    ("swap", {"candidates": 2**63}, "candidates=9223372036854775808 must be .* below 2"),
    ("sparseswaps", {"candidates": 0}, f"candidates=0 {WHOLE}"),
    ("swap", {"max_passes": 1.5}, f"max_passes=1.5 {WHOLE}, or None"),
    ("swap", {"tolerance": "1e-3"}, "tolerance='1e-3' must be a finite number"),
    ("swap", {"kernel": "cuda"}, "kernel='cuda' must be one of auto, numba, triton, torch"),
    ("semidefinite", {"triangles_above": math.nan}, "triangles_above=nan must be a number"),
    ("semidefinite", {"decompose": 3}, "decompose=3 must be true or false, or None"),
    ("semidefinite", {"price": math.inf}, "price=inf must be a finite number, or None"),
    ("tabu", {"iterations": 10.5}, f"iterations=10.5 {WHOLE}, or None"),
    ("scip", {"threads": 1.5}, f"threads=1.5 {WHOLE}"),
    ("scip", {"rel_gap": math.inf}, "rel_gap=inf must be a finite number"),
    ("cvxpy", {"cuts": "yes"}, "cuts='yes' must be true or false"),
    ("alps", {"rho": 10**400}, r"rho=1000.*\.\.\. must be a finite number above 0"),
    ("ria", {"power": None}, "power=None must be a finite number of at least 0"),
    ("chain", {"stages": 3}, "3 is no list of solvers"),
    ("chain", {"stages": [3]}, "3 is neither a solver's name nor a pair"),
    ("best_of", {"members": [("swap", {1: 2})]}, "neither a solver's name nor a pair"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_an_option_does_not_take_is_refused_in_a_sentence(name, options, message):
    with pytest.raises(InvalidInput, match=message) as refusal:
        get_solver(name, **options)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("solver", [info.name for info in available()])
def test_every_option_is_checked(solver):
    """But for lists of solvers, which are checked apart, and a mean, which needs a problem."""
    cls = type(get_solver(solver))
    assert set(cls.options()) - set(_checks(cls)) <= {"stages", "members", "mean"}
    for name, check in _checks(cls).items():
        default = getattr(get_solver(solver), name)
        assert check(default) == default
        with pytest.raises(InvalidInput, match=f"Solver '{solver}': option {name}="):
            get_solver(solver, **{name: complex(1)})


def test_what_means_the_same_is_converted():
    swap = get_solver(
        "swap", candidates=np.int64(3), tolerance=1, kernel=np.str_("torch"), max_passes=np.uint8(2)
    )
    assert swap == get_solver("swap", candidates=3, tolerance=1.0, kernel="torch", max_passes=2)
    kinds = {type(getattr(swap, name)) for name in swap.options()}
    assert kinds == {int, float, str}
    bounds = get_solver("branch_and_bound", hull=np.bool_(False), rel_gap=np.float32(0.5))
    assert bounds.hull is False
    assert type(bounds.rel_gap) is float


def test_updates_of_weights_check_theirs():
    with pytest.raises(InvalidInput, match=r"LeastSquares: option iterations=1\.5 must be a "):
        LeastSquares(iterations=1.5)
    with pytest.raises(InvalidInput, match="SparseGPTUpdate: option damping=nan must be a finite"):
        SparseGPTUpdate(damping=math.nan)


def test_a_solver_of_ones_own_is_checked():
    @dataclasses.dataclass(frozen=True)
    class Own(type(get_solver("wanda"))):
        power: int = option(2, least=1, below=10)
        name = "own"

    try:
        register(Own)
        with pytest.raises(InvalidInput, match=r"power=10 must be .* of at least 1 and below 10"):
            get_solver("own", power=10)
        assert get_solver("own", power=9).power == 9
    finally:
        del _SOLVERS["own"]


@pytest.mark.parametrize("seed", [-1, 1.5, 2**63, 2**70, True, None, "1", math.nan])
def test_seeds_that_no_generator_takes_are_refused(seed):
    problem = make_problem(1, 6, PerRow(keep=3))
    for name in ("wanda", "tabu"):
        with pytest.raises(InvalidInput, match=r"seed=.* must be a whole number of at least 0"):
            solve(problem, name, seed=seed)


@pytest.mark.parametrize("solver", [info.name for info in available() if not info.unavailable])
def test_the_largest_seed_works_in_every_solver(solver):
    problem = make_problem(2, 8, PerRow(keep=4))
    options = {"mean": [0.0] * 8} if solver == "dsnot" else {}
    first = solve(problem, solver, seed=2**63 - 1, **options)
    again = solve(problem, solver, seed=np.uint64(2**63 - 1), **options)
    assert torch.equal(first.mask, again.mask)


def test_more_candidates_than_there_are_weights_try_all_of_them():
    problem = make_problem(2, 10, PerRow(keep=5))
    most = solve(problem, "tabu", candidates=10**9, iterations=50)
    all_of_them = solve(problem, "tabu", candidates=10, iterations=50)
    assert torch.equal(most.mask, all_of_them.mask)
    assert most.stats["iterations"] == all_of_them.stats["iterations"]


def refused(call, *arguments, **more):
    with pytest.raises(InvalidInput) as refusal:
        call(*arguments, **more)
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options",
    [{"rounds": 1.5}, {"rounds": -1}, {"tolerance": math.nan}, {"rows": 0}, {"seed": -1}],
)
def test_an_order_of_inputs_checks_its_numbers(options):
    refused(order_inputs, torch.ones(2, 4), NM(2, 4), **options)


def test_functions_on_groups_check_their_numbers():
    weight, gram = torch.ones(2, 4), torch.eye(4)
    for wrong in (-1, math.nan, "1", True):
        refused(structured.refitted, weight, gram, torch.ones(4).bool(), wrong)
        refused(structured.eliminate, weight, gram, 2, 1, wrong)
        refused(structured.most_salient, torch.ones(4), wrong)
    for wrong in (2.5, -1, 3, True):
        refused(structured.eliminate, weight, gram, 2, wrong)
    for wrong in (0, 3, True, None, "x", [0.5] * 4, [0, 1]):
        refused(structured.input_groups, weight, gram, wrong, PerRow(keep=1))
    for wrong in ([1.0], [math.nan] * 4, "x", None):
        refused(structured.flap, weight, gram, wrong)
    refused(structured.eliminate, weight, gram, 2, 1, exchanges=1.5)
    refused(structured.expand, [[1, 0]], 2)
    refused(structured.expand, [[True, False]], 2, rows=1.5)
    refused(structured.parameter_budget, [1.0, 2.0], math.nan)
    refused(structured.parameter_budget, "x", 1.0)
    refused(order_inputs, torch.ones(2, 4), PerRow(keep=1))
    refused(order_inputs, "x", NM(2, 4))
    refused(lowest, [torch.ones(3)], math.nan)
    refused(lowest, [torch.ones(3)], 1.0, [1.0, 2.0])
    refused(lowest, [torch.tensor([math.nan])], 1.0)
    refused(cheapest_counts, [torch.ones(4)], 1.5)
    kept = structured.expand(np.array([[True, False]]), np.int64(2), rows=3)
    assert kept.tolist() == [[True, True, False, False]] * 3


@pytest.mark.parametrize("mean", ["x", [0.0], [math.nan] * 6, [[0.0] * 6]])
def test_a_mean_that_is_none_is_refused(mean):
    refused(solve, make_problem(1, 6, PerRow(keep=3)), "dsnot", mean=mean)
