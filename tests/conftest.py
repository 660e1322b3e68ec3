import os

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on the CPU unless told otherwise
os.environ["TOKENIZERS_PARALLELISM"] = "false"

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
