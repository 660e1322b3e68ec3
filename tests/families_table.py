"""README's table of supported models, from the list that the tests run: `make families`."""

from __future__ import annotations

from pathlib import Path

from models import FAMILIES, NEWER, tiny_model
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from mipprune.models import all_layers, coverage, find_blocks

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- families: make families -->\n", "<!-- end of families -->\n"


def row(family: str) -> str:
    """What is pruned of a family's tiny model."""
    model = tiny_model(family)
    name, blocks = find_blocks(model)
    found = coverage(name, blocks, model)
    layers = all_layers(name, blocks)
    kinds = {"fused experts" for layer in layers if layer.fused}
    kinds |= {"Linear" for layer in layers if isinstance(layer.module, Linear)}
    kinds |= {"Conv1D" for layer in layers if isinstance(layer.module, Conv1D)}
    left = {"routers"} if found.routers else set()
    left |= {uncovered.partition(".")[2].split(".", 2)[-1] for uncovered in found.uncovered}
    share = f"{100 * found.share:.4g} %"
    oldest = "" if family.split()[0] in NEWER else "yes"
    cells = (family, ", ".join(sorted(kinds)), share, ", ".join(sorted(left)), oldest)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table in Markdown."""
    head = "| model type | layers | of block weights prunable | left dense | transformers 4.57 |"
    return "\n".join([head, "|---|---|---:|---|---|", *map(row, FAMILIES)]) + "\n"


def shown() -> str:
    """The table as README has it."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
