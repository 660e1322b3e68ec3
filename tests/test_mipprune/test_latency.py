"""A budget on time, with a clock that counts the weights that linear layers multiply with."""

import itertools

import pytest
import torch
from models import tiny_model, tiny_tokens
from torch import nn

import mipprune
from mipprune import InvalidInput, Latency, Windows, shrink
from mipprune.placement import FromHost, Placement
from mipprune.structured.latency import TimeCurves, _monotone
from mipprune.structured.passes import Pass, _median_rank, compared
from mipprune.structured.shrink import share_removed

WINDOWS = Windows(tiny_tokens(), "test")
SIZE = {"samples": 5, "seqlen": 24, "batch_size": 2}


@pytest.fixture
def clock():
    """Goes on by a second for every weight of a linear layer that runs."""
    now = [0.0]

    def count(module, *_):
        if isinstance(module, nn.Linear):
            now[0] += module.weight.numel()

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    yield lambda: now[0]
    hook.remove()


def weights(model):
    """What the clock shows for a pass."""
    return sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Linear))


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_counts_are_the_cheapest_in_time(clock, share):
    dense = weights(tiny_model("llama"))
    made = shrink(
        tiny_model("llama"), None, WINDOWS, latency=Latency(share, 8, clock=clock), **SIZE
    )
    report = made.report
    assert weights(made.model) <= share * dense
    time = report.latency
    assert time["dense_seconds"] == dense
    assert time["outside_seconds"] == 96 * 32
    assert time["measured"]["of_dense"] == pytest.approx(weights(made.model) / dense)
    assert time["measured"]["interval"] == [time["measured"]["of_dense"]] * 2
    # a neuron has 3 x 32 weights in each of 3 blocks, a group 2 x 2 x 256 + 2 x 256
    each = {"neurons": 288, "kv_groups": 3 * 1536}
    options = {}
    for one in report.curves:
        counts, saved = (time["curves"][one["kind"]][key] for key in ("counts", "saved_seconds"))
        assert saved == [each[one["kind"]] * (counts[0] - count) for count in counts]
        options[one["kind"]] = [
            (count, cost, each[one["kind"]] * (one["counts"][0] - count))
            for count, cost in zip(one["counts"], one["costs"], strict=True)
        ]
    cheapest = min(
        sum(one[1] for one in pair)
        for pair in itertools.product(*options.values())
        if sum(one[2] for one in pair) >= (1 - share) * dense * 1.001
    )
    taken = 0.0
    for kind, some in options.items():
        left = report.counts[kind][1] if kind in report.counts else some[0][0]
        taken += {count: cost for count, cost, _ in some}[left]
    assert taken <= cheapest * (1 + 1e-9)
    assert report.warnings == []
    assert report.to_dict()["latency"] == time


def test_blocks_of_other_shapes_are_timed_too(clock):
    """Neurons are in the first block alone; the others' experts are timed, and stay."""
    model = tiny_model("deepseek_v3")
    made = shrink(model, None, WINDOWS, latency=Latency(0.95, 24, clock=clock), **SIZE)
    assert made.report.latency["curves"]["neurons"]["saved_seconds"][-1] == 47 * 96
    assert made.report.latency["measured"]["of_dense"] <= 0.95


def test_a_model_whose_blocks_visit_the_device(clock):
    found = []
    for visiting in (False, True):
        model = tiny_model("llama")
        placement = FromHost(model, torch.device("cpu")) if visiting else None
        latency = Latency(0.8, 8, clock=clock)
        made = shrink(model, None, WINDOWS, latency=latency, placement=placement, **SIZE)
        found.append((made.report.latency, made.report.mask_hash))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "what", "says"),
    [
        ("llama", {"latency": Latency(0.05, 8)}, r"still takes 30\.5% .* give at least 0\.306"),
        ("llama", {"latency": Latency(0.9, 65)}, "give --latency-tokens 64 or less"),
        ("llama", {"latency": Latency(0.9, 8), "parameters": 0.5}, "Give one of these"),
        ("llama", {"latency": Latency(0.9, 8), "neurons": 0.5}, "Give one of these"),
        # transformers 4.57 and 5 build the smaller configuration differently
        ("olmoe", {"latency": Latency(0.9, 8)}, "of type olmoe (does not run|cannot be removed)"),
        ("bloom", {"latency": Latency(0.9, 8)}, "type bloom has no number of MLP neurons"),
    ],
)
def test_refusals(clock, family, what, says):
    model = tiny_model(family)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    object.__setattr__(what["latency"], "clock", clock)
    with pytest.raises(InvalidInput, match=says):
        shrink(model, None, WINDOWS, **what, **SIZE)
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_the_smallest_share_that_is_named_can_be_had(clock):
    with pytest.raises(InvalidInput) as refused:
        shrink(tiny_model("llama"), None, WINDOWS, latency=Latency(0.05, 8, clock=clock), **SIZE)
    least = float(str(refused.value).split()[-1].rstrip("."))
    latency = Latency(least, 8, clock=clock)
    made = shrink(tiny_model("llama"), None, WINDOWS, latency=latency, **SIZE)
    assert made.report.latency["measured"]["of_dense"] <= least


def test_no_time_to_be_saved_is_said():
    latency = Latency(0.9, 8, clock=itertools.count().__next__)
    with pytest.raises(InvalidInput, match="no less time here with fewer KV groups and MLP"):
        shrink(tiny_model("llama"), None, WINDOWS, latency=latency, **SIZE)


def test_a_missed_target_is_said(clock):
    """Time that is there only when whole models are compared: the clock runs on then."""
    late = []

    def slow():
        if late:
            late.append(0)
        return clock() + 3000.0 * len(late)

    class Watching(mipprune.Observer):
        def phase(self, text):
            if text == "time of a pass":
                late.append(0)

    latency = Latency(0.8, 8, clock=slow)
    observer = Watching()
    made = shrink(tiny_model("llama"), None, WINDOWS, latency=latency, observer=observer, **SIZE)
    measured = made.report.latency["measured"]
    assert measured["interval"][0] > 0.8
    assert any("more than the 0.8 that was asked for" in one for one in made.report.warnings)


@pytest.mark.parametrize("changes", [{"share": 1.0}, {"share": 0.0}, {"tokens": 0}, {"batch": 0}])
def test_nonsense_is_refused(changes):
    with pytest.raises(InvalidInput):
        Latency(**{"share": 0.5, **changes})


def test_ratios_are_of_rounds_in_turn():
    """Two models whose passes take 2 and 1 seconds, then 4 and 2, ..., but twice the reverse."""
    placements = [Placement(tiny_model("llama")) for _ in range(2)]
    taken = [(5, 5), *((2**n, 2 ** (n - 1)) for n in range(1, 8)), (5, 10), (10, 20)]
    passes = iter(one for pair in taken for one in pair)
    now = [0.0, 0]

    def clock():
        if now[1] % 8 == 1:  # the end of what lies outside the blocks
            now[0] += next(passes)
        now[1] += 1
        return now[0]

    found = compared(*placements, tiny_tokens(1, 8), clock)
    # of 2, 4, 5, 8, 10, 16, 32, 64, 128 and of 1, 2, 4, 8, 10, 16, 20, 32, 64
    assert (found.dense, found.smaller, found.ratio, found.rounds) == (10.0, 10.0, 0.5, 9)
    assert found.interval == (0.5, 2.0)  # the second of nine from either end


def test_the_interval_covers_the_median():
    """By the binomial's table: 15 rounds, the 4th smallest and largest, 96.5 %."""
    assert [_median_rank(count) for count in (6, 9, 15, 25, 51)] == [0, 1, 3, 7, 18]


def test_curves_never_fall():
    assert _monotone([0.0, 2.0, 1.0, 4.0]) == (0.0, 1.5, 1.5, 4.0)
    assert _monotone([0.0, 1.0, 5.0, 3.0, 1.0, 9.0]) == (0.0, 1.0, 3.0, 3.0, 3.0, 9.0)
    assert _monotone([0.0, -3.0, -1.0]) == (0.0, 0.0, 0.0)
    curves = TimeCurves(100.0, 20.0, {"neurons": (8, 4, 2)}, {"neurons": (0.0, 10.0, 30.0)})
    assert curves.parts("neurons", [8, 6, 4, 3, 2]) == [0, 500, 1000, 2000, 3000]


def test_shares_that_name_counts():
    """As `counts_left` takes them."""
    for count in (2, 4, 7, 96, 704, 11008):
        for left in range(1, count, max(1, count // 100)):
            share = share_removed(count, left)
            assert count - int(count * share) == left
            assert share < 1
    assert (share_removed(704, 544), share_removed(4, 3)) == (0.2273, 0.25)


def test_a_pass_is_the_whole_model(clock):
    model = tiny_model("llama")
    assert Pass(Placement(model), tiny_tokens(1, 8), clock).seconds() == weights(model)


def test_command(run, tmp_path, monkeypatch, clock):
    """The recipe names what was chosen, and so repeats it."""
    import mipprune.structured.latency as module

    monkeypatch.setattr(module.Latency, "__init__", _with(module.Latency.__init__, clock))
    tokenizer = mipprune.load_model("embedded", torch.device("cpu")).tokenizer
    model = tmp_path / "model"
    tiny_model("llama", vocab_size=len(tokenizer), intermediate_size=192).save_pretrained(model)
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Command {n} lists the files of a folder.\n" for n in range(200)))
    fast = ["--samples", "4", "--seqlen", "64", "--calibration", text, "--multiple-of", "16"]
    first, second = tmp_path / "first", tmp_path / "second"
    budget = ["--latency", "0.9", "--latency-tokens", "32"]
    code, printed, _ = run("shrink", model, *budget, "--out", first, *fast)
    assert code == 0
    assert "asked for: at most 0.9" in " ".join(printed.split())
    assert "at most 0.9 of the large model's time on cpu" in (first / "README.md").read_text()
    recipe = (first / "recipe.yaml").read_text()
    assert "latency" not in recipe
    assert "neurons: 0." in recipe
    code, _, _ = run("shrink", model, "--config", first / "recipe.yaml", "--out", second)
    assert code == 0
    weights_of = [(out / "model.safetensors").read_bytes() for out in (first, second)]
    assert weights_of[0] == weights_of[1]
    both = [*budget, "--parameters", "0.8", "--out", tmp_path / "none"]
    code, _, errors = run("shrink", model, *both, *fast)
    assert code == 2
    assert "Give one of these" in errors


def _with(init, clock):
    def with_clock(self, *args, **kwargs):
        init(self, *args, **{**kwargs, "clock": clock})

    return with_clock
