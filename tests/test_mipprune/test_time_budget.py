import math
import sys

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune import Allocation, LayerStep, layer, time_budget
from mipprune.calibration import Windows
from mipprune.defaults import BEST_IN_TIME, Method, chosen_method
from mipprune.models import all_layers, find_blocks
from mipprune.ranks import Ranks
from mipprune.time_budget import TimeBudget, parse_seconds
from solvers import InvalidInput, MaskProblem, PerRow, Status, solve

WINDOWS = Windows(tiny_tokens(windows=4, length=32), "random")
SIZE = {"samples": 4, "batch_size": 4}


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = FakeClock()
    for module in (time_budget, layer, sys.modules["mipprune.prune"]):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 m", 120)]
)
def test_times_as_they_are_written(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-5m", "ten", "5 min", "m", "1e3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InvalidInput, match="is no time"):
        parse_seconds(text)


def test_seconds_are_shared_out_by_cost_and_less_what_passes_besides(clock):
    # Costs 1 : 4 : 5 (rows times squared inputs).
    shapes = {"a": (1, 10), "b": (1, 20), "c": (5, 10)}
    budget = TimeBudget(100.0, shapes)
    assert budget.limit("a") == pytest.approx(10)
    clock.now += 10
    budget.spent("a", 10.0)
    clock.now += 2  # forwards: as much again for each unit of cost still to come
    assert budget.limit("b") == pytest.approx((88 - 9 * 2) * 4 / 9)
    clock.now += 3  # ended by itself; the rest is left to c
    budget.spent("b", 3.0)
    assert budget.limit("c") == pytest.approx(85 - 5 * 2 / 5)
    clock.now += 1000
    assert 0 < budget.limit("c") < 0.01


def test_a_resumed_run_has_its_layers_part(clock):
    shapes = {"a": (1, 10), "b": (1, 20), "c": (5, 10)}
    budget = TimeBudget.going_on(100.0, 5.0, shapes, {"b"})
    assert budget.limit("a") == pytest.approx((60 - 5) / 6)
    TimeBudget.going_on(100.0, 5.0, shapes, shapes.keys())  # nothing left to do


def test_every_search_is_limited_and_all_together_take_the_budget(clock, monkeypatch):
    limits, solve = [], layer.solve

    def timed(problem, name, *, time_limit=None, **options):
        if name == "swap":
            limits.append(time_limit)
            clock.now += time_limit
        return solve(problem, name, **options)

    monkeypatch.setattr(layer, "solve", timed)
    model = tiny_model("llama")
    layers = all_layers(*find_blocks(model))
    report = mipprune.prune(
        model, None, WINDOWS, PerRow(sparsity=0.5), "swap", time_budget=60.0, **SIZE
    )
    assert math.fsum(limits) == pytest.approx(60)
    costs = [rows * inputs**2 for rows, inputs in (one.weight.shape for one in layers)]
    assert limits == pytest.approx([60 * cost / sum(costs) for cost in costs])
    assert report.settings["time_budget"] == 60.0
    assert any("a repeat may choose others" in warning for warning in report.warnings)
    for one in layers:
        assert PerRow(sparsity=0.5).is_feasible(one.weight != 0)


def test_where_no_solver_is_named_one_goes_on_searching():
    nothing = (None, None, None, None)
    assert chosen_method(*nothing, more_said=False, in_time=True) == BEST_IN_TIME
    assert chosen_method(*nothing, more_said=True, in_time=True).solver == "chain"
    assert chosen_method(None, "gain", None, None, more_said=False, in_time=True) == Method(
        "chain", "gain"
    )
    assert chosen_method("swap", None, None, None, more_said=False, in_time=True) == Method("swap")


def test_a_joint_search_is_limited_from_its_first_stage_on():
    layer = tiny_model("llama").model.layers[0].self_attn.q_proj
    problem = MaskProblem(layer.weight.detach(), torch.eye(layer.in_features), PerRow(sparsity=0.5))
    solution = solve(problem, "joint", time_limit=1e-9)
    assert solution.status is Status.TIME_LIMIT
    assert problem.pattern.is_feasible(solution.mask)


def test_an_allocation_within_a_budget_measures_with_masks_that_need_no_time():
    rules = []
    for options in (
        {"solver": "tabu", "time_budget": 1.0},
        {"solver": "wanda"},
    ):
        report = mipprune.prune(
            tiny_model("llama"), None, WINDOWS, PerRow(sparsity=0.5), allocation=Allocation(),
            layer_step=LayerStep(update="least_squares"), **options, **SIZE,
        )  # fmt: skip
        rules.append(report.settings["rules"])
    assert rules[0] == rules[1]


def test_budgets_that_cannot_be_kept_are_refused():
    model = tiny_model("llama")
    before = all_layers(*find_blocks(model))[0].weight.clone()
    for options, message in [
        ({"time_budget": 0.0}, "leaves no time"),
        ({"time_budget": math.nan}, "leaves no time"),
        ({"time_budget": 5.0, "ranks": Ranks(0, 2)}, "a time budget is for one"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            mipprune.prune(model, None, WINDOWS, PerRow(sparsity=0.5), **options, **SIZE)
    assert torch.equal(before, all_layers(*find_blocks(model))[0].weight)
