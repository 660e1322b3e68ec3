"""The smaller model, put together block by block and checked against the large one.

The check is what makes removal safe: with the removed groups' inputs set to zero in the layer that
reads them, the large block has to give what the small one gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .coupling import WORDS, Coupling, Kind, Layout, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kept = dict[Kind, Tensor]
"""By kind: bool ``[K]``, True = keep."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Difference allowed, as a share of what removing the groups does to the block's output."""


class Smaller:
    """The smaller model while it is being put together.

    Parameters
    ----------
    structure
        The model without weights, and what to cut for it.
    blocks_name
        Name of the module list of blocks.
    device
        Where finished blocks lie.
    """

    def __init__(self, structure: Structure, blocks_name: str, device: torch.device) -> None:
        self._model, self._device = structure.model, device
        self._blocks: Any = structure.model.get_submodule(blocks_name)
        self._blocks_name = blocks_name

    def understood(
        self,
        index: int,
        block: nn.Module,
        couplings: Sequence[Coupling],
        counts: dict[Kind, int],
        run: Callable[[nn.Module], Tensor],
        seed: int = 0,
    ) -> list[Coupling]:
        """The couplings with the layouts by which a random removal is done right.

        Parameters
        ----------
        index, block
            The large block, whole.
        couplings
            Of the block.
        counts
            Groups to keep.
        run
            Output of a block on some text.
        seed
            Of the groups removed.

        Raises
        ------
        InvalidInput
            If no layout does it right; the sentence names the model's family.
        """
        generator = torch.Generator().manual_seed(seed)
        kept: Kept = {}
        for one in couplings:
            order = torch.rand(one.count, generator=generator).argsort()
            kept[one.kind] = order < counts[one.kind]
        dense = run(block)
        with silenced(couplings, kept):
            wanted = run(block)
        layouts: list[tuple[Layout, ...]] = [get_args(Layout)] * len(couplings)
        differences = []
        for choice in itertools.product(*layouts):
            tried = [
                replace(one, layout=layout) for one, layout in zip(couplings, choice, strict=True)
            ]
            try:
                got = run(self._cut(index, block, tried, kept))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # shapes that do not go together
                difference = float("inf")
            else:
                difference = _difference(got, wanted, dense)
            if difference <= _TOLERANCE.get(wanted.dtype, 0.05):
                return tried
            differences.append(difference)
        kinds = " and ".join(WORDS[one.kind] for one in couplings)
        raise InvalidInput(
            f"Removing {kinds} from block {index} of a model of type "
            f"{self._model.config.model_type} does not give what silencing them gives (off by "
            f"{min(differences):.2g} of the effect); its structure is not understood, and nothing "
            "was written."
        )

    def put(
        self,
        index: int,
        block: nn.Module,
        couplings: Sequence[Coupling],
        kept: Kept,
        run: Callable[[nn.Module], Tensor],
    ) -> float:
        """Make block ``index`` out of the large one, whose readers have zeros for removed inputs.

        Returns
        -------
        float
            Largest difference of their outputs, as a share of the largest output.

        Raises
        ------
        InvalidInput
            If the outputs differ by more than rounding.
        """
        wanted = run(block)
        made = self._cut(index, block, couplings, kept)
        got = run(made)
        difference = float((got - wanted).abs().max() / wanted.abs().max())
        if not difference <= min(256 * torch.finfo(wanted.dtype).eps, 0.05):
            raise InvalidInput(
                f"Block {index} made smaller differs from the block with zeros by "
                f"{difference:.2g} of its largest output; nothing was written."
            )
        made.to(self._device)
        return difference

    def _cut(
        self, index: int, block: nn.Module, couplings: Sequence[Coupling], kept: Kept
    ) -> nn.Module:
        made: nn.Module = self._blocks[index]
        return cut_block(made, block, couplings, kept)

    def finish(self, model: PreTrainedModel) -> PreTrainedModel:
        """The whole smaller model; what lies outside the blocks is shared with the large one."""
        small = self._model
        outside = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(f"{self._blocks_name}.")
        }
        small.load_state_dict(outside, strict=False, assign=True)
        small.tie_weights()
        empty = [name for name, one in small.named_parameters() if one.is_meta]
        assert not empty, f"every parameter has a value, but {empty[:3]} have none"
        for buffer in small.buffers():
            buffer.data = buffer.data.to(self._device)
        for parameter in small.parameters():
            parameter.requires_grad_(False)
        small.generation_config = model.generation_config
        return small.eval()


def cut_block(
    made: nn.Module, block: nn.Module, couplings: Sequence[Coupling], kept: Kept
) -> nn.Module:
    """Fill a smaller block, whose parameters have no values yet, with what is left of a large one.

    Parameters that carry no groups are shared.
    """
    state = dict(block.state_dict())
    for one in couplings:
        for name in one.parts:
            state[name] = one.cut(name, state[name], kept[one.kind])
    like = next(iter(state.values()))
    for name, parameter in made.named_parameters():
        if name not in state:  # a bias that the configuration brings along
            state[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
    made.load_state_dict(state, assign=True)
    return made.to(like.device)


@contextmanager
def silenced(couplings: Sequence[Coupling], kept: Kept) -> Iterator[None]:
    """While this lasts, readers see zeros in place of removed groups."""
    with ExitStack() as stack:
        for one in couplings:
            gone = ~kept[one.kind].cpu()[one.of_inputs()]

            def hook(_: nn.Module, args: tuple[Any, ...], gone: Tensor = gone) -> tuple[Any, ...]:
                return (args[0].masked_fill(gone.to(args[0].device), 0.0), *args[1:])

            stack.callback(one.reader.module.register_forward_pre_hook(hook).remove)
        yield


def _difference(got: Tensor, wanted: Tensor, dense: Tensor) -> float:
    """Size of the difference as a share of what was done to the dense output; 0 within rounding."""
    difference = float((got - wanted).double().norm())
    rounding = torch.finfo(wanted.dtype).eps * float(wanted.double().norm())
    effect = float((wanted - dense).double().norm())
    return 0.0 if difference <= rounding else difference / effect if effect else float("inf")
