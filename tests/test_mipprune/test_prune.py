import pytest
import torch
from models import FAMILIES, tiny_model, tiny_tokens
from torch import nn

import mipprune
from mipprune.calibration import Windows
from mipprune.models import all_layers, find_blocks, prunable_layers
from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, solve

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
PATTERNS = [PerRow(sparsity=0.6), NM(keep=2, group=4), PerLayer(sparsity=0.6)]


def prune(model, pattern=PATTERNS[0], *args, **options):
    return mipprune.prune(model, None, WINDOWS, pattern, *args, samples=8, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_to_exact_counts(family):
    model = tiny_model(family)
    head = model.get_output_embeddings().weight.clone()
    report = prune(model, NM(keep=2, group=4))
    name, blocks = find_blocks(model)
    layers = all_layers(name, blocks)
    assert [layer.name for layer in layers] == [result.name for result in report.layers]
    for layer in layers:
        groups = (layer.weight != 0).reshape(-1, 4).sum(dim=1)
        assert bool((groups == 2).all())
        assert torch.equal(layer.weight != 0, report.masks[layer.name])
    assert torch.equal(model.get_output_embeddings().weight, head)
    covered = report.coverage
    assert covered.prunable == sum(layer.weight.numel() for layer in layers)
    uncovered = sum(model.get_parameter(name).numel() for name in covered.uncovered)
    assert covered.prunable + covered.routers + uncovered == covered.total
    assert covered.share > 0.95
    assert report.sparsity == 0.5
    seen = [layer for layer in report.layers if layer.tokens]
    # A state-space layer may use the weight of its dt_proj without calling the layer.
    unseen = [layer.name for layer in report.layers if not layer.tokens]
    assert all(name.endswith("mamba.dt_proj") for name in unseen)
    assert sum(layer.loss for layer in seen) < sum(layer.loss_start for layer in seen)
    assert report.replay_error == 0.0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "ria", "swap"])
def test_every_solver_and_pattern(solver, pattern):
    model = tiny_model("llama")
    report = prune(model, pattern, solver)
    for result in report.layers:
        assert pattern.is_feasible(report.masks[result.name])
        assert result.loss > 0
        assert 0 < result.relative_error < 1
        if solver == "swap":
            assert result.status == "LOCAL_OPTIMUM"
            assert result.loss_start == result.loss_reference > result.loss
        else:
            assert result.loss_start is None
            assert (result.loss == result.loss_reference) == (solver == "wanda")


def test_later_blocks_see_the_pruned_ones_unless_told_otherwise():
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    reports = [prune(dense, grams="dense"), prune(pruned, grams="pruned")]
    first, last = reports[0].layers[0].name, reports[0].layers[-1].name
    assert torch.equal(*(report.masks[first] for report in reports))
    assert not torch.equal(*(report.masks[last] for report in reports))
    problem = mipprune.layer_problem(tiny_model("llama"), None, WINDOWS, last)
    expected = solve(MaskProblem(problem.weight, problem.gram, PATTERNS[0]), "swap")
    assert torch.equal(reports[0].masks[last], expected.mask)


def test_propagated_grams_are_those_of_the_pruned_model():
    model = tiny_model("gpt2")
    report = prune(model)
    last = report.layers[-1]
    # Rebuild the last layer's problem: its own block dense, everything before it pruned.
    again = tiny_model("gpt2")
    name, blocks = find_blocks(again)
    for i, block in enumerate(blocks[:-1]):
        for layer in prunable_layers(block, f"{name}.{i}"):
            layer.weight.masked_fill_(~report.masks[layer.name], 0.0)
    problem = mipprune.layer_problem(again, None, WINDOWS, last.name)
    loss = problem.objective(report.masks[last.name]).sum()
    assert float(loss) == pytest.approx(last.loss, rel=1e-4)


def test_the_same_seed_gives_the_same_hash(embedded):
    hashes = []
    for seed in (0, 0, 1):
        loaded = mipprune.load_model("embedded", torch.device("cpu"))
        report = mipprune.prune(
            loaded.model, loaded.tokenizer, None, NM(2, 4), samples=4, seqlen=64, seed=seed
        )
        hashes.append((report.mask_hash, report.calibration["sha256"]))
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[2][0]
    assert hashes[0][1] != hashes[2][1]


def test_solver_options_and_limits_reach_the_solver():
    report = prune(tiny_model("llama"), solver_options={"max_passes": 1, "candidates": 1})
    assert {layer.status for layer in report.layers} == {"ITERATION_LIMIT"}


class _Unused(nn.Module):
    """A block with a layer that no token reaches, and an input that is always zero."""

    def __init__(self, block):
        super().__init__()
        self.block, self.unused = block, nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            block.input_layernorm.weight[3] = 0.0

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def test_unused_layers_and_dead_inputs_are_handled_and_said():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList(_Unused(block) for block in model.model.layers)
    report = prune(model)
    results = {layer.name: layer for layer in report.layers}
    unused = results["model.layers.0.unused"]
    assert unused.tokens == 0
    assert unused.note == "saw no calibration token: pruned by magnitude"
    assert any("model.layers.0.unused saw no calibration token" in w for w in report.warnings)
    weight = model.model.layers[0].unused.weight
    expected = solve(
        MaskProblem(nn.Linear(32, 32).weight * 0 + weight, torch.eye(32), PATTERNS[0]), "magnitude"
    )
    assert torch.equal(weight != 0, expected.mask)
    assert PATTERNS[0].is_feasible(report.masks[unused.name])
    query = results["model.layers.0.block.self_attn.q_proj"]
    assert query.dead_inputs == 1
    assert not bool(report.masks[query.name][:, 3].any())


def test_a_sparse_model_keeps_its_zeros_from_its_current_mask():
    model = tiny_model("gpt2")
    first = prune(model)
    again = prune(model, PATTERNS[0], start="current")
    assert again.mask_hash == first.mask_hash
    assert again.loss == again.loss_start == 0.0
    assert again.settings["start"] == "current"


def test_a_current_mask_that_does_not_follow_the_pattern_is_refused_by_name():
    model = tiny_model("mixtral")
    prune(model, NM(2, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for pattern in PATTERNS[0], PATTERNS[2]:
        with pytest.raises(
            InvalidInput, match=r"layers\.0\.\S+ has 50\.0% zeros, which do not follow"
        ):
            prune(model, pattern, start="current")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(InvalidInput, match=r"layers\.0\.\S+ has 0\.0% zeros"):
        prune(tiny_model("mixtral"), start="current")


def test_low_coverage_is_said():
    model = tiny_model("llama")
    model.model.layers[0].extra = nn.Parameter(torch.zeros(100, 100))
    said = "left dense: model.layers.0.extra."
    assert any(said in warning for warning in prune(model).warnings)


def test_a_model_is_left_alone_when_it_is_refused():
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=r"Layer model.layers.0.* divisible by 5"):
        prune(model, NM(1, 5))
    with pytest.raises(InvalidInput, match="no solver 'magic'"):
        prune(model, PATTERNS[0], "magic")
    with pytest.raises(InvalidInput, match="no solver 'magic'"):
        prune(model, PATTERNS[0], "swap", "magic")
    with pytest.raises(InvalidInput, match="no option 'magic'"):
        prune(model, solver_options={"magic": 1})
    with pytest.raises(InvalidInput, match="'sequential' or 'dense'"):
        prune(model, grams="both")
    with pytest.raises(InvalidInput, match="no prunable layer 'head'"):
        mipprune.layer_problem(model, None, WINDOWS, "head")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(InvalidInput, match=r"layers.2.mlp.up_proj has NaN or infinite weights"):
        prune(model)


def test_the_swap_search_keeps_its_promise_on_the_embedded_model(embedded):
    """The project's headline, on few windows: far below Wanda, and a better model."""
    evaluation = mipprune.calibration.cut_windows(
        *reversed(mipprune.calibration.read_texts(None, "evaluation")), embedded.tokenizer, 256, 24
    )
    perplexities = {}
    for solver in ("wanda", "swap"):
        loaded = mipprune.load_model("embedded", torch.device("cpu"))
        report = mipprune.prune(
            loaded.model, loaded.tokenizer, None, PATTERNS[0], solver, samples=32, seqlen=256
        )
        perplexities[solver] = mipprune.perplexity(loaded.model, evaluation).perplexity
    assert 1 - report.loss / report.loss_start >= 0.4
    dense = mipprune.perplexity(embedded.model, evaluation).perplexity
    assert dense < perplexities["swap"] < perplexities["wanda"]
