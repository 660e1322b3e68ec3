import copy
import json

import pytest
import torch
from models import tiny_model, tiny_tokens
from runs import content
from transformers import AutoModelForCausalLM

import mipprune
from mipprune import InvalidInput, Rules, Windows
from mipprune.capture import forward
from mipprune.certify import certify
from mipprune.folder import ModelFolder, build_empty
from mipprune.job import prune_to_folder
from mipprune.journal import FileJournal
from mipprune.masks import parse_start
from mipprune.models import LoadedModel
from mipprune.opening import Source
from mipprune.permute import find_orders
from mipprune.placement import FromFolder, FromHost, Placement
from mipprune.settings import Settings
from mipprune.symmetry import neurons
from solvers import NM, PerRow

CPU = torch.device("cpu")
WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
EVERYTHING = ["neurons", "values", "residual"]
TWO_FOUR = Rules(NM(2, 4))
NEURONS = ["llama", "gpt2", "opt", "gemma2", "phi", "phi3", "glm4", "gpt_neox", "gpt_neo"]
NEURONS += ["falcon", "qwen3", "mistral", "olmo2", "gemma", "deepseek_v3"]


def skewed(family, seed=0, **changes):
    """A tiny model in which few neurons, all at the same places, do most."""
    model = tiny_model(family, seed, **changes)
    with torch.no_grad():
        for one in neurons(Placement(model)):
            coupling = one.coupling
            generator = torch.Generator().manual_seed(seed)
            scale = torch.exp(0.3 * torch.randn(coupling.count, generator=generator)).sort().values
            coupling.reader.weight.mul_(scale)
    return model


def same(a, b):
    tokens = tiny_tokens(2, 20, seed=1)
    with torch.no_grad():
        one, other = forward(a, tokens), forward(b, tokens)
    return torch.allclose(one, other, atol=1e-5 * float(one.abs().max()), rtol=0)


def reordered(dense, orders):
    again = copy.deepcopy(dense)
    mipprune.apply_order(again, {name: one.order for name, one in orders.items()})
    return again


def equal(a, b):
    return all(torch.equal(one, b.get_parameter(name)) for name, one in a.named_parameters())


@pytest.mark.parametrize("family", NEURONS)
def test_the_model_computes_the_same_with_its_neurons_reordered(family):
    dense = skewed(family)
    model = copy.deepcopy(dense)
    orders = find_orders(Placement(model), TWO_FOUR, ["neurons"], WINDOWS.tokens, 3)
    assert same(dense, model)
    assert sum(one.lost for one in orders.values()) < sum(
        one.lost_as_given for one in orders.values()
    )
    for name, one in orders.items():
        old, new = (m.get_submodule(name).weight for m in (dense, model))
        if family == "gpt2":
            old, new = old.T, new.T
        assert torch.equal(new, old[:, one.order])
        assert not torch.equal(new, old)
    assert equal(model, reordered(dense, orders))


GROUPS = ["llama", "qwen2", "qwen3", "gemma2", "phi", "phi3", "glm4", "gpt_oss", "mixtral"]
STREAMS = [*GROUPS, "olmo2", "qwen3_moe", "deepseek_v3", "gemma3_text", "nanochat"]


@pytest.mark.parametrize(
    ("kind", "family"),
    [*(("values", family) for family in GROUPS), *(("residual", family) for family in STREAMS)],
)
def test_so_it_does_with_values_and_the_residual_stream_reordered(kind, family):
    dense = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim == 1:  # norms of ones and biases of zeros would tell of no order
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model = copy.deepcopy(dense)
    orders = find_orders(Placement(model), TWO_FOUR, [kind], WINDOWS.tokens, 3)
    assert same(dense, model)
    assert all(one.lost < one.lost_as_given for one in orders.values())
    name, first = next(iter(orders.items()))
    if kind == "values":
        moved = f"{name}.weight"
        assert len(orders) == 3
        for head in torch.split(first.order, 8):
            assert len({int(one) // 8 for one in head}) == 1
    else:
        moved = "model.embed_tokens.weight"
        assert list(orders) == ["residual stream"]
    old, new = dense.get_parameter(moved), model.get_parameter(moved)
    assert torch.equal(new, old[:, first.order])
    assert equal(model, reordered(dense, orders))


@pytest.mark.parametrize("half", [False, True])
def test_it_is_the_same_wherever_the_weights_are(half, tmp_path):
    dense = skewed("phi3")
    (dense.bfloat16() if half else dense).save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    there = {}
    for kind in ("whole", "host", "folder"):
        model = copy.deepcopy(dense)
        if kind == "folder":
            model = build_empty(model.config, model.dtype)
            placement = FromFolder(model, ModelFolder(tmp_path, model), CPU, dense.dtype)
        else:
            placement = Placement(model) if kind == "whole" else FromHost(model, CPU)
        orders = find_orders(placement, TWO_FOUR, EVERYTHING, WINDOWS.tokens, 3)
        there[kind] = [one.order for one in orders.values()]
        for index in range(3):
            with placement.block(index) as block:
                there[kind] += [one.detach().clone() for one in block.parameters()]
    for kind in ("host", "folder"):
        assert all(map(torch.equal, there[kind], there["whole"]))


@pytest.mark.parametrize(
    ("family", "kind", "says"),
    [
        ("bloom", "neurons", "type bloom has no number of MLP neurons"),
        ("mixtral", "neurons", "type mixtral( are those of experts|, 4 layers read)"),
        ("qwen3_moe", "neurons", "make no parameter smaller"),
        ("gpt2", "values", "type gpt2 cannot be removed"),
        ("deepseek_v3", "values", "Block 0 of a model of type deepseek_v3 gives something else"),
        ("gpt2", "residual", "type gpt2, .*c_attn.* is not one dimension of them"),
        ("falcon", "residual", "type falcon, .* another hidden size, and cannot"),
    ],
)
def test_families_that_are_not_understood_are_refused_by_name(family, kind, says):
    model = tiny_model(family)
    before = copy.deepcopy(model)
    with pytest.raises(InvalidInput, match=says):
        mipprune.prune(model, None, WINDOWS, NM(2, 4), samples=8, permute=kind)
    assert equal(model, before)


def test_a_model_that_is_not_symmetric_is_refused():
    """Neurons, or hidden states, with something of their own that no shape tells of."""
    model = skewed("llama")
    before = copy.deepcopy(model)
    mlp = model.model.layers[1].mlp
    mlp.act_fn = type("Own", (torch.nn.Module,), {"forward": lambda _, x: x * torch.arange(48)})()
    with pytest.raises(InvalidInput, match="Block 1 of a model of type llama gives something else"):
        find_orders(Placement(model), TWO_FOUR, ["neurons"], WINDOWS.tokens, 3)
    assert equal(model, before)
    model = skewed("llama")
    norm = model.model.norm
    norm.register_forward_hook(lambda _, __, out: out * torch.arange(32))
    with pytest.raises(InvalidInput, match="when the residual stream is reordered"):
        find_orders(Placement(model), TWO_FOUR, ["neurons", "residual"], WINDOWS.tokens, 3)
    assert equal(model, before)


@pytest.mark.parametrize(
    ("pattern", "options", "says"),
    [
        (NM(2, 4), {"permute": "neurons,heads"}, "'heads' is nothing to permute"),
        (NM(2, 4), {"permute": ""}, "'' is nothing to permute"),
        (NM(3, 16), {"permute": "values"}, "heads of 8 values, which pattern 3:16"),
        (
            Rules(NM(2, 4), (("*down_proj", NM(1, 4)), ("*q_proj", NM(4, 8)))),
            {"permute": "residual"},
            "patterns 2:4 and 4:8; leave residual out",
        ),
        (PerRow(sparsity=0.5), {}, "matters to a keep:group pattern alone"),
        (NM(2, 4), {"start": "current"}, "order that inputs have now"),
        (NM(2, 4), {"start": mipprune.StartMasks({}, "x")}, "order that inputs have now"),
        (Rules(NM(2, 4), ignore=("*down_proj",)), {}, "None of the layers that read what"),
    ],
)
def test_runs_in_which_it_means_nothing_are_refused(pattern, options, says):
    options = {"permute": "neurons", **options}
    with pytest.raises(InvalidInput, match=says):
        mipprune.prune(tiny_model("llama"), None, WINDOWS, pattern, samples=8, **options)


def test_a_run_with_permuted_neurons_loses_less():
    losses = {}
    for permute in (None, "neurons", "all"):
        model = skewed("llama")
        report = mipprune.prune(
            model, None, WINDOWS, NM(2, 4), "wanda", samples=8, grams="dense", permute=permute
        )
        losses[permute] = {one.name: one.loss for one in report.layers}
        assert report.sparsity == 0.5
        for name, mask in report.masks.items():
            assert NM(2, 4).is_feasible(mask)
            assert torch.equal(mask, model.get_submodule(name).weight != 0)
        record = report.to_dict()
        assert record["settings"]["permute"] == permute
        if permute == "neurons":
            readers = set(report.orders)
            assert record["order"]["lost"].keys() == readers
    assert readers == {f"model.layers.{index}.mlp.down_proj" for index in range(3)}
    for name, loss in losses["neurons"].items():
        if name in readers:
            assert loss < 0.95 * losses[None][name]
        else:
            assert loss == pytest.approx(losses[None][name], rel=1e-4)
    assert sum(losses["all"].values()) < 0.95 * sum(losses["neurons"].values())


def test_only_readers_with_groups_are_reordered():
    rules = Rules(PerRow(sparsity=0.5), (("model.layers.1.mlp.*", NM(1, 4)),))
    model, dense = skewed("llama"), skewed("llama")
    report = mipprune.prune(model, None, WINDOWS, rules, "wanda", samples=8, permute="neurons")
    assert list(report.orders) == ["model.layers.1.mlp.down_proj"]
    assert NM(1, 4).is_feasible(report.masks["model.layers.1.mlp.down_proj"])
    mipprune.apply_order(dense, {name: one.order for name, one in report.orders.items()})
    mipprune.apply_masks(dense, report.masks)
    assert equal(model, dense)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model's folder; its tokenizer is another model's and not used."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = mipprune.load_model("embedded", CPU).tokenizer
    skewed("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def to_folder(source, out, stream=False, **options):
    settings = Settings(TWO_FOUR, "ria", samples=8, batch_size=3, permute="all")
    return prune_to_folder(Source(str(source), stream=stream), out, WINDOWS, settings, **options)


def test_the_folder_holds_the_order_and_a_run_goes_on_with_it(source, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    report = to_folder(source, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    stored = load_file(tmp_path / "whole" / "order.safetensors")
    order = mipprune.load_order(tmp_path / "whole")
    assert all(one.dtype == torch.int32 for one in stored.values())
    assert {name: one.tolist() for name, one in order.items()} == {
        name: one.order.tolist() for name, one in report.orders.items()
    }
    record = json.loads(whole["mipprune.json"])
    assert record["order"]["sha256"] in whole["README.md"].decode()

    dense = mipprune.load_model(str(source), CPU).model
    mipprune.apply_order(dense, order)
    mipprune.apply_masks(dense, mipprune.load_masks(tmp_path / "whole"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    for name, one in loaded.state_dict().items():
        assert torch.equal(one, dense.state_dict()[name])

    to_folder(source, tmp_path / "streamed", stream=True)
    streamed = content(tmp_path / "streamed")
    for name in ("order.safetensors", "masks.safetensors", "mipprune.json"):
        assert streamed[name] == whole[name]
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "streamed"), loaded)

    append = FileJournal._append
    for stream, records in ((False, 1), (False, 2), (True, 12)):
        out, written = tmp_path / f"{stream}{records}", []

        def torn(self, payload, limit=records, written=written):
            if len(written) == limit:
                raise KeyboardInterrupt
            written.append(payload)
            append(self, payload)

        monkeypatch.setattr(FileJournal, "_append", torn)
        with pytest.raises(KeyboardInterrupt):
            to_folder(source, out, stream)
        monkeypatch.setattr(FileJournal, "_append", append)
        if records > 1:  # what was found is not looked for again
            monkeypatch.setattr("mipprune.permute.find_orders", None)
        to_folder(source, out, stream, resume=True)
        monkeypatch.undo()
        assert content(out) == (streamed if stream else whole)


def test_masks_of_another_order_are_no_start(source, tmp_path):
    to_folder(source, tmp_path / "out")
    with pytest.raises(InvalidInput, match="inputs in another order"):
        parse_start(str(tmp_path / "out"))


def test_a_permuted_run_is_certified(tmp_path, embedded):
    folder = tmp_path / "model"
    model = skewed("llama")
    rules = Rules(NM(2, 4), only=("*down_proj", "*o_proj"))
    report = mipprune.prune(model, None, WINDOWS, rules, samples=8, permute="values, neurons")
    mipprune.save(folder, model, embedded.tokenizer, report)
    dense = LoadedModel(skewed("llama"), None, torch.float32)
    results = certify(folder, rows=1, row_seconds=0.1, model=dense, calibration=WINDOWS)
    assert len(results) == len(mipprune.certify.check_folder(folder)) == 6
    assert equal(model, dense.model)
    order = mipprune.load_order(folder)
    mipprune.checkpoint.save_order(
        folder / "order.safetensors", {name: one.flip(0) for name, one in order.items()}
    )
    with pytest.raises(InvalidInput, match="not what its record says"):
        certify(folder, rows=1, model=dense, calibration=WINDOWS)


def test_an_order_of_another_model_is_refused(tmp_path):
    order = {"model.layers.0.mlp.down_proj": torch.arange(44)}
    with pytest.raises(InvalidInput, match="for other layers"):
        mipprune.apply_order(tiny_model("llama"), order)
    mipprune.checkpoint.save_order(tmp_path / "order.safetensors", {"a": torch.tensor([0, 0, 2])})
    with pytest.raises(InvalidInput, match="no order of the inputs of a"):
        mipprune.load_order(tmp_path)


def test_the_command_takes_it(source, tmp_path, run):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    options = ("--pattern", "2:4", "--permute", "neurons", "--solver", "wanda")
    sizes = ("--calibration", text, "--samples", 4, "--seqlen", 32)
    code, out, err = run("prune", source, "--out", tmp_path / "out", *options, *sizes)
    assert code == 0, err
    assert "permute: neurons" in out
    assert len(mipprune.load_order(tmp_path / "out")) == 3
    code, out, err = run("prune", "embedded", "--out", tmp_path / "no", "--sparsity", 0.5, *sizes,
                         "--permute", "neurons")  # fmt: skip
    assert code != 0
    assert "leave --permute out" in " ".join(err.split())
