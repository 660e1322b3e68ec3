import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU unless told otherwise
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one thread per worker: threads that wait for each other spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("mipprune", deadline=None, derandomize=True)
settings.load_profile("mipprune")


@pytest.fixture
def embedded():
    """A fresh copy of the embedded model, float32 on the CPU."""
    import torch

    from mipprune import load_model

    return load_model("embedded", torch.device("cpu"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; its exit code, output and error output."""
    from mipprune import cli
    from mipprune.cli import terminal

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mipprune", *map(str, args)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        printed = capsys.readouterr()
        return ending.value.code or 0, printed.out, printed.err

    monkeypatch.setattr(terminal, "out", terminal.Console(width=200))
    monkeypatch.setattr(terminal, "err", terminal.Console(width=200, stderr=True))
    return run
