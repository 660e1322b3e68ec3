"""What each calibration token counts where masks are judged, see `Surrogate`.

Fisher weights take the gradient of the dense model's own next-token loss, summed over tokens, with
respect to every layer's output. Only one block is on the device at a time, so the backward pass
recomputes each block, last to first, with gradients and on its recorded input.

A weight belongs to a token, that is to a position in a window, and not to a batch: batches may be
halved later on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from solvers import InvalidInput

from .capture import Call, answering, forward
from .gram import TokenWeights, WeightOf
from .models import PrunableLayer, prunable_layers
from .observer import Observer
from .placement import OUTSIDE, FromFolder, Placement
from .surrogate import Surrogate, row_slices
from .walk import BlockWalk

_EVERY_TOKEN = (
    "token weights are for layers that see every token once. Leave such layers dense (--ignore), "
    "or give --tokens equal."
)


class InverseNorm:
    """``1 / |h|^2`` of the residual stream at the block's input; 0 where that is zero.

    Parameters
    ----------
    layers
        Names of those that have such weights.
    """

    shared = True

    def __init__(self, layers: Collection[str]) -> None:
        self._layers = frozenset(layers)

    def of_batch(self, windows: slice, hidden: Tensor) -> WeightOf:
        """See `TokenWeights`."""
        squares = hidden.float().square().sum(dim=-1).flatten()
        weights = (1 / squares).where(squares > 0, 0.0)[None]
        return lambda layer: weights if layer in self._layers else None


class Fisher:
    """Squared gradients of the next-token loss, summed over a group of rows of a layer's output.

    Parameters
    ----------
    weights
        By layer: float32 ``[groups, windows, length]``, of this process's windows.
    """

    shared = False

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def of_batch(self, windows: slice, hidden: Tensor) -> WeightOf:
        """See `TokenWeights`."""

        def of(layer: str) -> Tensor | None:
            found = self._weights.get(layer)
            return None if found is None else found[:, windows].flatten(1).to(hidden.device)

        return of

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By layer: float32 ``[groups, windows, length]``."""
        return self._weights


def check_token_weights(
    surrogate: Surrogate, placement: Placement, layers: Sequence[PrunableLayer]
) -> None:
    """Raise `InvalidInput` if tokens cannot be weighted for these layers of a model."""
    if surrogate.tokens == "equal":
        return
    if surrogate.tokens == "fisher" and isinstance(placement, FromFolder):
        raise InvalidInput(
            "Fisher weights of tokens take a backward pass, which reads every block twice for each "
            "batch: too slow for a model that is read block by block; give --no-stream."
        )
    for layer in layers:
        if layer.fused is not None or "experts" in layer.name.split("."):
            raise InvalidInput(f"Layer {layer.name} sees the tokens routed to it; {_EVERY_TOKEN}")


def token_weights(
    surrogate: Surrogate,
    placement: Placement,
    walk: Callable[[], BlockWalk],
    layers: Collection[str],
    observer: Observer | None = None,
) -> TokenWeights | None:
    """What the tokens of a walk count for a surrogate; None if all count the same.

    Parameters
    ----------
    surrogate
        Says which weights.
    placement
        The model, still dense.
    walk
        Makes or gives a walk over the calibration windows, not begun yet; asked only by weights
        that need one.
    layers
        Names of those that are pruned.
    observer
        Told about progress.

    Raises
    ------
    InvalidInput
        If a layer does not see every token once, if gradients overflow, or if the gradient cannot
        be taken block by block.
    """
    if surrogate.tokens == "equal":
        return None
    if surrogate.tokens == "inverse_norm":
        return InverseNorm(layers)
    return fisher(placement, walk(), layers, surrogate.row_groups, observer)


def fisher(
    placement: Placement,
    walk: BlockWalk,
    layers: Collection[str],
    row_groups: int = 1,
    observer: Observer | None = None,
) -> Fisher:
    """Fisher weights by one backward pass; `walk` is the walk itself, others as above.

    The loss is that of the windows' own next tokens, in nats and summed, so that a token's weight
    does not depend on what else is in its batch.
    """
    if not walk.quick:
        raise InvalidInput(
            "The blocks hand on more than hidden states, so gradients cannot be taken block by "
            "block; give --tokens equal or inverse_norm."
        )
    observer = observer or Observer()
    found: dict[str, Tensor] = {}

    def run(batch: int) -> None:
        observer.phase(f"token weights, batch {batch + 1} of {len(walk.activations)}")
        backward = _Backward(placement, walk, batch, frozenset(layers), row_groups)
        for layer, weights in backward.run().items():
            if layer not in found:
                groups, _, length = weights.shape
                found[layer] = torch.zeros(groups, walk.windows, length)
            found[layer][:, walk.place(batch)] = weights.cpu()

    walk.for_each_batch(run)
    for layer, weights in found.items():
        if not bool(torch.isfinite(weights).all()):
            raise InvalidInput(
                f"Gradients at layer {layer} are NaN, infinite or overflow; try another dtype, "
                "such as bfloat16 or float32."
            )
    return Fisher(found)


class _Backward:
    """The gradient of one batch's loss, from the last block to the first."""

    def __init__(
        self,
        placement: Placement,
        walk: BlockWalk,
        batch: int,
        layers: frozenset[str],
        row_groups: int,
    ) -> None:
        self._placement, self._walk, self._batch = placement, walk, batch
        self._layers, self._row_groups = layers, row_groups
        self._tokens = walk.tokens(batch)
        self._seen: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        """By layer: weights ``[groups, windows, length]``."""
        inputs = [self._walk.activations[self._batch]]
        for index in range(len(self._walk)):
            with self._placement.block(index) as block, torch.no_grad():
                inputs.append(self._call(index).run(block, inputs[-1]))
        gradient = self._at_head(inputs.pop())
        for index in reversed(range(len(self._walk))):
            gradient = self._through(index, inputs.pop(), gradient)
        return self._seen

    def _call(self, index: int) -> Call:
        return self._walk.call(index, self._batch)

    def _at_head(self, hidden: Tensor) -> Tensor:
        """With respect to the last block's output; a window at a time, for logits are large."""
        model, blocks = self._placement.model, self._placement.blocks
        gradient = torch.empty_like(hidden)
        for at, window in enumerate(self._tokens):
            last = hidden[at : at + 1].detach().requires_grad_()

            def answer(index: int, given: Tensor, last: Tensor = last) -> object:
                out = last.clone() if index == len(blocks) - 1 else given
                return self._walk.as_output(index, out)

            outside = self._placement.block(OUTSIDE)
            with outside, answering(blocks, answer), torch.enable_grad():
                logits = forward(model, window[None])[0, :-1].float()
                loss = cross_entropy(logits, window[1:].to(logits.device), reduction="sum")
            (gradient[at : at + 1],) = torch.autograd.grad(loss, last)
        return gradient

    def _through(self, index: int, inputs: Tensor, gradient: Tensor) -> Tensor:
        """With respect to a block's input, from that to its output; layers are looked at."""
        with self._placement.block(index) as block, ExitStack() as stack:
            for layer in prunable_layers(block, f"{self._placement.blocks_name}.{index}"):
                if layer.name in self._layers:
                    handle = layer.module.register_forward_hook(self._hook(layer.name))
                    stack.callback(handle.remove)
            with torch.enable_grad():
                hidden = inputs.detach().requires_grad_()
                output = self._call(index).run(block, hidden.clone())
            (before,) = torch.autograd.grad(output, hidden, gradient)
        return before

    def _hook(self, layer: str) -> Callable[[Any, Any, Tensor], None]:
        def after(_: Any, __: Any, output: Tensor) -> None:
            tokens = output.numel() // output.shape[-1]
            if tokens != self._tokens.numel() or layer in self._seen:
                raise InvalidInput(f"Layer {layer} is an expert's or used twice; {_EVERY_TOKEN}")
            parts = row_slices(output.shape[-1], self._row_groups)
            # Where the loss does not depend on the layer, this stays.
            shape = (len(parts), *self._tokens.shape)
            self._seen[layer] = torch.zeros(shape, device=output.device)
            if not output.requires_grad:
                output.requires_grad_()
            output.register_hook(note)  # type: ignore[no-untyped-call]

        def note(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().flatten(0, -2)
            parts = row_slices(gradient.shape[-1], self._row_groups)
            weights = torch.stack([squares[:, part].sum(dim=1) for part in parts])
            self._seen[layer] = weights.view(len(parts), *self._tokens.shape)

        return after
