"""How a run tells about itself while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import LayerResult


class Observer:
    """Told how a run proceeds; methods do nothing unless overridden."""

    def begin(self, blocks: int, weights: int) -> None:
        """The model has so many blocks and prunable weights."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def layer(self, block: int, result: LayerResult) -> None:
        """A layer of block ``block`` is finished."""

    def warning(self, text: str) -> None:
        """Something to know at once; the record has it too."""
