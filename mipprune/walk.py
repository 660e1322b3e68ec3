"""One pass over a model's blocks, from captured inputs to Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .capture import capture, check_replay
from .gram import GramCollector
from .models import PrunableLayer, prunable_layers


@dataclass(frozen=True)
class BlockStep:
    """A block whose Gram matrices are at hand."""

    index: int
    layers: list[PrunableLayer]
    grams: GramCollector


class BlockWalk:
    """Blocks in order; each one's inputs are the previous ones' outputs.

    Parameters
    ----------
    model
        In evaluation mode. Its replay is checked first, see `check_replay`.
    blocks_name, blocks
        From `find_blocks`.
    tokens
        int64 ``[windows, length]``.
    batch_size
        Windows per forward.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks_name: str,
        blocks: nn.ModuleList,
        tokens: Tensor,
        batch_size: int,
    ) -> None:
        self._name, self._blocks = blocks_name, blocks
        batches = torch.split(tokens, batch_size)
        self.replay_error = check_replay(model, blocks, batches[0])
        record = capture(model, blocks, batches)
        self._hidden, self._calls = record.hidden, record.calls

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def visit(self, index: int) -> BlockStep:
        """Run block ``index`` as it is, collecting Gram matrices; keeps its outputs."""
        layers = prunable_layers(self._blocks[index], f"{self._name}.{index}")
        grams = GramCollector(layers)
        self._outputs: list[Tensor] = []
        for hidden, call in zip(self._hidden, self._calls[index], strict=True):
            with grams.collecting():
                self._outputs.append(call.run(self._blocks[index], hidden))
        return BlockStep(index, layers, grams)

    @torch.no_grad()
    def leave(self, index: int, rerun: bool) -> None:
        """Pass on to the next block: with the outputs kept, or with those of a rerun."""
        if rerun:
            for batch, call in enumerate(self._calls[index]):
                self._hidden[batch] = call.run(self._blocks[index], self._hidden[batch])
        else:
            self._hidden = self._outputs
