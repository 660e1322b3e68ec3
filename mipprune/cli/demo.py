"""`mipprune demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .options import Seed
from .terminal import quiet_transformers


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path(
        "mipprune-demo"
    ),
    samples: Annotated[int, typer.Option(help="Windows to calibrate and to evaluate on.")] = 128,
    row_seconds: Annotated[float, typer.Option(help="Most seconds to bound a row.")] = 8.0,
    seed: Seed = 0,
) -> None:
    """Prune the embedded GPT in several ways and compare them, offline."""
    from ..demo import CERTIFIED_LAYER, CERTIFIED_ROWS, METHODS, PATTERNS, run_demo
    from ..progress import progress
    from ..report import demo_table, evidence_legend

    quiet_transformers()
    with progress(terminal.err, runs=len(METHODS) * len(PATTERNS)) as observe:
        rows = run_demo(out, samples=samples, seed=seed, row_seconds=row_seconds, observer=observe)
    terminal.out.print(demo_table(rows))
    terminal.out.print(
        f"Gap at most: how far the masks of {len(CERTIFIED_ROWS)} rows of {CERTIFIED_LAYER} "
        "can be from the best ones, by bounds that rest on the evidence named.",
        *evidence_legend(row.evidence for row in rows),
        sep="\n",
    )
    for row in rows:
        if row.loss_reduction is not None:
            terminal.out.print(
                f"{row.pattern}: {row.method} lowers the summed layer loss "
                f"by {row.loss_reduction:.1%} against its start."
            )
    terminal.out.print(
        f"Written: {out / 'demo.json'}, {out / 'demo.png'}", soft_wrap=True, markup=False
    )
