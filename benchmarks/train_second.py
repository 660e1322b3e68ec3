"""A second model for the benchmarks, trained from scratch: GPT-2's architecture, 3.7 M parameters.

Where the embedded model is a Llama (rotary positions, RMSNorm, gated MLP, grouped queries), this
one has learned positions, LayerNorm, a plain MLP, biases, and fused query, key and value in
transposed weights (`Conv1D`). It reads the embedded model's tokens. Its text is what an
installation has anyway: Python's own documentation (the side that calibrates), and the docstrings
of the standard library and of numpy, scipy and torch. Paragraphs that share eight consecutive
words with the evaluation side are left out. The text differs a little between versions of these.

    python benchmarks/train_second.py --to second         # about 10 minutes on one core
    python benchmarks/study.py --model second
"""

from __future__ import annotations

import math
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, write
from torch import Tensor
from torch.nn.functional import cross_entropy

import mipprune
from mipprune.calibration import cut_windows, read_texts
from mipprune.embedded import docstrings, python_documentation, word_runs
from solvers.files import replaced_on_success

WINDOW = 256
PACKAGES = ("numpy", "scipy", "torch")
REPEAT = 3
"""How often Python's own documentation comes for once of the packages'."""


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of all documents to train on."""
    for index, text in enumerate(python_documentation("calibration")):
        yield f"python {index}", text
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for path in sorted(standard.glob("*/**/*.py")):
        if not {"site-packages", "test", "tests"} & set(path.parts):
            yield f"python {path.relative_to(standard)}", _docstrings(path)
    for package in PACKAGES:
        for path in sorted((installed / package).rglob("*.py")):
            if "tests" not in path.parts:
                yield str(path.relative_to(installed)), _docstrings(path)


def _docstrings(path: Path) -> str:
    try:
        return docstrings(path)
    except (SyntaxError, ValueError):  # templates, and files for other versions of Python
        return ""


def paragraphs_apart(held_out: list[str]) -> Iterator[tuple[str, str]]:
    """The documents without paragraphs that the held-out text has, and without repetitions."""
    seen = {run for text in held_out for run in word_runs(text)}
    known: set[str] = set()
    for name, text in texts():
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if paragraph not in known and seen.isdisjoint(word_runs(paragraph)):
                kept.append(paragraph)
                known.add(paragraph)
        if kept:
            yield name, "\n\n".join(kept)


def token_stream(tokenizer: Any) -> Tensor:
    """All documents, each after an end-of-text token; Python's own `REPEAT` times."""
    stream: list[int] = []
    for name, text in paragraphs_apart(python_documentation("evaluation")):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += [tokenizer.eos_token_id, *tokens] * (REPEAT if name.startswith("python ") else 1)
    return torch.tensor(stream)


def new_model(vocabulary: int, end: int) -> Any:
    """Random weights, by torch's seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=WINDOW,
        n_embd=256,
        n_layer=4,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config)


def train(
    model: Any, stream: Tensor, steps: int, batch: int, rate: float, seed: int, half: bool
) -> None:
    """AdamW, warm-up and cosine decay; windows begin anywhere. ``half``: products in bfloat16."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    chance = np.random.default_rng(seed)
    warm, began, recent = max(steps // 20, 1), time.perf_counter(), math.nan
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = rate * min((step + 1) / warm, decay)
        starts = chance.integers(0, len(stream) - WINDOW, batch)
        tokens = torch.stack([stream[at : at + WINDOW + 1] for at in starts])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = _loss(model, tokens)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent = float(loss) if math.isnan(recent) else 0.95 * recent + 0.05 * float(loss)
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step + 1}: loss {recent:.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def _loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--to", type=Path, required=True, help="new folder of the model")
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch", type=int, default=12, help="windows per step")
    options.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--float32", action="store_true", help="where bfloat16 is slow")
    arguments = options.parse_args()
    if arguments.to.exists():
        raise SystemExit(f"{arguments.to} exists; choose another --to.")
    tokenizer = mipprune.load_model("embedded", torch.device("cpu")).tokenizer
    stream = token_stream(tokenizer)
    torch.manual_seed(arguments.seed)
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} tokens")
    began = time.process_time()
    train(
        model, stream, arguments.steps, arguments.batch, arguments.rate, arguments.seed,
        not arguments.float32,
    )  # fmt: skip
    seconds = time.process_time() - began
    source, held_out = read_texts(None, "evaluation")
    windows = cut_windows(held_out, source, tokenizer, WINDOW)
    found = mipprune.perplexity(model, windows)
    with replaced_on_success(arguments.to) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    record = {
        "architecture": type(model).__name__,
        "parameters": parameters,
        "stream_tokens": len(stream),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "rate": arguments.rate,
        "seed": arguments.seed,
        "products": "float32" if arguments.float32 else "bfloat16",
        "cpu_seconds": seconds,
        "evaluation_windows": len(windows.tokens),
        "perplexity": found.perplexity,
    }
    write(arguments.out, "train_second", record)
    print(f"Perplexity {found.perplexity:.2f} on held-out documentation. Written: {arguments.to}")


if __name__ == "__main__":
    main()
