import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from models import tiny_model, tiny_tokens
from runs import content, save_source

import mipprune
from mipprune.calibration import Windows
from mipprune.checkpoint import TIMINGS_FILE
from mipprune.folder import NotStreamable
from mipprune.job import prune_to_folder
from mipprune.journal import FileJournal
from mipprune.layer_step import LayerStep
from mipprune.opening import Source
from mipprune.placement import FromFolder, Placement
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import NM, InvalidInput, PerRow

WINDOWS = Windows(tiny_tokens(windows=8, length=32), "random tokens")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model's folder."""
    return save_source(
        tiny_model("llama").to(torch.bfloat16), tmp_path_factory.mktemp("models") / "tiny"
    )


def run(source, out, pattern=None, calibration=WINDOWS, **options):
    where = {name: options.pop(name) for name in ("stream", "dtype") if name in options}
    about = {
        name: options.pop(name) for name in ("resume", "host_bytes", "observer") if name in options
    }
    settings = Settings(Rules.of(pattern or NM(2, 4)), **{"samples": 8, "batch_size": 3, **options})
    return prune_to_folder(Source(source, **where), out, calibration, settings, **about)


def test_the_folder_is_the_same_whether_the_model_was_streamed(source, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = run(source, tmp_path / "whole", stream=False)
    streamed = run(source, tmp_path / "streamed", stream=True)
    assert streamed.mask_hash == whole.mask_hash
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("whole", "streamed")
    ]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert models[0]["lm_head.weight"].dtype == torch.bfloat16
    whole, streamed = content(tmp_path / "whole"), content(tmp_path / "streamed")
    for name in ("masks.safetensors", "mipprune.json", "config.json", "generation_config.json"):
        assert whole[name] == streamed[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]
    assert len({path.stat().st_mode for path in (tmp_path / "streamed").iterdir()}) == 1


def test_a_block_left_dense_is_streamed_too(source, tmp_path):
    from transformers import AutoModelForCausalLM

    rules = Rules(NM(2, 4), ignore=("model.layers.1.*",))
    for name in ("whole", "streamed"):
        run(source, tmp_path / name, rules, stream=name == "streamed")
    whole, streamed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict()
        for name in ("whole", "streamed")
    )
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)


@pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "jamba", "deepseek_v3"])
def test_what_transformers_converts_is_streamed_to_what_it_stores(family, tmp_path):
    """Weights that loading renames or merges are read so, and written as the model came."""
    from safetensors.torch import load_file

    model = tiny_model(family)
    for name, buffer in model.state_dict(keep_vars=True).items():
        if not isinstance(buffer, torch.nn.Parameter) and buffer.is_floating_point():
            assert name.endswith("e_score_correction_bias")
            buffer.copy_(torch.rand_like(buffer))  # trained, and stored as no parameter is
    model.save_pretrained(tmp_path / "dense")
    mipprune.load_model("embedded", CPU).tokenizer.save_pretrained(tmp_path / "dense")
    stored = {}
    for name in ("whole", "streamed"):
        report = run(str(tmp_path / "dense"), tmp_path / name, stream=name == "streamed")
        stored[name] = {"mask hash": report.mask_hash}
        for file in (tmp_path / name).glob("model*.safetensors"):
            stored[name].update(load_file(file))
    whole, streamed = stored["whole"], stored["streamed"]
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert streamed.keys() == whole.keys() == dense.keys() | {"mask hash"}
    assert streamed.pop("mask hash") == whole.pop("mask hash")
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)
    assert any(not torch.equal(whole[name], dense[name]) for name in whole)


UPDATED = LayerStep(update="least_squares")
OPTIONS = {
    **{name: {"stream": True} for name in ("begin", "torn", "beside", "unnamed", "named")},
    "middle": {"stream": False},
    "writing": {"stream": False},
    "weights": {"stream": False, "layer_step": UPDATED},
    "torn weights": {"stream": True, "layer_step": UPDATED},
}
OPTIONS = {name: {"solver": "ria", **options} for name, options in OPTIONS.items()}
"""Of runs that are killed, by what they are doing then."""

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_job as t
from mipprune import journal, work

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def within_a_record(n):
    append, count = journal.FileJournal._append, 0
    def torn(self, payload):
        nonlocal count
        count += 1
        if count == n:
            self._open.write(journal._HEAD.pack(journal._MAGIC, len(payload), b"?" * 32))
            self._open.write(payload[: len(payload) // 2])
            self._open.flush()
            die()
        append(self, payload)
    journal.FileJournal._append = torn

def after_a_record(n):
    append, count = journal.FileJournal._append, 0
    def last(self, payload):
        nonlocal count
        append(self, payload)
        count += 1
        count == n and die()
    journal.FileJournal._append = last

def within_the_weights():
    from transformers import PreTrainedModel
    def torn(self, folder):
        for name in (".tmp4fGh2k", "config.json"):  # safetensors renames the first when it is whole
            with open(folder / name, "w") as file:
                file.write("{")
        die()
    PreTrainedModel.save_pretrained = torn

def beside_a_file():
    from solvers import files
    files.give_usual_permissions = lambda path: path.name == "mipprune.json" and die()

def before_the_rename():
    work.os = type("os", (), {**vars(os), "replace": lambda *_: die()})

def after_the_rename():
    work.WorkFolder._remove = lambda _: die()

ends = {
    "begin": lambda: within_a_record(1),
    "torn": lambda: within_a_record(7),
    "middle": lambda: after_a_record(15),
    "writing": within_the_weights,
    "beside": beside_a_file,
    "unnamed": before_the_rename,
    "named": after_the_rename,
    "weights": lambda: after_a_record(13),
    "torn weights": lambda: within_a_record(12),
}
children = {}
for name, end in ends.items():
    if (child := os.fork()) == 0:
        end()
        t.run(sys.argv[2], f"{sys.argv[3]}/{name}", **t.OPTIONS[name])
        os._exit(1)
    children[child] = name
for child, name in children.items():
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
"""


def test_a_killed_run_goes_on_to_the_same_folder(source, tmp_path):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([*sys.path, os.path.dirname(here)])
    subprocess.run(
        [sys.executable, "-c", KILLED, here, source, tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    whole = {}
    for name, options in OPTIONS.items():
        if str(options) not in whole:
            run(source, tmp_path / "whole" / name, **options)
            whole[str(options)] = content(tmp_path / "whole" / name)
    assert len(whole) == 4
    for name, options in OPTIONS.items():
        report = run(source, tmp_path / name, **options, resume=True)
        assert (report is None) == (name in ("unnamed", "named"))
        found, expected = content(tmp_path / name), whole[str(options)]
        assert found.keys() == expected.keys()
        assert [file for file in found if found[file] != expected[file]] == [], name
        assert not (tmp_path / f"{name}.partial").exists()


def interrupted(source, out, monkeypatch, after=5, error=None):
    """A run that ended at its n-th layer."""
    finish, count = FileJournal.finish, []

    def fail(*args):
        count.append(None)
        if len(count) > after:
            raise error or KeyboardInterrupt
        finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FileJournal, "finish", fail)
        with pytest.raises(InvalidInput if error else KeyboardInterrupt) as caught:
            run(source, out)
    return str(caught.value)


def test_an_unfinished_run_is_not_overwritten(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(InvalidInput, match="holds an unfinished run; give --resume"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "'seed' is 1 now but was 0"),
        ({"pattern": PerRow(sparsity=0.5)}, r"'pattern\.\w+' is"),
        ({"solver": "wanda"}, "'solver' is 'wanda' now but was 'swap'"),
        ({"solver_options": {"candidates": 1}}, r"'solver_options.candidates' is 1 now"),
        ({"batch_size": 4}, "'batch_size' is 4 now but was 3"),
        ({"grams": "dense"}, "'grams' is 'dense' now"),
        ({"dtype": "bfloat16"}, "'dtype' is 'bfloat16' now"),
        (
            {"calibration": Windows(tiny_tokens(windows=8, length=32, seed=1), "random tokens")},
            "'calibration tokens.sha256' is",
        ),
    ],
)
def test_changed_settings_are_refused_by_name(source, tmp_path, monkeypatch, change, named):
    interrupted(source, tmp_path / "out", monkeypatch)
    journal = (tmp_path / "out.partial" / "journal").read_bytes()
    with pytest.raises(InvalidInput, match=named):
        run(source, tmp_path / "out", resume=True, **change)
    assert (tmp_path / "out.partial" / "journal").read_bytes() == journal


def test_a_changed_model_is_refused_by_its_layer(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch)
    loaded = mipprune.load_model(source, CPU)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.gate_proj.weight[0, 0] += 1
    opened = Source(source, stream=False).open(CPU)
    opened.model.load_state_dict(loaded.model.state_dict())
    monkeypatch.setattr(Source, "open", lambda *_, **__: opened)
    with pytest.raises(InvalidInput, match=r"layer model\.layers\.0\.mlp\.gate_proj is not"):
        run(source, tmp_path / "out", resume=True)


def test_one_process_at_a_time(source, tmp_path, monkeypatch):
    from mipprune.work import WorkFolder

    interrupted(source, tmp_path / "out", monkeypatch)
    first = WorkFolder(tmp_path / "out", resume=True)
    with pytest.raises(InvalidInput, match="Another process is at work on"):
        run(source, tmp_path / "out", resume=True)
    first._release()
    racing = [WorkFolder(tmp_path / "other") for _ in range(2)]
    racing[0].create()
    with pytest.raises(InvalidInput, match="Another process has just begun"):
        racing[1].create()
    racing[0]._release()
    assert run(source, tmp_path / "out", resume=True).sparsity == 0.5


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EDQUOT, "disk quota exceeded"),
        (errno.EROFS, "read-only file system"),
        (errno.EIO, "input/output error"),
    ],
)
def test_a_disk_that_takes_no_more_is_said(source, tmp_path, monkeypatch, number, reason):
    said = interrupted(source, tmp_path / "out", monkeypatch, error=OSError(number, ""))
    assert f"out cannot be written ({reason}); mend that and go on with --resume" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_full_disk_is_said_and_the_run_goes_on_later(source, tmp_path, monkeypatch):
    interrupted(source, tmp_path / "out", monkeypatch, error=OSError(errno.ENOSPC, ""))
    # a real limit, met by the library that writes the weights
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(InvalidInput, match="cannot be written"):
            run(source, tmp_path / "out", resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "out", resume=True)
    run(source, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_that_is_refused_leaves_nothing(source, tmp_path):
    opened = Source(source, stream=False).open(CPU)
    with torch.no_grad():
        opened.model.model.layers[1].mlp.up_proj.weight.fill_(1e30)
    opened.model.save_pretrained(tmp_path / "wild")
    opened.tokenizer.save_pretrained(tmp_path / "wild")
    with pytest.raises(InvalidInput, match=r"layer model\.layers\.1\.mlp\.down_proj .*overflow"):
        run(str(tmp_path / "wild"), tmp_path / "out", stream=True)
    opened.model.model.layers[2].self_attn.o_proj.weight.data.fill_(torch.nan)
    opened.model.save_pretrained(tmp_path / "wild")
    with pytest.raises(InvalidInput, match=r"Block 2, layer .*2\.self_attn\.o_proj, gives NaN"):
        run(str(tmp_path / "wild"), tmp_path / "out", stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["wild"]


def test_large_models_are_streamed_and_small_ones_are_not(source, monkeypatch):
    assert type(Source(source).open(CPU).placement) is Placement
    monkeypatch.setattr("mipprune.opening.available_memory", lambda: 1000.0)
    assert isinstance(Source(source).open(CPU).placement, FromFolder)

    def refused(*_):
        raise NotStreamable("The folder stores no weight named x.")

    monkeypatch.setattr("mipprune.opening.ModelFolder", refused)
    said = []
    assert type(Source(source).open(CPU, said.append).placement) is Placement
    assert said == ["The folder stores no weight named x. The whole model is loaded into memory."]
    with pytest.raises(InvalidInput, match=r"no weight named x\. Give --no-stream"):
        Source(source, stream=True).open(CPU)


def test_times_are_apart_from_the_record(source, tmp_path):
    report = run(source, tmp_path / "out")
    record = (tmp_path / "out" / "mipprune.json").read_text()
    assert '"seconds"' not in record
    assert '"time"' not in record
    times = json.loads((tmp_path / "out" / TIMINGS_FILE).read_text())
    assert times["seconds"] == report.seconds > 0
    assert times["layers"].keys() == report.masks.keys()
