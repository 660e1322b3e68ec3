"""The command line."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from solvers import InvalidInput

from . import terminal
from .certify import certify, check
from .demo import demo
from .files import report, tokens
from .layers import compare, problem, solvers
from .measure import evaluate, time_2to4
from .prune import prune
from .shrink import shrink

app = typer.Typer(
    name="mipprune",
    help="Choose the weights an LLM keeps by integer optimisation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _command in (demo, prune, shrink, evaluate, tokens, report, problem, compare, certify, check):
    app.command()(_command)
app.command(name="time-2to4")(time_2to4)
app.command()(solvers)


def main() -> None:
    """Run the command line; input that cannot be worked with ends it with exit code 2."""
    try:
        app()
    except InvalidInput as error:
        terminal.err.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
