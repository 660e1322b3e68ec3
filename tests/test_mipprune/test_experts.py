import re

import pytest
import torch
from models import MIXTURES, tiny_model, tiny_tokens
from torch import nn

import mipprune
from mipprune.calibration import Windows
from mipprune.capture import ReplayMismatch, capture, check_replay
from mipprune.experts import ProductWatch, all_fused_weights, fused_weights, router_weights, watched
from mipprune.gram import GramCollector
from mipprune.models import all_layers, find_blocks, prunable_layers
from mipprune.placement import Placement
from mipprune.walk import BlockWalk
from solvers import NM, InvalidInput, MaskProblem, PerRow, solve

TOKENS = tiny_tokens(windows=8)
FUSED = [family for family in MIXTURES if family not in ("llama4_text", "jetmoe", "jamba")]


def _routed(fused, expert):
    """The name under which an expert's matrix is offered."""
    return f"{fused.name}[{expert}]"


@pytest.mark.parametrize("family", FUSED)
def test_experts_see_the_tokens_routed_to_them(family):
    """Against the routing that the experts' module is called with, in plain mathematics."""
    model = tiny_model(family)
    name, blocks = find_blocks(model)
    fused = all_fused_weights(blocks[-1], f"{name}.2")
    if not fused or not hasattr(fused[0].module, "_apply_gate"):
        pytest.skip("experts are modules of their own, or not called with their routing")
    experts, (up, down) = fused[0].module, fused
    calls = []
    with torch.no_grad():
        steps = iter(BlockWalk(Placement(model), TOKENS, batch_size=2))
        next(steps), next(steps)
        step = next(steps)
        hook = experts.register_forward_hook(lambda _, args, out: calls.append((*args, out)))
        assert step.grams
        hook.remove()
        hidden, indices, weights, outputs = (torch.cat(parts) for parts in zip(*calls, strict=True))
        hidden, outputs = hidden.reshape(-1, 32), outputs.reshape(-1, 32)
        rebuilt = torch.zeros_like(outputs)
        grams = {layer.name: step.grams.gram(layer) for layer in step.layers}
        for expert in range(len(up)):
            tokens, slot = torch.where(indices == expert)
            biases = [
                getattr(experts, f"{weight.key}_bias")[expert] if experts.has_bias else 0.0
                for weight in (up, down)
            ]
            x = hidden[tokens]
            y = experts._apply_gate(x @ up.expert(expert).T + biases[0])
            out = y @ down.expert(expert).T + biases[1]
            rebuilt.index_add_(0, tokens, out * weights[tokens, slot, None])
            for weight, inputs in ((up, x.double()), (down, y.double())):
                gram = grams[_routed(weight, expert)]
                assert gram.tokens == len(inputs) >= inputs.shape[1]
                assert torch.allclose(gram.matrix, inputs.T @ inputs / len(inputs), rtol=1e-4)
    assert torch.allclose(rebuilt, outputs, rtol=1e-4, atol=1e-7)


def test_zero_rows_stand_for_tokens_routed_elsewhere():
    """Llama 4 gives every expert all tokens, those of others as zeros."""
    model = tiny_model("llama4_text")
    name, blocks = find_blocks(model)
    up, down = all_fused_weights(blocks[0], f"{name}.0")
    calls = []
    hook = up.module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    step = next(iter(BlockWalk(Placement(model), TOKENS, batch_size=8)))
    assert step.grams
    hook.remove()
    inputs = calls[-1].reshape(len(up), -1, 32).double()
    grams = {layer.name: step.grams.gram(layer) for layer in step.layers}
    for expert in range(len(up)):
        x = inputs[expert][inputs[expert].any(dim=1)]
        gate, value = (x @ up.expert(expert).T.double()).chunk(2, dim=-1)
        y = value * nn.functional.silu(gate)
        for weight, rows in ((up, x), (down, y)):
            gram = grams[_routed(weight, expert)]
            assert gram.tokens == len(rows) < TOKENS.numel()
            assert torch.allclose(gram.matrix, rows.T @ rows / len(rows), rtol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_routed_token_is_seen_once(family):
    model = tiny_model(family)
    index = 1 if family == "jamba" else 2  # jamba's other blocks are dense
    steps = iter(BlockWalk(Placement(model), TOKENS, batch_size=5))
    step = [next(steps) for _ in range(index + 1)][index]
    tokens = {}
    for layer in step.layers:
        if layer.fused or ".experts." in layer.name:
            # Without the expert's number.
            kind = re.sub(r"\[\d+\]$|(?<=experts\.)\d+", "", layer.name)
            tokens[kind] = tokens.get(kind, 0) + step.grams.gram(layer).tokens
    assert set(tokens.values()) == {2 * TOKENS.numel()}  # each token goes to two experts
    assert len(tokens) >= 2


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_pruned_saved_and_read_again(family, tmp_path, embedded):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    _, blocks = find_blocks(model)
    routers = {name: blocks[2].get_parameter(name).clone() for name in router_weights(blocks[2])}
    windows = Windows(TOKENS, "random")
    report = mipprune.prune(model, None, windows, NM(2, 4), "wanda", samples=5)
    for name, before in routers.items():
        assert torch.equal(blocks[2].get_parameter(name), before)
    mipprune.save(tmp_path / "out", model, embedded.tokenizer, report)
    masks = mipprune.load_masks(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for layer in all_layers(*find_blocks(again)):
        assert torch.equal(layer.weight != 0, masks[layer.name])
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert len(masks) == len(report.layers) == len(all_layers("model.layers", blocks))


def test_an_expert_with_few_tokens_is_shrunk_towards_the_identity_and_listed():
    model = tiny_model("mixtral")
    tokens = TOKENS[:1, :12]
    step = next(iter(BlockWalk(Placement(model), tokens, batch_size=1)))
    shrunk = [layer for layer in step.layers if step.grams.gram(layer).note]
    assert shrunk
    for layer in shrunk:
        gram = step.grams.gram(layer)
        own = step.grams._sum[step.grams._owner[layer.name]]
        d = len(own)
        expected = gram.tokens / d * own
        expected += (1 - gram.tokens / d) * own.trace() / d * torch.eye(d)
        assert 0 < gram.tokens < d
        assert torch.allclose(gram.matrix, expected)
        assert torch.isclose(gram.matrix.trace(), own.trace())
        assert f"saw {gram.tokens} tokens for {d} inputs" in gram.note
    whole = [layer for layer in step.layers if layer.name.endswith("q_proj")]
    assert not step.grams.gram(whole[0]).note  # few tokens in all are the user's choice

    report = mipprune.prune(model, None, Windows(tokens, "few"), PerRow(sparsity=0.5), samples=1)
    said = [text for text in report.warnings if "shrunk towards the identity" in text]
    assert all(any(layer.name in text for text in said) for layer in shrunk)


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_listed():
    model = tiny_model("mixtral")
    name, blocks = find_blocks(model)
    before = {layer.name: layer.weight.clone() for layer in all_layers(name, blocks)}
    pattern = PerRow(sparsity=0.5)
    report = mipprune.prune(model, None, Windows(TOKENS[:1, :2], "two"), pattern, samples=1)
    unseen = [layer for layer in report.layers if layer.tokens == 0]
    assert unseen
    for layer in unseen:
        expected = solve(
            MaskProblem(before[layer.name], torch.eye(layer.inputs), pattern), "magnitude"
        )
        assert torch.equal(report.masks[layer.name], expected.mask)
        assert any(f"{layer.name} saw no calibration token" in text for text in report.warnings)


def test_an_experts_matrix_is_a_view_of_the_model():
    for family in ("gpt_oss", "granitemoe", "llama4_text"):
        _, blocks = find_blocks(tiny_model(family))
        up, down = all_fused_weights(blocks[0], "b")
        assert up.transposed == down.transposed == (family != "granitemoe")
        for weight in (up, down):
            weight.expert(2)[5, 3] = 42.0
            at = (2, 3, 5) if weight.transposed else (2, 5, 3)
            assert float(weight.tensor[at]) == 42.0


def test_routers_stay_dense():
    for family, name in (
        ("mixtral", "gate.weight"),
        ("granitemoe", "block_sparse_moe.router.layer.weight"),
        ("llama4_text", "feed_forward.router.weight"),
        ("qwen2_moe", "mlp.shared_expert_gate.weight"),
    ):
        _, blocks = find_blocks(tiny_model(family))
        routers = router_weights(blocks[2])
        assert any(found.endswith(name) for found in routers) or family == "granitemoe"
        assert all(any(word in found for word in ("gate", "router")) for found in routers)
        layers = {layer.name for layer in prunable_layers(blocks[2], "b")}
        assert not {f"b.{found.removesuffix('.weight')}" for found in routers} & layers
        assert all(blocks[2].get_parameter(found).shape[0] in (1, 4) for found in routers)
    assert router_weights(find_blocks(tiny_model("llama"))[1][0]) == set()


class Experts(nn.Module):
    """Experts of two matrices, as plain as can be."""

    def __init__(self, used="matrix", **sizes):
        super().__init__()
        self.used = used
        self.up = nn.Parameter(torch.randn(2, 6, 4))
        for name, value in sizes.items():
            setattr(self, name, value)

    def forward(self, x):
        if self.used == "matrix":
            return sum(nn.functional.linear(x, self.up[expert]) for expert in range(2))
        if self.used == "part":
            return sum(nn.functional.linear(x, self.up[expert, :3]) for expert in range(2))
        return sum(nn.functional.linear(x, self.up[expert, 3:]) for expert in range(2))


def test_the_orientation_comes_from_what_a_module_says_of_itself():
    assert fused_weights(Experts(), "e") == []  # nothing is said: not covered
    assert not fused_weights(Experts(is_transposed=False), "e")[0].transposed
    assert fused_weights(Experts(is_transposed=True), "e")[0].transposed
    assert not fused_weights(Experts(hidden_size=4), "e")[0].transposed
    assert fused_weights(Experts(hidden_dim=6), "e")[0].transposed
    assert not fused_weights(Experts(input_size=4, output_size=6), "e")[0].transposed
    assert fused_weights(Experts(in_features=6, out_features=4), "e")[0].transposed
    assert fused_weights(nn.Conv1d(4, 6, 2), "e") == []
    odd = Experts(is_transposed=False)
    odd.down = nn.Parameter(torch.zeros(3, 4, 6))
    assert fused_weights(odd, "e") == []


@pytest.mark.parametrize("used", ["part", "middle"])
def test_a_weight_that_is_not_used_expert_by_expert_is_refused_by_name(used):
    experts = Experts(used, is_transposed=False)
    with (
        pytest.raises(
            InvalidInput, match=r"multiplies with e\.up in a way that cannot be followed"
        ),
        watched(fused_weights(experts, "e"), lambda *_: None),
    ):
        experts(torch.randn(3, 4))


def test_a_wrong_orientation_is_refused_even_where_it_is_square():
    experts = Experts(is_transposed=True)
    experts.up = nn.Parameter(torch.randn(2, 4, 4))
    with (
        pytest.raises(InvalidInput, match="cannot be followed"),
        ProductWatch(fused_weights(experts, "e"), lambda *_: None),
    ):
        experts(torch.randn(3, 4))


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden, **_):
        return hidden + self.experts(hidden)[..., :1]


def _mixture(experts):
    """A llama whose blocks hold these experts alone."""
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([Block(experts())])
    return model.eval(), model.model.layers


def test_products_that_cannot_be_observed_are_refused_before_anything_is_pruned():
    class Wide(Experts):
        def __init__(self):
            super().__init__(is_transposed=False)
            self.up = nn.Parameter(torch.randn(2, 6, 32))

        def forward(self, x):
            return torch.einsum("btc,erc->btr", x, self.up)

    model, blocks = _mixture(Wide)
    with pytest.raises(ReplayMismatch, match=r"Block 0\.experts\.up holds experts, but products"):
        check_replay(model, blocks, TOKENS)


def test_products_that_are_observed_in_part_are_refused():
    class Half(Experts):
        def __init__(self):
            super().__init__(hidden_size=32)
            self.up = nn.Parameter(torch.randn(2, 6, 32))
            self.down = nn.Parameter(torch.randn(2, 32, 6))

        def forward(self, x):
            x = x.reshape(-1, 32)
            seen = nn.functional.linear(nn.functional.linear(x, self.up[0]), self.down[0])
            unseen = torch.einsum("tc,rc->tr", nn.functional.linear(x, self.up[1]), self.down[1])
            return (seen + unseen).reshape(len(TOKENS), -1, 32)

    model, blocks = _mixture(Half)
    with pytest.raises(ReplayMismatch, match=r"Block 0\.experts\.down holds experts, but products"):
        check_replay(model, blocks, TOKENS)


def test_experts_that_compute_something_else_one_by_one_are_refused():
    class Drifting(Experts):
        def __init__(self):
            super().__init__(hidden_size=32)
            self.up = nn.Parameter(torch.randn(2, 6, 32))

        def forward(self, x):
            out = sum(nn.functional.linear(x, self.up[expert]) for expert in range(2))
            return 2 * out if self.training else out

    model, blocks = _mixture(Drifting)
    with pytest.raises(ReplayMismatch, match="Block 0 run expert by expert differs"):
        check_replay(model, blocks, TOKENS)
    assert not blocks[0].experts.training


def test_the_experts_implementation_is_put_back():
    model = tiny_model("mixtral")
    before = getattr(model.config, "_experts_implementation", None)
    name, blocks = find_blocks(model)
    record = capture(model, blocks, [TOKENS])
    grams = GramCollector(prunable_layers(blocks[0], f"{name}.0"))
    with torch.no_grad(), grams.collecting():
        record.calls[0][0].run(blocks[0], record.hidden[0])
    assert getattr(model.config, "_experts_implementation", None) == before
    assert not any(module.training for module in model.modules())
