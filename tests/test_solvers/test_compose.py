import pytest
import torch
from helpers import make_problem, optimum, random_mask

from solvers import NM, InvalidInput, PerLayer, PerRow, Status, solve
from solvers.clock import Clock
from solvers.frank_wolfe import FrankWolfe, relaxed_mask

PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_chain_is_its_stages_by_hand(pattern):
    problem = make_problem(6, 24, pattern)
    chain = solve(problem, "chain", stages=["frank_wolfe", ["swap", {"candidates": 1}]])
    relaxed = solve(problem, "frank_wolfe")
    by_hand = solve(problem, "swap", start=relaxed.mask, candidates=1)
    assert torch.equal(chain.mask, by_hand.mask)
    assert chain.status is Status.LOCAL_OPTIMUM
    losses = [stage["loss"] for stage in chain.stats["stages"]]
    assert losses == [float(relaxed.objective.sum()), float(by_hand.objective.sum())]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_best_of_several_is_the_best_of_each_row(pattern):
    problem = make_problem(6, 24, pattern)
    members = ["wanda", "ria", "swap", "frank_wolfe"]
    best = solve(problem, "best_of", members=members)
    each = torch.stack([solve(problem, name).objective for name in members])
    if pattern.coupled:
        assert float(best.objective.sum()) == float(each.sum(dim=1).min())
    else:
        assert torch.equal(best.objective, each.amin(dim=0))
    assert [entry["solver"] for entry in best.stats["members"]] == members


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_restarts_begin_at_the_nearest_mask_and_improve(pattern):
    problem = make_problem(6, 32, pattern, seed=4)
    one = solve(problem, "restarts", restarts=1)
    z = relaxed_mask(problem, FrankWolfe(), Clock())
    assert torch.equal(one.mask, solve(problem, "swap", start=pattern.round(z)).mask)
    many = solve(problem, "restarts", restarts=12)
    assert float(many.objective.sum()) < float(one.objective.sum())


def test_rows_that_do_not_depend_on_each_other_find_their_optima():
    problem = make_problem(4, 12, PerRow(sparsity=0.5), seed=8)
    found = float(solve(problem, "chain", stages=["frank_wolfe", "tabu"]).objective.sum())
    assert found == pytest.approx(optimum(problem))


def test_a_time_limit_ends_what_does_not_end_by_itself():
    problem = make_problem(3, 32, PerRow(sparsity=0.5))
    members = ["wanda", ["tabu", {"iterations": None}]]
    for name, option in (("chain", "stages"), ("best_of", "members")):
        solution = solve(problem, name, time_limit=0.2, **{option: members})
        assert solution.status is Status.TIME_LIMIT
        assert solution.stats["time"] < 5
        assert float(solution.objective.sum()) <= float(solve(problem, "wanda").objective.sum())


def test_members_are_checked():
    problem = make_problem(2, 8, PerRow(sparsity=0.5))
    with pytest.raises(InvalidInput, match="no solver 'magic'"):
        solve(problem, "chain", stages=["magic"])
    with pytest.raises(InvalidInput, match="at least one solver"):
        solve(problem, "best_of", members=[])
    with pytest.raises(InvalidInput, match="neither a solver's name nor a pair"):
        solve(problem, "chain", stages=[["swap", 3]])
    with pytest.raises(InvalidInput, match="needs a time limit"):
        solve(problem, "tabu", iterations=None)
    with pytest.raises(InvalidInput, match="restarts=0"):
        solve(problem, "restarts", restarts=0)
    text = solve(problem, "chain", stages="wanda, swap")
    start = random_mask(problem)
    assert torch.equal(text.mask, solve(problem, "swap", start="wanda").mask)
    assert torch.equal(
        solve(problem, "chain", stages=["swap"], start=start).mask,
        solve(problem, "swap", start=start).mask,
    )
