import json
from dataclasses import dataclass

import pytest
import torch
from helpers import make_problem, optimum

from mipprune.cli import terminal
from mipprune.compare import Comparison, compare, part
from mipprune.report import compare_plot
from solvers import (
    NM,
    CellPattern,
    Evidence,
    InvalidInput,
    MaskProblem,
    Outcome,
    PerLayer,
    PerRow,
    Solver,
    Status,
    TracePoint,
    register,
    registry,
    solve,
)

PNG = b"\x89PNG"


@pytest.fixture
def run(run, monkeypatch):
    """Run ``mipprune compare`` in this process; its exit code, output and error output."""
    monkeypatch.setattr(terminal, "out", terminal.Console(width=100))
    return lambda *args: run("compare", *args)


@pytest.fixture
def fakes(monkeypatch):
    """Solvers with bounds at will: ``bounded`` has half the least loss, nothing for row 0.

    ``wrong`` claims three times the least loss, except for row 0; its own mask is a bad one.
    """
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))

    class Fake(Solver):
        summary = "a fake"
        patterns = (CellPattern,)
        gives_bound = True
        share = 0.5
        evidence = Evidence.GUARDED

        def _search(self, search):
            problem, clock = search.problem, search.clock
            mask = problem.pattern.round(self.score(problem.weight))
            rows = [problem.rows([r]) for r in range(problem.shape[0])]
            if problem.pattern.coupled:
                least = problem.objective(mask) / 4
            else:
                least = torch.tensor([optimum(row) for row in rows], dtype=torch.float64)
            total = float(problem.objective(mask).sum())
            trace = [TracePoint(0.0, 2 * total), TracePoint(clock.seconds, total, total / 3)]
            bound = self.bound_from(least)
            if problem.pattern.coupled:
                bound = bound.sum().reshape(1)
            return Outcome(mask, Status.TIME_LIMIT, bound, self.evidence, trace=trace)

        def score(self, weight):
            return weight.abs()

        def bound_from(self, least):
            return self.share * least

    @register
    @dataclass(frozen=True)
    class Bounded(Fake):
        name = "bounded"

        def bound_from(self, least):
            bound = self.share * least
            bound[0] = -torch.inf
            return bound

    @register
    @dataclass(frozen=True)
    class Tight(Fake):
        name = "tight"
        share = 0.9
        evidence = Evidence.CERTIFIED

    @register
    @dataclass(frozen=True)
    class Level(Fake):
        name = "level"
        share = 0.9 * (1 + 1e-12)
        evidence = Evidence.CLAIMED

    @register
    @dataclass(frozen=True)
    class Wrong(Fake):
        name = "wrong"
        share = 3.0
        evidence = Evidence.CLAIMED

        def score(self, weight):
            return -weight.abs()

        def bound_from(self, least):
            bound = self.share * least
            if len(bound) > 1:
                bound[0] = least[0] / 2
            return bound

    @register
    @dataclass(frozen=True)
    class Missing(Fake):
        name = "missing"
        requires = ("no_such_library",)

    @register
    @dataclass(frozen=True)
    class Picky(Fake):
        name = "picky"

        def _search(self, search):
            raise InvalidInput("Solver 'picky' likes no problem.")

    @register
    @dataclass(frozen=True)
    class OnlyRows(Fake):
        name = "only_rows"
        patterns = (PerRow,)


def small(pattern=None, rows=3):
    return make_problem(rows, 8, pattern or PerRow(sparsity=0.5), seed=1)


@pytest.fixture
def file(tmp_path):
    problem = make_problem(6, 16, PerRow(sparsity=0.5), seed=2)
    problem.save(tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors"


def test_gaps_are_to_the_best_bound_of_any_solver(fakes):
    problem = small()
    result = compare(problem, ["wanda", "bounded", "tight"])
    least = torch.tensor([optimum(problem.rows([r])) for r in range(3)], dtype=torch.float64)
    assert torch.allclose(result.best_bound, 0.9 * least)
    loss = problem.objective(solve(problem, "wanda").mask)
    assert torch.equal(result.loss("wanda"), loss)
    assert torch.allclose(result.gap("wanda"), (loss - 0.9 * least) / loss)
    assert bool(result.bound("wanda").isnan().all())
    best = torch.minimum(loss, result.loss("tight"))
    assert torch.equal(result.best_loss, best)
    assert torch.allclose(result.ratio("wanda"), loss / best)
    assert torch.allclose(result.best_gap, (best - 0.9 * least) / best)


def test_a_solver_knows_at_least_what_is_free(fakes):
    result = compare(small(), ["swap", "bounded"])
    assert result.bound("bounded")[0] == 0
    assert result.gap("swap")[0] == 1
    assert result.to_dict()["solvers"]["bounded"]["own_gap"][1] > 0
    assert bool(compare(small(), ["swap"]).gap("swap").isnan().all())


def test_rows_whose_bound_is_refuted_have_no_gap(fakes):
    result = compare(small(), ["swap", "wrong"])
    assert result.gap("swap").isnan().tolist() == [False, True, True]
    assert result.best_evidence == [Evidence.CLAIMED, None, None]


def test_bounds_carry_their_evidence(fakes):
    result = compare(small(), ["wanda", "bounded", "level", "tight"])
    kinds = [result.evidence(name) for name in result.solutions]
    assert kinds == [None, Evidence.GUARDED, Evidence.CLAIMED, Evidence.CERTIFIED]
    # of bounds that only rounding tells apart, the strongest counts, with its own value
    assert result.best_evidence == [Evidence.CERTIFIED] * 3
    assert torch.equal(result.best_bound, result.bound("tight"))
    record = result.to_dict()
    assert record["best"]["evidence"] == ["certified"] * 3
    found = [entry["evidence"] for entry in record["solvers"].values()]
    assert found == [None, "guarded", "claimed", "certified"]


def test_rows_that_lose_nothing_have_no_gap(fakes):
    problem = small()
    weight = problem.weight.clone()
    weight[1, :4] = 0  # half of the weights can go at no loss
    problem = MaskProblem(weight, problem.gram, problem.pattern)
    result = compare(problem, ["magnitude", "swap", "tight", "frank_wolfe"])
    for name in result.solutions:
        assert result.gap(name)[1] == 0
        assert result.ratio(name)[1] == 1
    assert result.to_dict()["solvers"]["frank_wolfe"]["own_gap"][1] == 0


def test_with_a_shared_budget_only_sums_count(fakes):
    problem = small(PerLayer(sparsity=0.5))
    result = compare(problem, ["swap", "tight", "bounded"])
    loss = float(solve(problem, "swap").objective.sum())
    bound = 0.9 * float(result.solutions["tight"].objective.sum()) / 4
    assert result.best_evidence == [Evidence.CERTIFIED]
    assert len(result.to_dict()["solvers"]["tight"]["bound"]) == 1
    assert result.loss("swap").tolist() == [pytest.approx(loss)]
    assert result.gap("swap").tolist() == [pytest.approx((loss - bound) / loss)]
    assert result.bound("bounded").tolist() == [0]


def test_a_refuted_bound_is_reported_and_not_used(fakes):
    result = compare(small(), ["swap", "wrong", "tight"])
    assert result.refuted == {"wrong": 2}
    assert result.to_dict()["refuted"] == {"wrong": {"units": 2, "evidence": "claimed"}}
    assert torch.equal(result.best_bound, result.bound("tight"))
    assert bool((result.best_gap >= 0).all())


def test_solvers_that_cannot_run_are_listed(fakes):
    result = compare(small(NM(keep=2, group=4)), ["missing", "only_rows", "wanda", "picky"])
    assert list(result.solutions) == ["wanda"]
    assert list(result.refused) == ["missing", "only_rows", "picky"]
    assert "pip install no_such_library" in result.refused["missing"]
    assert "cannot do the pattern 2:4" in result.refused["only_rows"]
    assert "likes no problem" in result.refused["picky"]
    with pytest.raises(InvalidInput, match=r"no_such_library.*likes no problem"):
        compare(small(), ["missing", "picky"])


def test_nothing_runs_when_the_request_is_wrong(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a solver ran")

    monkeypatch.setattr(Solver, "solve", fail)
    for solvers, options in (
        (["wanda", "magic"], {}),
        ([], {}),
        (["wanda"], {"time_limit": 0.0}),
        (["wanda"], {"start": "magic"}),
    ):
        with pytest.raises(InvalidInput):
            compare(small(), solvers, **options)


def test_a_start_is_for_searches_only():
    problem = make_problem(4, 16, PerRow(sparsity=0.5), seed=5)
    result = compare(problem, ["magnitude", "swap"], start="ria")
    for name, start in (("magnitude", None), ("swap", "ria")):
        assert torch.equal(result.solutions[name].mask, solve(problem, name, start=start).mask)


def test_the_observer_hears_of_every_solver():
    heard = []
    compare(small(), ["wanda", "swap"], observer=lambda name, progress: heard.append(name))
    assert list(dict.fromkeys(heard)) == ["wanda", "swap"]


@pytest.mark.parametrize("pattern", [PerRow(keep=100), PerRow(keep=0), PerLayer(keep=350)])
def test_patterns_that_leave_little_to_decide(pattern, tmp_path):
    result = compare(make_problem(4, 100, pattern), ["wanda", "swap"])
    assert result.ratio("swap").tolist() == [1.0] * len(result.best_loss)
    compare_plot(result, tmp_path / "plot.png")


@pytest.mark.parametrize("kind", ["zero rows", "linear"])
def test_losses_of_any_sign_can_be_drawn(fakes, tmp_path, kind):
    problem = make_problem(3, 8, PerRow(sparsity=0.5), kind)
    result = compare(problem, ["wanda", "swap", "bounded"])
    assert bool((result.ratio("swap") >= 1).all())
    compare_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_part_takes_the_first_rows_and_inputs():
    whole = make_problem(5, 10, PerRow(sparsity=0.5), "linear")
    some = part(whole, NM(keep=2, group=4), 3, 8)
    assert some.shape == (3, 8)
    mask = torch.ones(5, 10, dtype=torch.bool)
    mask[:3, :8] = solve(some, "wanda").mask
    assert torch.allclose(whole.objective(mask)[:3], some.objective(mask[:3, :8]))
    assert part(whole, PerRow(keep=1)).shape == (5, 10)


def test_command_line(run, file, fakes, tmp_path):
    record_file, plot = tmp_path / "out" / "c.json", tmp_path / "out" / "c.png"
    code, printed, errors = run(
        file, "--sparsity", 0.5, "--rows", 4, "--inputs", 8, "--time-limit", 5,
        "--solvers", "wanda, swap,missing,bounded,wrong", "--json", record_file, "--plot", plot,
    )  # fmt: skip
    assert code == 0
    assert "4 rows, 8 inputs, 0.5 sparsity per row, at most 5 s per solver" in printed
    assert "guarded: Derived in floating point" in printed
    assert "claimed: Another program's word" in printed
    assert "local optimum" in printed
    assert "not run" in printed
    assert "pip install no_such_library" in errors
    record = json.loads(record_file.read_text())
    assert record["settings"]["solvers"] == ["wanda", "swap", "missing", "bounded", "wrong"]
    assert record["settings"]["time_limit"] == 5
    assert record["environment"]["no_such_library"] == "not installed"
    assert list(record["refused"]) == ["missing"]
    problem = part(MaskProblem.load(file, PerRow(sparsity=0.5)), PerRow(sparsity=0.5), 4, 8)
    for name in ("wanda", "swap"):
        entry = record["solvers"][name]
        assert entry["objective"] == pytest.approx(solve(problem, name).objective.tolist())
        assert entry["bound"] is None
    bounded = record["solvers"]["bounded"]
    assert bounded["evidence"] == "guarded"
    for row in (1, 2, 3):
        loss, bound = record["solvers"]["swap"]["objective"][row], bounded["bound"][row]
        assert record["solvers"]["swap"]["gap"][row] == pytest.approx((loss - bound) / loss)
    assert bounded["status"] == "TIME_LIMIT"
    assert [sorted(point) for point in bounded["trace"]] == [["bound", "objective", "time"]] * 2
    assert bounded["seconds"] == bounded["stats"]["time"] > 0
    assert plot.read_bytes().startswith(PNG)
    assert sorted(path.name for path in plot.parent.iterdir()) == ["c.json", "c.png"]


def test_command_line_with_a_shared_budget(run, file, fakes, tmp_path):
    code, printed, errors = run(
        file, "--sparsity", 0.5, "--scope", "layer", "--solvers", "swap,wrong",
        "--json", tmp_path / "c.json", "--plot", tmp_path / "c.png", "--start", "ria",
    )  # fmt: skip
    assert code == 0
    assert "0.5 sparsity per layer" in printed
    record = json.loads((tmp_path / "c.json").read_text())
    assert record["gaps_are_per"] == "layer"
    assert len(record["solvers"]["swap"]["objective"]) == 6
    assert len(record["solvers"]["swap"]["gap"]) == 1
    # A claim that its own mask refutes leaves what is free: that no loss is negative.
    assert record["refuted"] == {}
    assert record["solvers"]["wrong"]["bound"] == [0.0]
    assert record["solvers"]["swap"]["gap"] == [1.0]
    assert "lie above the loss" not in errors
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda,magic"], "no solver 'magic'"),
        (["no.safetensors", "--sparsity", "0.5", "--solvers", "magic"], "no solver 'magic'"),
        (["no.safetensors", "--sparsity", "0.5", "--solvers", "wanda"], "no problem file"),
        (["FILE", "--solvers", "wanda"], "either --sparsity"),
        (["FILE", "--sparsity", "0.5", "--solvers", ","], "name at least one"),
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda", "--rows", "9"], "has 6 rows"),
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda", "--inputs", "0"], "has 16 inputs"),
        (["FILE", "--pattern", "2:4", "--solvers", "wanda", "--inputs", "6"], "divisible by 4"),
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda", "--time-limit", "0"], "positive"),
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda", "--start", "magic"], "'magic'"),
        (["FILE", "--sparsity", "0.5", "--solvers", "wanda", "--json", "."], "cannot be written"),
        (["FILE", "--sparsity", "0.5", "--solvers", "missing"], "pip install no_such_library"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(run, fakes, file, arguments, message):
    code, printed, errors = run(*(file if text == "FILE" else text for text in arguments))
    assert code == 2
    assert message in errors
    assert errors.count("Error:") == 1
    assert "Written" not in printed


def test_the_record_is_json_ready():
    result = compare(small(), ["wanda", "swap"])
    assert isinstance(result, Comparison)
    assert json.loads(json.dumps(result.to_dict()))["settings"]["rows"] == 3
