import json
import os
import subprocess
import sys

import pytest
import torch
from models import tiny_model, tiny_tokens

import mipprune
from mipprune.placement import Placement
from mipprune.ranks import Ranks
from mipprune.walk import BlockWalk
from solvers import InvalidInput

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import json, torch
from models import tiny_model, tiny_tokens
import mipprune
from mipprune import LayerStep, Surrogate
from mipprune.calibration import Windows
from mipprune.job import prune_to_folder
from mipprune.opening import Source
from mipprune.ranks import ranks_of_environment
from mipprune.rules import Rules
from mipprune.settings import Settings
from solvers import NM, PerLayer, PerRow

torch.set_num_threads(1)
windows = Windows(tiny_tokens(windows=9, length=32), "random tokens")
with ranks_of_environment(torch.device("cpu")) as ranks:
    records = []
    aimed = LayerStep(Surrogate(dense_targets=1.0, stream=True), "least_squares", bias="existing")
    for family, solver, pattern, grams, step in (
        ("llama", "swap", PerRow(sparsity=0.6), "pruned", LayerStep()),
        ("gpt2", "swap", NM(2, 4), "dense", LayerStep()),
        ("llama", "ria", PerRow(sparsity=0.6), "pruned", LayerStep()),
        ("llama", "swap", PerLayer(sparsity=0.6), "pruned", LayerStep()),
        ("qwen2", "wanda", NM(2, 4), "sequential", aimed),
        ("mixtral", "wanda", NM(2, 4), "sequential", aimed),
    ):
        report = mipprune.prune(
            tiny_model(family), None, windows, pattern, solver,
            grams=grams, samples=9, batch_size=2, layer_step=step, ranks=ranks,
            permute={"gpt2": "neurons", "qwen2": "all"}.get(family),
        )
        losses = [(layer.tokens, layer.updated_loss) for layer in report.layers]
        records.append((report.mask_hash, report.to_dict()["order"], losses))
    for tokens, row_groups in (("fisher", 2), ("inverse_norm", 1)):
        surrogate = mipprune.Surrogate(tokens=tokens, row_groups=row_groups)
        report = mipprune.prune(
            tiny_model("llama"), None, windows, NM(2, 4), "wanda",
            samples=9, batch_size=2, ranks=ranks, layer_step=mipprune.LayerStep(surrogate),
        )
        records.append((report.mask_hash, [layer.surrogate_loss for layer in report.layers]))
    settings = Settings(Rules(NM(2, 4)), "ria", samples=9, batch_size=2)
    source = Source(sys.argv[2], stream=True)
    report = prune_to_folder(source, sys.argv[3], windows, settings, ranks=ranks)
    records.append((report.mask_hash, report.settings["model"]))
    everyone = ranks.gather_objects(records)
    assert all(one == records for one in everyone)
    if ranks.first:
        print(json.dumps(records))
tasks = Path("/proc/self/task")  # the group is gone, and its threads
if tasks.is_dir():
    assert not [name for task in tasks.iterdir() if "gloo" in (name := (task / "comm").read_text())]
"""


def test_two_processes_give_the_masks_of_one(tmp_path):
    """Nine windows in batches of two: the second process has one batch less."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    source = tmp_path / "model"
    tiny_model("llama").save_pretrained(source)
    mipprune.load_model("embedded", torch.device("cpu")).tokenizer.save_pretrained(source)
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    tests = os.path.dirname(os.path.dirname(__file__))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    outputs = [
        subprocess.run(
            [*command, str(worker), tests, str(source), str(tmp_path / name)],
            check=True,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        for name, command in (("one", [sys.executable]), ("two", launch))
    ]
    one, two = (json.loads(output.strip().splitlines()[-1]) for output in outputs)
    assert one == two
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][f] == files[1][f] for f in files[0] if f.endswith(".safetensors"))


def test_processes_without_work_are_refused():
    tokens = tiny_tokens(windows=3, length=16)
    with pytest.raises(InvalidInput, match="leave some of 2 processes without work"):
        BlockWalk(Placement(tiny_model("llama")), tokens, 3, ranks=Ranks(0, 2))
