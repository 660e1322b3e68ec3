import json

import families_table
import pytest
import torch
from models import FAMILIES, MIXTURES, NEWER, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING

from mipprune.embedded import MODEL_PATH
from mipprune.models import (
    coverage,
    find_blocks,
    load_model,
    prunable_layers,
    resolve_device,
)
from solvers import InvalidInput

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_block_weights_are_covered_but_for_routers_and_scans(family):
    model = tiny_model(family)
    name, blocks = find_blocks(model)
    covered = coverage(name, blocks, model)
    print(f"{family}: {covered.share:.1%} of {covered.total}, routers {covered.routers}")
    assert all(left.endswith(("mamba.conv1d.weight", "mamba.A_log")) for left in covered.uncovered)
    assert bool(covered.uncovered) == (family == "jamba")
    assert bool(covered.routers) == (family in MIXTURES)
    assert covered.share == 1.0 or family in MIXTURES


def test_families_are_missing_only_where_that_is_known():
    from transformers import __version__

    missing = {family.split()[0] for family in FAMILIES} - set(CONFIG_MAPPING)
    assert missing == (NEWER if __version__.startswith("4.57.") else set())


@pytest.mark.skipif("nanochat" not in CONFIG_MAPPING, reason="the table is of the newest version")
def test_readme_has_the_table_of_all_families():
    assert families_table.shown() == families_table.table(), "run make families"


def test_gpt2_is_covered_completely_by_conv1d():
    from transformers.pytorch_utils import Conv1D

    name, blocks = find_blocks(tiny_model("gpt2"))
    layers = prunable_layers(blocks[0], f"{name}.0")
    assert {type(layer.module) for layer in layers} == {Conv1D}
    matrices = sum(p.numel() for p in blocks[0].parameters() if p.ndim == 2)
    assert sum(layer.weight.numel() for layer in layers) == matrices
    assert coverage(name, blocks).share == 1.0


def test_conv1d_weights_are_views_of_the_model():
    name, blocks = find_blocks(tiny_model("gpt2"))
    layer = prunable_layers(blocks[0], f"{name}.0")[0]
    assert layer.name == "transformer.h.0.attn.c_attn"
    assert layer.weight.shape == (96, 32)
    layer.weight[5, 3] = 42.0
    assert float(layer.module.weight.data[3, 5]) == 42.0


def test_blocks_are_the_outermost_list():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])
            self.layers = nn.ModuleList(Block() for _ in range(3))

    model = Model()
    assert find_blocks(model)[0] == "layers"
    assert find_blocks(model, "heads") == ("heads", model.heads)
    with pytest.raises(InvalidInput, match="no list of blocks named 'nonsense'"):
        find_blocks(model, "nonsense")
    with pytest.raises(InvalidInput, match="no list of equal blocks"):
        find_blocks(nn.Linear(2, 2))


def test_no_prunable_layer_is_an_error():
    blocks = nn.ModuleList([nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)])
    with pytest.raises(InvalidInput, match="hold no linear layer"):
        coverage("layers", blocks)


def test_blocks_of_several_classes_are_found():
    _, blocks = find_blocks(tiny_model("jamba"))
    assert len({type(block) for block in blocks}) == 2


def test_shared_weights_are_refused_by_name():
    block = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    block[1].weight = block[0].weight
    with pytest.raises(InvalidInput, match=r"Layers b\.0 and b\.1 share one weight"):
        prunable_layers(block, "b")
    block[1].weight = nn.Parameter(block[0].weight.data)  # another object in the same place
    with pytest.raises(InvalidInput, match=r"Layers b\.0 and b\.1 share one weight"):
        prunable_layers(block, "b")
    fresh = nn.Sequential(*(nn.Linear(2, 2, bias=False, device="meta") for _ in range(2)))
    assert len(prunable_layers(fresh, "b")) == 2  # without storage they are still two
    fresh[1].weight = fresh[0].weight
    with pytest.raises(InvalidInput, match=r"Layers b\.0 and b\.1 share one weight"):
        prunable_layers(fresh, "b")


def test_weights_shared_between_blocks_or_with_the_rest_are_refused_by_name():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        InvalidInput,
        match=r"Layers model\.layers\.0\.mlp\.up_proj and model\.layers\.2\.mlp\.up_proj share",
    ):
        coverage("model.layers", layers)
    model = tiny_model("llama")
    model.model.tied = nn.Linear(32, 48, bias=False)
    model.model.tied.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(InvalidInput, match=r"layers\.1\.mlp\.up_proj shares .*model\.tied\.weight"):
        coverage("model.layers", model.model.layers, model)


class Params4bit(nn.Parameter):
    """Stands for the parameter classes of quantisation libraries."""


def _parameter(tensor):
    return nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (_parameter(torch.zeros(2, 2, dtype=torch.uint8)), r"torch\.uint8"),
        (_parameter(torch.zeros(2, 2, dtype=torch.int8)), r"torch\.int8"),
        (_parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn)), r"torch\.float8_e4m3fn"),
        (Params4bit(torch.zeros(2, 2)), "Params4bit"),
    ],
)
def test_quantised_weights_are_refused_by_name(weight, said):
    quantised = nn.Linear(2, 2, bias=False)
    quantised.weight = weight
    with pytest.raises(InvalidInput, match=rf"Layer b\.0 has weights of type {said} \(weight\)"):
        prunable_layers(nn.Sequential(quantised), "b")


def test_packed_and_computed_weights_are_refused_by_name():
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(InvalidInput, match=r"Layer b\.0 .* torch\.int32 \(qweight\)"):
        prunable_layers(nn.Sequential(packed), "b")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(InvalidInput, match=r"Layer b\.0 computes its weights from other"):
        prunable_layers(nn.Sequential(normed), "b")


def test_a_quantised_model_is_refused_before_its_weights_are_read(tmp_path):
    config = json.loads((MODEL_PATH / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    for file in MODEL_PATH.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match=r"weights are quantised \(gptq\)"):
        load_model(str(tmp_path), CPU)
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InvalidInput, match=r"weights are quantised \(bitsandbytes\)"):
        find_blocks(model)
    model.config.quantization_config["dequantize"] = True
    assert find_blocks(model)[0] == "model.layers"


def test_the_embedded_model_is_stored_in_half_precision():
    loaded = load_model("embedded", CPU)
    assert loaded.stored_dtype == torch.float16
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert load_model(str(MODEL_PATH), CPU, "bfloat16").model.dtype == torch.bfloat16


def test_models_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="no model folder at"):
        load_model(str(tmp_path / "missing"), CPU)
    with pytest.raises(InvalidInput, match="'nobody/nothing' cannot be read"):
        load_model("nobody/nothing", CPU)
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_model(str(tmp_path), CPU)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InvalidInput, match="holds a vit model, which is no causal language model"):
        load_model(str(tmp_path), CPU)
    with pytest.raises(InvalidInput, match="dtype 'int3' is none of"):
        load_model("embedded", CPU, "int3")


HOSTILE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({ran!r}, "w").close()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A model folder with code of its own, and the file that this code leaves when it is run."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda _: "y")  # who answers yes to all questions
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tiny_model("llama", vocab_size=2048).save_pretrained(folder)
    for file in MODEL_PATH.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "strange.py").write_text(HOSTILE.format(ran=str(ran)))
    _edit(folder / "config.json", model_type="strange", auto_map=AUTO_MAP)
    return folder, ran


AUTO_MAP = {
    "AutoConfig": "strange.StrangeConfig",
    "AutoModelForCausalLM": "strange.StrangeForCausalLM",
}


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_code_that_a_model_brings_along_is_not_run(hostile):
    folder, ran = hostile
    with pytest.raises(InvalidInput, match=r"needs code of its own.*--trust-remote-code"):
        load_model(str(folder), CPU)
    assert not ran.exists()


def test_a_known_model_never_needs_the_code_it_brings_along(hostile):
    folder, ran = hostile
    _edit(folder / "config.json", model_type="llama")
    assert type(load_model(str(folder), CPU).model).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_a_tokenizer_may_not_bring_code_along_either(hostile):
    folder, ran = hostile
    _edit(folder / "config.json", model_type="llama", auto_map={})
    _edit(
        folder / "tokenizer_config.json",
        tokenizer_class="StrangeTokenizer",
        auto_map={"AutoTokenizer": ["strange.StrangeTokenizer", None]},
    )
    with pytest.raises(InvalidInput, match="needs code of its own"):
        load_model(str(folder), CPU)
    assert not ran.exists()


def test_trusted_code_is_run(hostile):
    folder, ran = hostile
    model = load_model(str(folder), CPU, trust_remote_code=True).model
    assert ran.exists()
    assert type(model).__name__ == "StrangeForCausalLM"
    assert coverage(*find_blocks(model), model).share == 1.0


def test_the_command_line_runs_code_only_when_told(hostile, tmp_path):
    from typer.testing import CliRunner

    from mipprune.cli import app

    folder, ran = hostile
    command = ["prune", str(folder), "--sparsity", "0.5", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, InvalidInput)
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    few = ["--samples", "1", "--seqlen", "8", "--trust-remote-code"]
    assert CliRunner().invoke(app, [*command, *few]).exit_code == 0
    assert ran.exists()
    with pytest.raises(InvalidInput, match="needs code of its own"):
        load_model(str(tmp_path / "out"), CPU)  # the pruned model needs the same code
    assert load_model(str(tmp_path / "out"), CPU, trust_remote_code=True)


def test_devices():
    assert resolve_device("cpu") == CPU
    with pytest.raises(InvalidInput, match="unknown"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(InvalidInput, match="no CUDA GPU"):
            resolve_device("cuda")
