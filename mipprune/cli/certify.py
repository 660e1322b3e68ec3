"""`mipprune certify` and `mipprune check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .options import Device, Seed, TrustRemoteCode
from .terminal import phases, quiet_transformers


def certify(
    folder: Annotated[Path, typer.Argument(help="Folder of a pruned model.", show_default=False)],
    rows: Annotated[int, typer.Option(help="Rows per layer, at random; 0 for all.")] = 16,
    row_seconds: Annotated[float, typer.Option(help="Most seconds per row.")] = 10.0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
) -> None:
    """Bound how far each layer's mask is from the best; write certificates into the folder."""
    from ..certify import certify as run
    from ..report import certificate_table

    quiet_transformers()
    with terminal.err.status("") as status:
        found = run(
            folder,
            rows=rows or None,
            row_seconds=row_seconds,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=phases(status),
        )
    terminal.out.print(certificate_table(found))
    terminal.out.print(f"Written: {folder / 'certificates'}", soft_wrap=True, markup=False)


def check(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a certified model.", show_default=False)
    ],
    exact: Annotated[
        bool, typer.Option("--exact", help="In ball arithmetic (pip install 'mipprune[exact]').")
    ] = False,
) -> None:
    """Verify a folder's certificates from its files alone, apart from all solvers."""
    from ..certify import check_folder

    checked = check_folder(folder, exact=exact)
    terminal.out.print(str(checked), highlight=False, soft_wrap=True)
    if checked.missing:
        shown = ", ".join(checked.missing[:4]) + (", ..." if len(checked.missing) > 4 else "")
        terminal.out.print(f"Without certificate: {shown}", markup=False, highlight=False)
    terminal.out.print(checked.not_proven, highlight=False, soft_wrap=True)
