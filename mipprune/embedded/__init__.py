"""What travels with the package: a small trained GPT, and text to calibrate and evaluate it on.

The model (`man-llama-5m`: Llama architecture, 4.95 M parameters, 6 blocks, width 256) was
trained from scratch on manual pages, in windows of 256 tokens, beyond which it fails; its
configuration says so. The text is Python's own documentation, read from the
running interpreter: the manual's topics (`pydoc_data.topics`) and the docstrings of the
standard library. It therefore differs a little between Python versions.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

MODEL_NAME = "embedded"
"""Stands for the embedded model wherever a model is named."""

MODEL_PATH = Path(__file__).parent / "man-llama-5m"

Side = Literal["calibration", "evaluation"]

_SHARED_RUN = 8
"""An evaluation paragraph with so many consecutive words of the calibration text is dropped."""


def python_documentation(side: Side) -> list[str]:
    """Documents of one side of the split, in a fixed order.

    Documents are assigned by a hash of their name. Documentation repeats itself, so every
    evaluation paragraph that shares `_SHARED_RUN` consecutive words with any calibration
    document is left out: nothing that masks are chosen on is measured on.
    """
    return list(_split()[side])


@lru_cache(maxsize=1)
def _split() -> dict[Side, tuple[str, ...]]:
    sides: dict[Side, list[str]] = {"calibration": [], "evaluation": []}
    for name, text in _documents():
        even = sha256(name.encode()).digest()[0] % 2 == 0
        sides["calibration" if even else "evaluation"].append(text)
    seen = {run for text in sides["calibration"] for run in word_runs(text)}
    evaluation = (_without(seen, text) for text in sides["evaluation"])
    return {
        "calibration": tuple(sides["calibration"]),
        "evaluation": tuple(text for text in evaluation if text),
    }


def word_runs(text: str, length: int = _SHARED_RUN) -> Iterator[tuple[str, ...]]:
    """All runs of ``length`` consecutive words, ignoring case, marks and layout."""
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[start:] for start in range(length)), strict=False)


def _without(seen: set[tuple[str, ...]], text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(p for p in paragraphs if seen.isdisjoint(word_runs(p)))


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = docstrings(path)
        if text:
            yield f"module {path.stem}", text


def docstrings(path: Path) -> str:
    """All docstrings of a source file, in order; the file is parsed, never run."""
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)
