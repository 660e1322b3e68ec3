"""One pass over a model's blocks, from captured inputs to Gram matrices.

Of the model, only the block at work needs to be on the device, see `mipprune.placement`; of the
activations, one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .activations import Activations
from .capture import Call, Capture, answering, capture, hidden_output, replay
from .dense_side import DenseSide, TargetCollector
from .errors import OutOfMemory
from .gram import GramCollector, TokenWeights
from .models import PrunableLayer, prunable_layers
from .placement import OUTSIDE, Placement
from .ranks import ALONE, Ranks
from .stages import Stages
from .surrogate import Targets

HOST_BYTES = 16 * 2**30
"""Activations beyond this wait on disk, unless another bound is given."""


class BlockStep:
    """A block on the device, or one stage of it.

    Attributes
    ----------
    index
        The block's number.
    layers
        Its prunable layers, or those of the stage.
    """

    def __init__(
        self,
        index: int,
        layers: list[PrunableLayer],
        collect: Callable[[], GramCollector],
        run: Callable[[nn.Module], Tensor],
        before_change: Callable[[PrunableLayer], None] = lambda _: None,
    ) -> None:
        self.index, self.layers = index, layers
        self._collect, self._run, self._before_change = collect, run, before_change
        self._grams: GramCollector | None = None
        self._changes: list[tuple[PrunableLayer, Tensor, Tensor | None, Tensor | None]] = []

    @property
    def grams(self) -> GramCollector:
        """Gram matrices of the layers' inputs; the block is run for them on first use."""
        if self._grams is None:
            self._grams = self._collect()
        return self._grams

    def prune(
        self,
        layer: PrunableLayer,
        mask: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """When the walk goes on, set a layer's weights outside its mask to zero.

        If a new weight or a new bias is given, it takes the old one's place.
        """
        self._changes.append((layer, mask, weight, bias))

    def output(self, block: nn.Module) -> Tensor:
        """What a block gives in this one's place, on the first batch."""
        return self._run(block)

    def refresh(self) -> None:
        """Make the changes so far; Gram matrices asked for from now on see them."""
        self.apply()
        self._grams = None

    def apply(self) -> bool:
        """Make the changes; whether there were any."""
        for layer, mask, weight, bias in self._changes:
            self._before_change(layer)
            if weight is None:
                layer.weight.masked_fill_(~mask.to(layer.weight.device), 0.0)
            else:
                layer.weight.copy_(weight)
            if bias is not None:
                assert layer.bias is not None, "only a bias that there is takes up means"
                layer.bias.copy_(bias)
        return bool(self._changes)


class BlockWalk:
    """Blocks in order; each one's inputs are the previous ones' outputs.

    Parameters
    ----------
    placement
        The model, in evaluation mode. Its replay is checked first, see `replay`.
    tokens
        int64 ``[windows, length]``.
    batch_size
        Windows per forward. Halved if the device's memory does not suffice.
    propagate
        Whether a block's inputs come from the pruned blocks before it, or from the dense ones.
    host_bytes
        Activations beyond this wait on disk.
    folder
        Where on disk; None for the usual place of temporary files.
    ranks
        The processes that share the batches.
    warn
        Told when the batch size is halved.
    watched
        Layers whose Gram matrices may be asked for; None for all.
    stages
        In what order a block's layers are pruned: each stage is a step of its own, whose Gram
        matrices see what was pruned in the steps before. None makes one step of every block.
    targets
        Whether the dense model is run alongside: "dense" for what its layers would see,
        `Gram.cross`; "stream" for `Gram.gap` too; "own": not. Takes a second set of hidden states
        and a second copy of a block's weights.

    Attributes
    ----------
    token_weights
        What tokens count in weighted matrices beside the plain ones; None for no such matrices.
    """

    def __init__(
        self,
        placement: Placement,
        tokens: Tensor,
        batch_size: int,
        *,
        propagate: bool = True,
        host_bytes: float = HOST_BYTES,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
        warn: Callable[[str], None] = lambda _: None,
        watched: Container[str] | None = None,
        stages: Stages | None = None,
        targets: Targets = "own",
    ) -> None:
        self._placement, self._ranks, self._warn = placement, ranks, warn
        assert propagate or (stages is None and targets == "own"), (
            "the dense model's inputs change in no stage"
        )
        self._watched, self._stages = watched, stages
        self.token_weights: TokenWeights | None = None
        self._name, self._blocks = placement.blocks_name, placement.blocks
        self._propagate = propagate
        batches = torch.split(tokens, batch_size)
        if len(batches) < ranks.size:
            raise InvalidInput(
                f"{len(tokens)} windows in batches of {batch_size} leave some of {ranks.size} "
                "processes without work; give a smaller batch size."
            )
        self._rounds = -(-len(batches) // ranks.size)
        self._batches = list(batches[ranks.rank :: ranks.size])
        self.quick = False
        try:
            with _outputs_seen(self._name, self._blocks) as self._lengths:
                checked = replay(placement.model, self._blocks, tokens[:1], placement)
            self.replay_error = checked.error
            self.quick = self._passing_on_suffices(tokens[:1], checked.record)
            record = self._capture()
        except torch.OutOfMemoryError:
            raise self._too_little_memory(1) from None
        self._calls = record.calls
        host_bytes /= 1 if targets == "own" else 2
        self.activations = Activations(placement.device, host_bytes, folder)
        for hidden in record.hidden:
            self.activations.append(hidden)
        self._dense: DenseSide | None = None
        self._follows = targets == "stream"
        if targets != "own":
            self._dense = DenseSide(Activations(placement.device, host_bytes, folder))
            for hidden in record.hidden:
                self._dense.activations.append(hidden)

    def __len__(self) -> int:
        return len(self._blocks)

    @torch.no_grad()
    def __iter__(self) -> Iterator[BlockStep]:
        """Each block on the device, stage by stage; what the loop's body changed feeds the next."""
        for index in range(len(self)):
            with self._placement.block(index) as block:
                changed = False
                for layers in self._in_stages(index, block):
                    step = self._step(index, layers)
                    yield step
                    if not self._propagate:
                        self._advance(index)
                    changed |= step.apply()
                if changed:
                    self._placement.keep(index)
                if self._propagate:
                    self._advance(index)
                if self._dense is not None:
                    self._dense.leave()

    def _in_stages(self, index: int, block: nn.Module) -> list[list[PrunableLayer]]:
        layers = prunable_layers(block, f"{self._name}.{index}")
        if self._stages is None:
            return [layers]

        def first(batch: int) -> None:
            if batch == 0:
                self._run(index, batch)

        def forward() -> None:
            self.for_each_batch(first)

        return self._stages.of(index, block, layers, forward)

    def _step(self, index: int, layers: list[PrunableLayer]) -> BlockStep:
        seen = [one for one in layers if self._watched is None or one.name in self._watched]

        @torch.no_grad()
        def collect() -> GramCollector:
            grams, run = self._collector(index, seen)
            self.for_each_batch(run)
            if len(self.activations) < self._rounds:
                grams.commit()
            return grams

        @torch.no_grad()
        def run(other: nn.Module) -> Tensor:
            return self._calls[index][0].run(other, self.activations[0])

        keep = self._dense.keep if self._dense is not None else lambda _: None
        return BlockStep(index, layers, collect, run, keep)

    def _collector(
        self, index: int, layers: list[PrunableLayer]
    ) -> tuple[GramCollector, Callable[[int], None]]:
        """A collector for some layers of a block, and what has it see a batch."""
        dense = self._dense
        if dense is None:
            grams = GramCollector(layers, self._ranks, self.token_weights)

            def run(batch: int) -> None:
                hidden = self.activations[batch]
                with grams.collecting(self.place(batch), hidden):
                    self._calls[index][batch].run(self._blocks[index], hidden)

            return grams, run
        assert self.token_weights is None, "dense targets are for tokens that count the same"
        block = self._blocks[index] if self._follows else None
        beside = TargetCollector(layers, self._ranks, block)

        def run_both(batch: int) -> None:
            with dense.block(), beside.dense(self._batches[batch].numel()):
                self._run(index, batch, dense.activations)
            with beside.collecting():
                self._run(index, batch)

        return beside, run_both

    def _advance(self, index: int) -> None:
        """Replace the hidden states by the block's outputs, if another block needs them."""
        if index + 1 == len(self):
            return

        def replace(batch: int) -> None:
            self.activations[batch] = self._run(index, batch)

        self.for_each_batch(replace)
        dense = self._dense
        if dense is None:
            return

        def replace_dense(batch: int) -> None:
            with dense.block():
                dense.activations[batch] = self._run(index, batch, dense.activations)

        self.for_each_batch(replace_dense)

    def _run(self, index: int, batch: int, hidden: Activations | None = None) -> Tensor:
        hidden = self.activations if hidden is None else hidden
        return self._calls[index][batch].run(self._blocks[index], hidden[batch])

    @property
    def windows(self) -> int:
        """How many this process runs."""
        return sum(map(len, self._batches))

    def tokens(self, batch: int) -> Tensor:
        """A batch's tokens, int64 ``[windows, length]``."""
        return self._batches[batch]

    def place(self, batch: int) -> slice:
        """Where a batch's windows are among all of this process."""
        begin = sum(map(len, self._batches[:batch]))
        return slice(begin, begin + len(self._batches[batch]))

    def call(self, index: int, batch: int) -> Call:
        """A block's own arguments for a batch."""
        return self._calls[index][batch]

    def as_output(self, index: int, hidden: Tensor) -> object:
        """Hidden states in the form of a block's own output."""
        return _passing_on(self._lengths)(index, hidden)

    def for_each_batch(self, work: Callable[[int], None]) -> None:
        """Work on all batches; when memory runs out, go on from there with smaller ones."""
        batch = 0
        while batch < len(self.activations):
            try:
                work(batch)
            except torch.OutOfMemoryError:
                batch = self._halve(batch)
            else:
                batch += 1

    def _halve(self, done: int) -> int:
        """Halve the batches; ``done`` in the new count."""
        size = max(len(batch) for batch in self._batches)
        if size == 1 or self._ranks.size > 1:
            raise self._too_little_memory(size)
        half = (size + 1) // 2
        self._warn(f"Out of device memory: from here on in batches of {half} windows.")
        finer = [torch.split(batch, half) for batch in self._batches]
        self._batches = [part for parts in finer for part in parts]
        sizes = [len(batch) for batch in self._batches]
        self.activations = self.activations.split(sizes)
        if self._dense is not None:
            self._dense.activations = self._dense.activations.split(sizes)
        self._calls = self._capture().calls
        return sum(len(parts) for parts in finer[:done])

    def _too_little_memory(self, windows: int) -> OutOfMemory:
        return OutOfMemory(
            f"{self._placement.device} has too little memory for a batch of {windows} windows of "
            f"{self._batches[0].shape[1]} tokens; give a smaller --batch-size or --seqlen "
            "(--dry-run estimates the memory needed)."
        )

    def _capture(self) -> Capture:
        """Arguments of all blocks and inputs of the first, for this process's batches.

        Blocks only pass on what they are given, where that leads to the same arguments as
        running them does, as it does unless a model computes arguments from hidden states.
        """
        model, blocks = self._placement.model, self._blocks
        if self.quick:
            outside = self._placement.block(OUTSIDE)
            with outside, answering(blocks, _passing_on(self._lengths)):
                return capture(model, blocks, self._batches)
        with self._placement.forward():
            return capture(model, blocks, self._batches)

    def _passing_on_suffices(self, tokens: Tensor, true: Capture) -> bool:
        """Whether these tokens give the recorded arguments when blocks only pass on."""
        if None in self._lengths:
            return False
        outside = self._placement.block(OUTSIDE)
        with outside, answering(self._blocks, _passing_on(self._lengths)):
            quick = capture(self._placement.model, self._blocks, [tokens])
        return all(
            _equal(a[0].args, b[0].args) and _equal(a[0].kwargs, b[0].kwargs)
            for a, b in zip(true.calls, quick.calls, strict=True)
        )


@contextmanager
def _outputs_seen(blocks_name: str, blocks: nn.ModuleList) -> Iterator[list[int | None]]:
    """The length of every block's output tuple, 0 for a plain tensor.

    None if it never ran, or gave more than hidden states. Whatever is not finite is refused.
    """
    seen: list[int | None] = [None] * len(blocks)

    def note(index: int) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[index] = 0
            elif isinstance(output, tuple) and all(extra is None for extra in output[1:]):
                seen[index] = len(output)
            _must_be_finite(f"Block {index}", hidden_output(output))

        return after

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(note(index)).remove)
            for layer in prunable_layers(block, f"{blocks_name}.{index}"):
                check = partial(_check_output, f"Block {index}, layer {layer.name},")
                stack.callback(layer.module.register_forward_hook(check).remove)
        yield seen


def _check_output(where: str, _: nn.Module, __: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        _must_be_finite(where, output)


def _must_be_finite(where: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InvalidInput(
            f"{where} gives NaN or infinite values in the dense model; mend its weights or try "
            "another dtype, such as bfloat16 or float32. Nothing was pruned."
        )


def _passing_on(lengths: list[int | None]) -> Callable[[int, Tensor], object]:
    """Blocks give out the hidden states that they are given, in the form of their own outputs."""

    def answer(index: int, hidden: Tensor) -> object:
        length = lengths[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    return answer


def _equal(a: Any, b: Any) -> bool:
    """Whether two blocks' arguments are the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
