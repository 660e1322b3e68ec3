import copy

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune.calibration import Windows
from mipprune.masks import StartMasks, mask_digest, parse_start
from solvers import NM, InvalidInput, MaskProblem, PerLayer, PerRow, solve

WINDOWS = Windows(tiny_tokens(), "random")


def pruned(family="gpt2", pattern=None, **options):
    model = tiny_model(family)
    return model, mipprune.prune(model, None, WINDOWS, pattern or NM(2, 4), **options)


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "mixtral"])
def test_masks_on_the_dense_model_give_the_pruned_one(family):
    model, report = pruned(family)
    dense = tiny_model(family)
    mipprune.apply_masks(dense, report.masks)
    for (name, one), (_, other) in zip(
        model.state_dict().items(), dense.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_masks_of_another_model_are_refused_before_anything_changes():
    _, report = pruned("gpt2")
    other = tiny_model("llama")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InvalidInput, match=r"no linear layer 'transformer\.h\.0\.attn\.c_attn'"):
        mipprune.apply_masks(other, report.masks)
    masks = mipprune.zero_pattern(other)
    name = list(masks)[-1]
    masks = {key: torch.zeros_like(mask) for key, mask in masks.items()} | {
        name: torch.zeros(3, 5, dtype=torch.bool)
    }
    with pytest.raises(InvalidInput, match=r"is torch.bool \(3, 5\), not bool"):
        mipprune.apply_masks(other, masks)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_zeros_stay_zero_through_20_steps(family, optimiser):
    model, report = pruned(family, solver="wanda")
    model.train()
    optimizer = OPTIMISERS[optimiser](model.parameters())
    tokens = WINDOWS.tokens

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    start = copy.deepcopy(model.state_dict())
    with mipprune.keep_zeros(model, optimizer, report.masks):
        losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
    for name, mask in report.masks.items():
        layer = model.get_submodule(name)
        weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
        assert not bool(weight[~mask].any())
        assert float((weight[mask] != 0).double().mean()) > 0.99
        before = start[f"{name}.weight"]
        before = before if isinstance(layer, torch.nn.Linear) else before.T
        assert bool((weight != before)[mask].any())
    step()
    assert bool(weight[~mask].any())  # the hooks are gone with the context


def test_zeros_of_fused_experts_stay_zero():
    model, report = pruned("gpt_oss", solver="wanda")
    tokens = WINDOWS.tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with mipprune.keep_zeros(model, optimizer):
        for _ in range(20):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = mipprune.zero_pattern(model)
    assert any("[" in name for name in after)
    for name, mask in report.masks.items():
        assert not bool(after[name][~mask].any())


def test_momentum_from_before_cannot_revive_weights():
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tokens = WINDOWS.tokens
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    report = mipprune.prune(model, None, WINDOWS, NM(2, 4), "wanda")
    with mipprune.keep_zeros(model, optimizer):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    assert all(not bool(model.get_submodule(n).weight[~m].any()) for n, m in report.masks.items())


def test_gradients_of_removed_weights_do_not_count_in_a_norm():
    model, report = pruned("gpt2", solver="wanda")
    tokens = WINDOWS.tokens
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mipprune.keep_zeros(model, optimizer):
        model(input_ids=tokens, labels=tokens).loss.backward()
    name, mask = next(iter(report.masks.items()))
    gradient = model.get_submodule(name).weight.grad.T
    assert not bool(gradient[~mask].any())
    assert bool(gradient[mask].any())


def test_a_run_starts_from_our_folder(tmp_path, embedded):
    from mipprune import load_model

    settings = {"samples": 4, "seqlen": 64}
    first = mipprune.prune(embedded.model, embedded.tokenizer, None, NM(2, 4), "wanda", **settings)
    mipprune.save(tmp_path / "one", embedded.model, embedded.tokenizer, first)
    start = parse_start(str(tmp_path / "one"))
    again = load_model("embedded", torch.device("cpu"))
    second = mipprune.prune(again.model, again.tokenizer, None, NM(2, 4), "swap", start, **settings)
    assert second.settings["start"] == str(tmp_path / "one")
    assert second.settings["start_sha256"] == first.mask_hash == mask_digest(first.masks)
    assert second.layers[0].loss_start == pytest.approx(first.layers[0].loss, rel=1e-9)
    assert second.loss < 0.8 * second.loss_start


def test_a_run_starts_from_a_foreign_folder_by_its_zeros(tmp_path, embedded):
    from mipprune import load_model

    generator = torch.Generator().manual_seed(0)
    foreign = load_model("embedded", torch.device("cpu"))
    masks = {
        name: PerLayer(sparsity=0.5).round(torch.rand(mask.shape, generator=generator))
        for name, mask in mipprune.zero_pattern(foreign.model).items()
    }
    mipprune.apply_masks(foreign.model, masks)
    foreign.model.save_pretrained(tmp_path / "foreign")
    foreign.tokenizer.save_pretrained(tmp_path / "foreign")
    start = parse_start(str(tmp_path / "foreign"))
    assert isinstance(start, StartMasks)
    assert start.digest == mask_digest(mipprune.zero_pattern(foreign.model))
    report = mipprune.prune(
        embedded.model, embedded.tokenizer, None, PerRow(sparsity=0.5), "swap", start,
        samples=2, seqlen=64, solver_options={"max_passes": 2},
    )  # fmt: skip
    assert report.loss < report.loss_start


def test_the_nearest_mask_keeps_what_the_start_kept():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    problem = MaskProblem(weight, inputs @ inputs.T / 40, PerRow(keep=6))
    mask = torch.rand(6, 12, generator=generator) < 0.5
    got = StartMasks({"a": mask}, "x").solution("a", problem)
    assert problem.pattern.is_feasible(got.mask)
    for row in range(6):
        kept = int(mask[row].sum())
        if kept <= 6:
            assert bool((got.mask[row] >= mask[row]).all())
        else:
            assert bool((got.mask[row] <= mask[row]).all())
    assert torch.equal(got.objective, problem.objective(got.mask))
    wanda = StartMasks({"a": torch.zeros(6, 12, dtype=torch.bool)}, "x").solution("a", problem)
    assert torch.equal(wanda.mask, solve(problem, "wanda").mask)


def test_starts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="neither a solver nor the folder"):
        parse_start(str(tmp_path / "nothing"))
    assert parse_start("wanda") == "wanda"
    masks = mipprune.zero_pattern(tiny_model("llama"))
    del masks["model.layers.1.mlp.up_proj"]
    with pytest.raises(InvalidInput, match=r"no mask for layer model\.layers\.1\.mlp\.up_proj"):
        pruned("llama", start=StartMasks(masks, "there"))
