import json

import pytest
import torch
from models import FAMILIES, tiny_model, tiny_tokens

import mipprune
from mipprune.calibration import Windows
from mipprune.folder import ModelFolder, NotStreamable, build_empty
from mipprune.placement import OUTSIDE, FromFolder, FromHost, Placement
from mipprune.walk import BlockWalk
from solvers import NM, InvalidInput

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
CPU = torch.device("cpu")


def prune(model, placement=None, **options):
    return mipprune.prune(
        model, None, WINDOWS, NM(2, 4), samples=8, batch_size=3, placement=placement, **options
    )


def streamed(family, folder, blocks=None, sink=None):
    tiny_model(family).save_pretrained(folder)
    empty = build_empty(tiny_model(family).config, torch.float32)
    return FromFolder(empty, ModelFolder(folder, empty), CPU, torch.float32, blocks, sink)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_block_by_block_gets_the_same_masks(family, tmp_path):
    shards = {}
    placement = streamed(family, tmp_path, sink=shards.__setitem__)
    whole = tiny_model(family)
    expected = prune(whole)
    report = prune(placement.model, placement)
    assert report.mask_hash == expected.mask_hash
    assert [layer.loss for layer in report.layers] == [layer.loss for layer in expected.layers]
    assert all(parameter.is_meta for parameter in placement.model.parameters())
    with placement.block(OUTSIDE):
        shards[OUTSIDE] = placement.stored(OUTSIDE)
    written = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    state = whole.state_dict()
    tied = state.keys() - dict(whole.named_parameters()).keys() - dict(whole.named_buffers()).keys()
    assert written.keys() == state.keys() - tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())


@pytest.mark.parametrize("grams", ["pruned", "dense"])
def test_a_model_that_visits_the_device_gets_the_same_masks(grams):
    whole, visiting = tiny_model("gpt2"), tiny_model("gpt2")
    expected = prune(whole, grams=grams)
    report = prune(visiting, FromHost(visiting, CPU), grams=grams)
    assert report.mask_hash == expected.mask_hash
    for name, tensor in visiting.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_one_block_at_a_time_is_held(tmp_path):
    placement = streamed("llama", tmp_path)
    model = placement.model

    def held():
        return {
            name.split(".")[2] if ".layers." in name else "outside"
            for name, parameter in model.named_parameters()
            if not parameter.is_meta
        }

    seen = []
    for step in BlockWalk(placement, WINDOWS.tokens, 4):
        step.grams.gram(step.layers[0])
        seen.append(held())
    assert seen == [{"0"}, {"1"}, {"2"}]
    assert held() == set()


def test_activations_may_wait_on_disk(tmp_path):
    model = tiny_model("llama")
    walk = BlockWalk(Placement(model), WINDOWS.tokens, 2, host_bytes=2 * 2 * 32 * 32 * 4)
    assert walk.activations.bytes_in_memory == walk.activations.bytes_on_disk == 2 * 2 * 32 * 32 * 4
    report = prune(tiny_model("llama"), host_bytes=0)
    assert report.mask_hash == prune(model).mask_hash
    half = tiny_model("llama").bfloat16()
    assert prune(half, host_bytes=0).mask_hash == prune(tiny_model("llama").bfloat16()).mask_hash


def test_blocks_pass_on_what_they_are_given_unless_that_changes_arguments():
    """A block's argument that depends on hidden states needs the blocks to be run."""
    model = tiny_model("llama")
    assert BlockWalk(Placement(model), WINDOWS.tokens, 4).quick is True

    def before(_, args, kwargs):
        return args, {**kwargs, "level": args[0].mean()}

    model.model.layers[2].register_forward_pre_hook(before, with_kwargs=True)
    assert BlockWalk(Placement(model), WINDOWS.tokens, 4).quick is False


def test_weights_that_cannot_be_read_by_name_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    streamed("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    empty = build_empty(tiny_model("llama").config, torch.float32)
    save_file({**tensors, name: torch.zeros(2, 2)}, file)
    with pytest.raises(NotStreamable, match=r"up_proj.weight as \(2, 2\), but the model has"):
        ModelFolder(tmp_path, empty)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(NotStreamable, match=f"no weight named {name}"):
        ModelFolder(tmp_path, empty)
    save_file({f"renamed.{key}": value for key, value in tensors.items()}, file)
    with pytest.raises(NotStreamable, match="no weight named model"):
        ModelFolder(tmp_path, empty)
    file.write_bytes(b"?" * 100)
    with pytest.raises(InvalidInput, match="not a readable safetensors file"):
        ModelFolder(tmp_path, empty)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({}))
    with pytest.raises(InvalidInput, match="no index of safetensors"):
        ModelFolder(tmp_path, empty)


def test_experts_that_cannot_be_merged_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    streamed("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    empty = build_empty(tiny_model("qwen3_moe").config, torch.float32)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert tensors[name].shape == (24, 32)
    lacking = {key: value for key, value in tensors.items() if key != name}
    for damaged in (lacking, {**tensors, name: torch.zeros(5, 32)}):
        save_file(damaged, file)
        with pytest.raises(NotStreamable, match=r"s\.1\.mlp\.experts\.(3\.up|gate_up)_proj"):
            ModelFolder(tmp_path, empty)


def test_a_version_that_converts_in_another_way_is_refused(tmp_path, monkeypatch):
    loading = pytest.importorskip("transformers.core_model_loading")
    streamed("mixtral", tmp_path)
    empty = build_empty(tiny_model("mixtral").config, torch.float32)
    monkeypatch.delattr(loading, "rename_source_key")
    with pytest.raises(NotStreamable, match="This version of transformers converts weights in a"):
        ModelFolder(tmp_path, empty)


def test_names_may_lack_the_prefix_of_the_body(tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    empty = build_empty(model.config, torch.float32)
    placement = FromFolder(empty, ModelFolder(tmp_path, empty), CPU, torch.float32)
    assert prune(empty, placement).mask_hash == prune(model).mask_hash
