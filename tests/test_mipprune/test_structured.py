import itertools
import json

import pytest
import torch
import transformers
from models import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import mipprune
from mipprune import InvalidInput, Method, Windows, shrink
from mipprune.capture import forward
from mipprune.placement import FromHost
from mipprune.structured.coupling import find_structure, group_count

WINDOWS = Windows(tiny_tokens(), "test")
SIZE = {"samples": 5, "seqlen": 24, "batch_size": 2}
KEEP = Method("wanda_sp", update="none", bias="none")


def run(family, method=KEEP, windows=WINDOWS, changes=None, half=False, **what):
    """The model with zeros, and the smaller one."""
    model = tiny_model(family, **(changes or {}))
    model = model.bfloat16() if half else model
    return model, shrink(model, None, windows, method=method, **what, **SIZE)


def same(a, b):
    tokens = tiny_tokens(2, 20, seed=1)
    with torch.no_grad():
        one, other = forward(a, tokens), forward(b, tokens)
    return torch.allclose(one, other, atol=1e-5 * float(one.abs().max()), rtol=0)


BOTH = [
    "llama",
    "qwen2 sliding",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mistral",
    "phi",
    "phi3",
    "glm4",
]
NEURONS = [*BOTH, "gemma", "gpt2", "opt", "gpt_neox", "gpt_neo", "falcon", "olmo2", "deepseek_v3"]
GROUPS = [*BOTH, "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


@pytest.mark.parametrize(
    ("family", "what"),
    [
        *((family, {"neurons": 0.25}) for family in NEURONS),
        *((family, {"kv_groups": 0.5}) for family in GROUPS),
        *((family, {"neurons": 0.25, "kv_groups": 0.5}) for family in ("llama", "phi3")),
    ],
)
def test_smaller_is_the_same_as_zeros(family, what):
    zeros, smaller = run(family, **what)
    assert same(zeros, smaller.model)
    assert not same(tiny_model(family), smaller.model)
    assert smaller.report.parameters_after < smaller.report.parameters_before
    for kind, (before, after) in smaller.report.counts.items():
        assert group_count(smaller.model.config, kind) == after < before
        assert all(
            int(kept.sum()) == after
            for kept in smaller.report.masks.values()
            if kept.shape[1] == before
        )


def test_the_readers_inputs_decide_what_goes():
    """Removed neurons are rows of gate and up and columns of down; the others are untouched."""
    dense = tiny_model("phi3")
    _, smaller = run("phi3", neurons=0.25)
    kept = smaller.report.masks["model.layers.1.mlp.down_proj"][0]
    for block, mlp in ((1, "mlp"),):
        old, new = (m.model.layers[block].get_submodule(mlp) for m in (dense, smaller.model))
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, kept])
        gate, up = old.gate_up_proj.weight.chunk(2)
        assert torch.equal(new.gate_up_proj.weight, torch.cat([gate[kept], up[kept]]))
    attention = [m.model.layers[1].self_attn.qkv_proj.weight for m in (dense, smaller.model)]
    assert torch.equal(*attention)


def test_queries_go_with_their_keys():
    dense = tiny_model("llama")
    _, smaller = run("llama", kv_groups=0.5)
    (kept,) = smaller.report.masks["model.layers.2.self_attn.o_proj"].nonzero()[:, 1].tolist()
    old, new = (m.model.layers[2].self_attn for m in (dense, smaller.model))
    heads = slice(16 * kept, 16 * (kept + 1))  # two queries of 8 entries
    assert torch.equal(new.q_proj.weight, old.q_proj.weight[heads])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, heads])
    assert torch.equal(new.k_proj.weight, old.k_proj.weight[8 * kept : 8 * (kept + 1)])
    assert (smaller.model.config.num_attention_heads, smaller.model.config.head_dim) == (2, 8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_it_loads_plainly(family, tmp_path):
    tokenizer = mipprune.load_model("embedded", torch.device("cpu")).tokenizer
    _, smaller = run(family, Method(), neurons=0.5)
    mipprune.save(tmp_path / "out", smaller.model, tokenizer, smaller.report)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(forward(loaded, tokens), forward(smaller.model, tokens))
    groups = mipprune.load_masks(tmp_path / "out" / "groups.safetensors")
    assert groups.keys() == smaller.report.masks.keys()
    with pytest.raises(InvalidInput, match="exists already"):
        mipprune.save(tmp_path / "out", smaller.model, tokenizer, smaller.report)


@pytest.mark.parametrize(
    ("family", "what", "says"),
    [
        ("gpt2", {"kv_groups": 0.5}, "type gpt2 cannot be removed"),
        ("opt", {"kv_groups": 0.5}, "type opt cannot be removed"),
        ("bloom", {"neurons": 0.5}, "type bloom has no number of MLP neurons"),
        ("falcon", {"kv_groups": 0.5}, "none that transformers loads"),
        ("olmo2", {"kv_groups": 0.5}, "normalises over all KV groups"),
        ("mixtral", {"neurons": 0.5}, "type mixtral( are those of experts|, 4 layers read)"),
        ("qwen3_moe", {"neurons": 0.5}, "make no parameter smaller"),
        ("llama", {"neurons": 1.0}, "outside"),
        ("llama", {"kv_groups": -0.1}, "outside"),
        ("llama", {}, "Nothing is to be removed"),
        ("llama", {"neurons": 0.01}, "removes none"),
        ("llama", {"neurons": 0.2, "multiple_of": 48}, "rounded to multiples of 48"),
        ("llama", {"neurons": 0.2, "multiple_of": 0}, "give 1 or more"),
        ("llama", {"neurons": 0.2, "grams": "both"}, "not 'both'"),
        (
            "mistral",
            {"neurons": 0.5, "method": Method(bias="add")},
            "cannot say that there is a bias",
        ),
    ],
)
def test_refusals_change_nothing(family, what, says):
    model = tiny_model(family)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(InvalidInput, match=says):
        shrink(model, None, WINDOWS, **{**SIZE, **what})
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_a_structure_that_is_not_understood_is_refused():
    """A block that computes with its neurons' neighbours cannot lose some."""
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.Softmax(dim=-1)
    with pytest.raises(InvalidInput, match="not understood"):
        shrink(model, None, WINDOWS, neurons=0.25, **SIZE)


def test_counts_that_a_configuration_refuses():
    if transformers.__version__.startswith("4."):
        pytest.skip("any number of heads is a Llama model's there")
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(InvalidInput, match="3 KV groups is none that transformers loads"):
        shrink(model, None, WINDOWS, kv_groups=0.25, **SIZE)


@pytest.mark.parametrize(
    "changes", [{"solver": "nonsense"}, {"update": "both"}, {"bias": "new"}, {"damping": -1.0}]
)
def test_methods_are_checked(changes):
    with pytest.raises(InvalidInput):
        Method(**changes)
    with pytest.raises(InvalidInput, match="no option"):
        Method("flap", solver_options={"rho": 1})
    with pytest.raises(InvalidInput, match="no time limit"):
        Method(time_limit=1.0)


def outputs(model, tokens, name):
    """Output of a layer, float64 ``[tokens, rows]``."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        forward(model, tokens)
    hook.remove()
    return found[0].flatten(0, -2).double()


@pytest.mark.parametrize("bias", ["existing", "add", "none"])
@pytest.mark.parametrize("update", ["least_squares", "none"])
@pytest.mark.parametrize("solver", ["eliminate", "flap", "swap"])
def test_losses_are_those_of_the_outputs(solver, update, bias):
    """Of the first block, whose inputs are the dense model's."""
    tokens = WINDOWS.tokens
    for family in ("llama", "gpt2")[: 1 + (bias != "add")]:
        name = {"llama": "model.layers.0.mlp.down_proj", "gpt2": "transformer.h.0.mlp.c_proj"}[
            family
        ]
        wanted = outputs(tiny_model(family), tokens, name)
        _, smaller = run(family, Method(solver, update, bias), neurons=0.5)
        got = outputs(smaller.model, tokens, name)
        result = smaller.report.layers[0]
        loss = float((got - wanted).square().sum() / len(wanted))
        assert result.updated_loss == pytest.approx(loss, rel=1e-4)
        has_bias = bias == "add" or (family == "gpt2" and bias == "existing")
        if update == "none" and not has_bias:
            assert result.loss == pytest.approx(loss, rel=1e-4)
        else:
            assert result.updated_loss < result.loss
        if has_bias:
            assert torch.allclose(got.mean(0), wanted.mean(0), atol=1e-5)


def test_blocks_see_what_was_made_smaller_before_them():
    chosen = {}
    for grams in ("pruned", "dense"):
        _, smaller = run("llama", neurons=0.5, grams=grams)
        chosen[grams] = smaller.report
    first, last = "model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"
    assert torch.equal(*(report.masks[first] for report in chosen.values()))
    losses = [report.layers[-1].loss for report in chosen.values()]
    assert losses[0] != losses[1]
    name = last
    dense = tiny_model("llama")
    gone = ~chosen["dense"].masks[last][0]
    inputs = []
    hook = dense.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        forward(dense, WINDOWS.tokens)
    hook.remove()
    weight = dense.get_submodule(name).weight.detach()
    removed = inputs[0].flatten(0, -2)[:, gone] @ weight[:, gone].T
    loss = float(removed.square().sum() / len(removed))
    assert losses[1] == pytest.approx(loss, rel=1e-4)


def test_an_exact_solver_proves_its_choice():
    _, smaller = run("llama", Method("branch_and_bound", time_limit=20.0), kv_groups=0.5)
    assert smaller.report.gap == pytest.approx(0.0, abs=1e-3)
    record = smaller.report.to_dict()
    assert record["evidence"] in ("certified", "guarded")
    assert all(one["evidence"] in ("certified", "guarded") for one in record["layers"])
    assert all(one.status == "OPTIMAL" for one in smaller.report.layers)
    assert smaller.report.loss <= smaller.report.loss_wanda_sp


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_that_visit_the_device(family):
    """As on a GPU, where one block at a time is; here the device is the CPU too."""
    results = []
    for visiting in (False, True):
        model = tiny_model(family)
        placement = FromHost(model, torch.device("cpu")) if visiting else None
        bias = "add" if family == "llama" else "existing"
        what = {"method": Method(bias=bias), "neurons": 0.5, "placement": placement, **SIZE}
        results.append((model, shrink(model, None, WINDOWS, **what)))
    (_, plain), (zeros, visited) = results
    assert plain.report.mask_hash == visited.report.mask_hash
    assert same(plain.model, visited.model)
    assert same(zeros, visited.model)


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_half_precision(family):
    _, smaller = run(family, Method(), neurons=0.25, kv_groups=0.5, half=True)
    assert smaller.model.dtype == torch.bfloat16
    assert smaller.report.difference < 0.02


def test_rounding_keeps_more():
    _, smaller = run("llama", neurons=0.3, multiple_of=20)
    assert smaller.report.counts == {"neurons": (48, 40)}
    assert smaller.model.config.intermediate_size == 40


def test_a_budget_chooses_both_counts():
    zeros, smaller = run("llama", Method(), parameters=0.8)
    report = smaller.report
    assert report.parameters_after <= 0.8 * report.parameters_before
    assert same(zeros, smaller.model)
    curves = {one["kind"]: one for one in report.curves}
    assert curves.keys() == {"neurons", "kv_groups"}
    options = {
        kind: [
            (count, cost, one["parameters"] * (one["counts"][0] - count))
            for count, cost in zip(one["counts"], one["costs"], strict=True)
        ]
        for kind, one in curves.items()
    }
    # by enumeration: the cheapest pair of counts within the budget
    cheapest = min(
        a[1] + b[1]
        for a, b in itertools.product(*options.values())
        if a[2] + b[2] >= 0.2 * report.parameters_before
    )
    taken = 0.0
    for kind, some in options.items():
        left = report.counts[kind][1] if kind in report.counts else some[0][0]
        taken += {count: cost for count, cost, _ in some}[left]
        costs = [cost for _, cost, _ in some]
        assert costs[0] == 0
        assert costs == sorted(costs)
        assert costs[-1] > 0
    assert taken == pytest.approx(cheapest)


def test_a_budget_includes_added_biases():
    _, smaller = run("llama", Method(bias="add"), parameters=0.85)
    assert smaller.model.config.mlp_bias or smaller.model.config.attention_bias
    report = smaller.report
    assert 0.7 < report.parameters_after / report.parameters_before <= 0.85


def test_blocks_without_groups_are_named():
    _, smaller = run("deepseek_v3", neurons=0.25)
    assert smaller.report.warnings == ["Only 1 of 3 blocks have MLP neurons to remove."]


def test_a_budget_on_what_can_go():
    _, smaller = run("gpt2", Method(), parameters=0.9, multiple_of=8)
    assert list(smaller.report.counts) == ["neurons"]
    assert smaller.model.config.n_inner % 8 == 0
    assert 0.85 < smaller.report.parameters_after / smaller.report.parameters_before <= 0.9
    for changes, says in (
        ({"parameters": 0.1}, "keep at least"),
        ({"parameters": 1.0}, "outside"),
        ({"parameters": 0.5, "neurons": 0.5}, "Give one of these"),
    ):
        with pytest.raises(InvalidInput, match=says):
            shrink(tiny_model("gpt2"), None, WINDOWS, **changes, **SIZE)
    with pytest.raises(InvalidInput, match="bloom"):
        shrink(tiny_model("bloom"), None, WINDOWS, parameters=0.9, **SIZE)


def test_structure_is_found_without_weights():
    from mipprune.folder import build_empty

    config = tiny_model("phi3").config
    model = build_empty(config, torch.float32)
    found = find_structure(model, "model.layers", {"neurons": 24, "kv_groups": 1})
    assert [[one.kind for one in block] for block in found.couplings] == [
        ["kv_groups", "neurons"]
    ] * 3
    attention, mlp = found.couplings[0]
    assert attention.parts == {"self_attn.qkv_proj.weight": 0, "self_attn.o_proj.weight": 1}
    assert mlp.parts == {"mlp.gate_up_proj.weight": 0, "mlp.down_proj.weight": 1}


def test_command(run, tmp_path):
    out = tmp_path / "smaller"
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"Command number {n} lists the files of a folder.\n" for n in range(200))
    )
    fast = ["--samples", "4", "--seqlen", "64"]
    calibrated = [*fast, "--calibration", text]
    code, printed, _ = run(
        "shrink", "embedded", "--neurons", "0.25", "--multiple-of", "32", "--out", out, *calibrated
    )
    assert code == 0
    assert "544 of 704" in printed
    record = json.loads((out / "mipprune.json").read_text())
    assert record["settings"]["model"] == "embedded"
    assert record["recipe"]["multiple_of"] == 32
    dense = mipprune.embedded.MODEL_PATH / "model.safetensors"
    assert (out / "model.safetensors").stat().st_size < 0.9 * dense.stat().st_size
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == record["parameters_after"]
    code, printed, _ = run(
        "evaluate", out, "--against", "embedded", *fast, "--text", text, "--save"
    )
    assert code == 0
    assert "perplexity" in (out / "README.md").read_text()
    for other in ("report", "certify"):
        code, _, errors = run(other, out)
        assert code == 2
        assert "made smaller" in errors
    code, _, errors = run("shrink", "embedded", "--neurons", "0.25", "--out", out, *calibrated)
    assert code == 2
    assert "exists already" in errors
    missing = tmp_path / "none"
    code, _, errors = run(
        "shrink", "embedded", "--kv-groups", "1.25", "--out", missing, *calibrated
    )
    assert code == 2
    assert "outside [0, 1)" in errors
    assert not missing.exists()
