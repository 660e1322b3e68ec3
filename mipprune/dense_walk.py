"""One pass over the dense model: all layers that rules prune, with what they see."""

from __future__ import annotations

from collections.abc import Iterator

from .calibration import Windows
from .gram import Gram, TokenWeights
from .models import PrunableLayer
from .observer import Observer
from .placement import Placement
from .ranks import ALONE, Ranks
from .rules import Rules
from .walk import HOST_BYTES, BlockWalk


class DenseWalk:
    """Layers with the Gram matrices of their inputs in the unpruned model.

    Parameters
    ----------
    placement
        The model, in evaluation mode; it is left as it was.
    windows
        Calibration tokens.
    rules
        Layers that they leave dense are left out.
    batch_size
        Windows per forward.
    host_bytes
        Activations beyond this wait on disk.
    ranks
        The processes that share the batches.
    observer
        Told about progress.
    weights
        What tokens count in weighted matrices, see `BlockWalk`.
    """

    def __init__(
        self,
        placement: Placement,
        windows: Windows,
        rules: Rules,
        batch_size: int,
        *,
        host_bytes: float = HOST_BYTES,
        ranks: Ranks = ALONE,
        observer: Observer | None = None,
        weights: TokenWeights | None = None,
    ) -> None:
        self.placement, self.windows, self.batch_size = placement, windows, batch_size
        self._rules, self._observer = rules, observer or Observer()
        self._observer.phase("allocation: capture")
        self._walk = BlockWalk(
            placement,
            windows.tokens,
            batch_size,
            propagate=False,
            host_bytes=host_bytes,
            ranks=ranks,
            warn=self._observer.warning,
        )
        self._walk.token_weights = weights

    def __iter__(self) -> Iterator[tuple[int, PrunableLayer, Gram]]:
        """Block's index, layer, its Gram matrix."""
        for step in self._walk:
            for layer in step.layers:
                if self._rules.pattern_for(layer.name) is not None:
                    short = layer.name.removeprefix(f"{self.placement.blocks_name}.")
                    self._observer.phase(f"allocation: {short}")
                    yield step.index, layer, step.grams.gram(layer)
