"""Running a model block by block, each block with its own arguments.

A block's keyword arguments (attention mask, rotary embeddings, ...) may differ from block to
block, as in models that alternate between full and sliding attention. So every block's own
arguments are recorded in one dense pass, and before anything is changed the replay of all
blocks must give the logits of the direct forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .experts import FusedWeight, all_fused_weights, watched
from .placement import OUTSIDE, Placement

_HIDDEN = "hidden_states"


class ReplayMismatch(InvalidInput):
    """The blocks, run one by one, do not give what the model gives."""


@dataclass(frozen=True)
class Call:
    """Arguments of one block for one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        return hidden_output(block(hidden, *self.args, **self.kwargs))


@dataclass
class Capture:
    """What one dense pass over all batches recorded.

    Attributes
    ----------
    hidden
        Input of the first block, per batch.
    calls
        ``calls[block][batch]``.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)


def hidden_output(output: Any) -> Tensor:
    """Hidden states from a block's output: a tensor, or a tuple that begins with it."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


@torch.no_grad()
def capture(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Sequence[Tensor],
    run: Callable[[nn.Module, Tensor], object] | None = None,
) -> Capture:
    """Record every block's own arguments, and the first block's input, for all batches.

    Parameters
    ----------
    model
        The whole model, in evaluation mode.
    blocks
        Its decoder blocks.
    batches
        Token ids, int64 ``[windows, length]`` each.
    run
        Runs the model on a batch; the default leaves out its head, whose logits need much memory.
    """
    record = Capture(calls=[[] for _ in blocks])
    store = _Store()

    def hook(index: int) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split(args, kwargs)
            if index == 0:
                record.hidden.append(hidden)
            record.calls[index].append(Call(store.keep(call.args), store.keep(call.kwargs)))

        return before

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(hook(index), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            (run or body_forward)(model, batch)
    for index, calls in enumerate(record.calls):
        if len(calls) != len(batches):
            raise ReplayMismatch(
                f"Block {index} ran {len(calls)} times for {len(batches)} batches; "
                "a model whose blocks do not run once each cannot be pruned block by block."
            )
    return record


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits of a batch of token ids, without a cache."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=batch.to(device), use_cache=False).logits
    return logits


def body_forward(model: nn.Module, batch: Tensor) -> None:
    """Run all blocks, but not the head."""
    body = getattr(model, "base_model", model)
    body(input_ids=batch.to(next(model.parameters()).device), use_cache=False)


@torch.no_grad()
def check_replay(model: nn.Module, blocks: nn.ModuleList, batch: Tensor) -> float:
    """Replay all blocks on one batch and compare with the direct forward.

    Returns
    -------
    float
        Largest absolute difference of the logits.

    Raises
    ------
    ReplayMismatch
        If an output differs by more than rounding; it names the first block that does.
    """
    return replay(model, blocks, batch).error


@dataclass(frozen=True)
class Replay:
    """What `replay` found: the largest difference of the logits, and what it recorded."""

    error: float
    record: Capture


@torch.no_grad()
def replay(
    model: nn.Module, blocks: nn.ModuleList, batch: Tensor, placement: Placement | None = None
) -> Replay:
    """`check_replay`, wherever the weights are; every block is asked for twice."""
    outputs: list[Any] = []
    logits: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(placement.forward() if placement else nullcontext())
        for block in blocks:
            handle = block.register_forward_hook(lambda _, __, out: outputs.append(out))
            stack.callback(handle.remove)
        record = capture(model, blocks, [batch], lambda *of: logits.append(forward(*of)))
    hidden = record.hidden[0]
    for index, (block, calls) in enumerate(zip(blocks, record.calls, strict=True)):
        with placement.block(index) if placement else nullcontext():
            inputs, hidden = hidden, calls[0].run(block, hidden)
            direct = hidden_output(outputs[index])
            if not _close(hidden, direct):
                raise ReplayMismatch(
                    f"Block {index} replayed alone differs from the model's own forward by "
                    f"{float((hidden - direct).abs().max()):.2g}; nothing was pruned."
                )
            _check_experts(index, block, calls[0], inputs, hidden)
    last = outputs[-1]
    outputs[-1] = (hidden, *last[1:]) if isinstance(last, tuple) else hidden
    outside = placement.block(OUTSIDE) if placement else nullcontext()
    with outside, answering(blocks, lambda index, _: outputs[index]):
        replayed = forward(model, batch)
    if not _close(replayed, logits[0]):
        raise ReplayMismatch("The logits of the replayed blocks differ from the model's own.")
    return Replay(float((replayed - logits[0]).abs().max()), record)


@contextmanager
def answering(
    blocks: Iterable[nn.Module], answer: Callable[[int, Tensor], object]
) -> Iterator[None]:
    """While this lasts, blocks are not run: each gives ``answer(its place, hidden states)``."""
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            own = block.__dict__.get("forward")
            stack.callback(_restore_forward, block, own)
            block.forward = partial(_answer, answer, index)
        yield


def _answer(
    answer: Callable[[int, Tensor], object], index: int, *args: Any, **kwargs: Any
) -> object:
    return answer(index, _split(args, kwargs)[0])


def _restore_forward(block: nn.Module, own: Any) -> None:
    del block.forward
    if own is not None:
        block.forward = own


def _check_experts(
    index: int, block: nn.Module, call: Call, inputs: Tensor, hidden: Tensor
) -> None:
    """Run expert by expert, a block with fused experts must give the same."""
    weights = all_fused_weights(block, f"Block {index}")
    if not weights:
        return
    rows: dict[str, int] = {}

    def seen(weight: FusedWeight, _: int, routed: Tensor) -> None:
        rows[weight.name] = rows.get(weight.name, 0) + len(routed)

    with watched(weights, seen):
        apart = call.run(block, inputs)
    if not _close(apart, hidden):
        raise ReplayMismatch(
            f"Block {index} run expert by expert differs from the model's own forward by "
            f"{float((apart - hidden).abs().max()):.2g}; nothing was pruned."
        )
    for weight in weights:
        # Every weight of a module of experts is multiplied with as many tokens as its others.
        expected = max(
            rows.get(other.name, 0) for other in weights if other.module is weight.module
        )
        if rows.get(weight.name, 0) != expected or expected == 0:
            raise ReplayMismatch(
                f"{weight.name} holds experts, but products with them could not be observed; "
                "nothing was pruned."
            )


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 64 * torch.finfo(a.dtype).eps * float(b.abs().max())
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Separate the hidden states from a block's other arguments."""
    if args:
        return args[0], Call(args[1:], kwargs)
    rest = {name: value for name, value in kwargs.items() if name != _HIDDEN}
    return kwargs[_HIDDEN], Call((), rest)


class _Store:
    """Keeps one copy of equal tensors, however often they are passed."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            same = self._kept.setdefault((tuple(value.shape), value.dtype, value.device), [])
            for known in same:
                if known is value or torch.equal(known, value):
                    return known
            same.append(value)
            return value
        if isinstance(value, (tuple, list)):
            return type(value)(self.keep(item) for item in value)
        if isinstance(value, dict):
            return {name: self.keep(item) for name, item in value.items()}
        return value
