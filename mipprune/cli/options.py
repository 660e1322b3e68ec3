"""Options that several commands have, and what their texts mean."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from solvers import NM, InvalidInput, Pattern, PerLayer, PerRow

_NO_RECIPE = ("config", "log", "quiet", "verbose", "trust_remote_code", "resume", "dry_run")
"""Options of the command line alone: how a run is watched, begun or resumed, and trust, which no
file can give."""

ModelArgument = Annotated[
    str, typer.Argument(help='Folder, Hugging Face id, or "embedded".', show_default=False)
]
Sparsity = Annotated[float | None, typer.Option(help="Fraction of weights removed, in (0, 1).")]
PatternName = Annotated[
    str | None,
    typer.Option("--pattern", help="keep:group, such as 2:4 (keeps 2 of every 4)."),
]
Scope = Annotated[str, typer.Option(help="Sparsity per row or per layer.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="[stream:]NAME[:CONFIG][#SPLIT][@COLUMN]: a .txt, .jsonl or .parquet file, a folder "
        "of such, a data set's id, or a token file. Default: Python's own documentation."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per window, at most the model's positions.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward.")]
BatchOrNone = Annotated[
    int | None,
    typer.Option("--batch-size", help="Windows per forward.  [default: by the device's memory]"),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.partial.")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read the model block by block and never hold it whole.  [default: if it is large]",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DTypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of windows and solver.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")
]
Blocks = Annotated[str | None, typer.Option(help="Name of the module list of blocks.")]
SolverOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="Option of the solver, name=value; repeatable."),
]
TokenCache = Annotated[Path | None, typer.Option(help="Folder of token files to read or fill.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes.")]


def take_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Let a recipe's values be the defaults of the command's options."""
    from ..recipe import read_recipe

    if path is not None:
        options = [one for one in context.command.params if one.name not in (*_NO_RECIPE, "help")]
        repeated = {str(one.name) for one in options if getattr(one, "multiple", False)}
        values = read_recipe(path, {str(one.name) for one in options}, repeated)
        context.default_map = dict(values)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=take_recipe,
        help="YAML file of these options; what the command line says too wins.",
    ),
]


def recipe_of(context: typer.Context) -> dict[str, Any]:
    """The command's options as they are in force."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in _NO_RECIPE and value not in (None, [], ())
    }


def parse_pattern(sparsity: float | None, pattern: str | None, scope: str) -> Pattern:
    """The pattern that the options name; `InvalidInput` if they name none or two."""
    if (sparsity is None) == (pattern is None):
        raise InvalidInput("Give either --sparsity (such as 0.6) or --pattern (such as 2:4).")
    if scope not in ("row", "layer"):
        raise InvalidInput(f"Scope '{scope}' is neither row nor layer.")
    if pattern is not None:
        if scope == "layer":
            raise InvalidInput("A keep:group pattern has no scope; leave --scope out.")
        return NM.parse(pattern)
    return PerRow(sparsity=sparsity) if scope == "row" else PerLayer(sparsity=sparsity)


def parse_options(options: list[str]) -> dict[str, Any]:
    """``name=value`` texts as a dictionary; values are JSON where they can be, else text."""
    parsed: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"Solver option '{text}' is not of the form name=value.")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written, before hours are spent on its content."""
    above = next((parent for parent in file.absolute().parents if parent.exists()), file)
    if file.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise InvalidInput(f"{file} cannot be written; choose another file.")
