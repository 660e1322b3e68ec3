"""Masks after the run: put on a model, kept through fine-tuning, and taken as a start."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput, MaskProblem, MaskSolution, Status, available

from .checkpoint import MASKS_FILE, ORDER_FILE, load_masks
from .models import PrunableLayer, find_blocks, load_model, prunable_layers
from .record import Masks, mask_digest

if TYPE_CHECKING:
    from torch.optim import Optimizer


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the weights that the masks remove to zero, in place.

    On the dense model (after `apply_order`, if the run permuted inputs), a run's masks give that
    run's pruned model, bit by bit.

    Raises
    ------
    InvalidInput
        If the model lacks one of the layers or has it in another shape; nothing is changed then.
    """
    for layer, mask in _matched(model, masks):
        layer.weight.masked_fill_(~mask.to(layer.weight.device), 0.0)


def zero_pattern(model: nn.Module, blocks: str | None = None) -> dict[str, Tensor]:
    """Masks out of a model's own zeros, whoever pruned it: keep what is not zero.

    Parameters
    ----------
    model
        Any causal language model; its linear layers inside the blocks are read.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    """
    return {layer.name: (layer.weight != 0).cpu() for layer in _layers(model, blocks)}


@contextmanager
def keep_zeros(
    model: nn.Module, optimizer: Optimizer, masks: Masks | None = None
) -> Iterator[None]:
    """Fine-tune with pruned weights staying exactly zero through every optimiser step.

    Gradients of pruned weights are set to zero as soon as they are accumulated, so that norms
    for clipping and the optimiser's moments do not see them; after each ``optimizer.step()`` the
    masks are applied again, since momentum from before or a decay towards other values could
    still move a weight.

    Parameters
    ----------
    model
        Pruned; the masks are applied on entry too.
    optimizer
        Any, over the model's parameters.
    masks
        None takes the model's own zeros, see `zero_pattern`.

    Raises
    ------
    InvalidInput
        If the masks do not fit the model.

    Examples
    --------
    >>> with keep_zeros(model, optimizer, load_masks("pruned")):  # doctest: +SKIP
    ...     for batch in batches:
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    masks = zero_pattern(model) if masks is None else masks
    removed = _removed(model, masks)

    @torch.no_grad()
    def clear(*_: object) -> None:
        for parameter, gone in removed:
            parameter.masked_fill_(gone, 0.0)

    clear()
    handles: list[Any] = [
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            _gradient_hook(gone)
        )
        for parameter, gone in removed
        if parameter.requires_grad
    ]
    handles.append(optimizer.register_step_post_hook(clear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradient_hook(gone: Tensor) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def after_accumulation(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(gone, 0.0)

    return after_accumulation


@dataclass(frozen=True)
class StartMasks:
    """Masks to start a run from.

    Attributes
    ----------
    masks
        Of all layers that are to be pruned.
    source
        Where they are from, for the record.
    """

    masks: Masks
    source: str

    @classmethod
    def read(cls, folder: str | Path) -> StartMasks:
        """Masks of a pruned model's folder: ours by its file of masks, a foreign one by its zeros.

        Raises
        ------
        InvalidInput
            If the folder holds neither, or masks for inputs in another order.
        """
        path = Path(folder).expanduser()
        if (path / ORDER_FILE).is_file():
            raise InvalidInput(
                f"The masks in '{folder}' are for inputs in another order than the dense model's "
                f"({ORDER_FILE}); start from other masks, or prune that model itself with --start "
                "current."
            )
        if (path / MASKS_FILE).is_file():
            return cls(load_masks(path), str(folder))
        if not path.is_dir():
            raise InvalidInput(
                f"'{folder}' is neither a solver nor the folder of a pruned model to start from."
            )
        # Half the memory of float32, and no weight that is not zero becomes zero but for
        # magnitudes below 1e-40.
        foreign = load_model(str(folder), torch.device("cpu"), "bfloat16")
        return cls(zero_pattern(foreign.model), str(folder))

    @property
    def digest(self) -> str:
        """See `mask_digest`."""
        return mask_digest(self.masks)

    def check(self, layer: PrunableLayer) -> None:
        """Raise `InvalidInput` if there is no mask of the layer's shape."""
        _check(layer, self.masks.get(layer.name), self.source)

    def solution(self, name: str, problem: MaskProblem) -> MaskSolution:
        """The mask of layer ``name``, or where it does not follow the pattern, the nearest one.

        Ties go to the larger |w| √G_ii.
        """
        mask = self.masks[name].to(problem.weight.device)
        if not problem.pattern.is_feasible(mask):
            saliency = problem.weight.double().abs() * problem.gram.diagonal().sqrt()
            share = saliency / saliency.amax().clamp(min=torch.finfo(torch.float64).tiny)
            mask = problem.pattern.round(mask + 0.5 * share)
        return MaskSolution(mask, problem.objective(mask), Status.FEASIBLE, self.source)


def parse_start(start: str | None) -> str | StartMasks | None:
    """What `prune` starts from, by name: a solver, or a pruned model's folder.

    Raises
    ------
    InvalidInput
        If it is neither.
    """
    if start is None or start in {"current", *(info.name for info in available())}:
        return start
    if Path(start).expanduser().exists() or start.startswith((".", "/", "~")):
        return StartMasks.read(start)
    return start  # the run refuses unknown solvers and lists those there are


def _layers(model: nn.Module, blocks: str | None) -> list[PrunableLayer]:
    name, block_list = find_blocks(model, blocks)
    return [
        layer
        for index, block in enumerate(block_list)
        for layer in prunable_layers(block, f"{name}.{index}")
    ]


def _matched(model: nn.Module, masks: Masks) -> list[tuple[PrunableLayer, Tensor]]:
    """The model's layers with their masks, all checked."""
    # The masks' names begin with that of the list of blocks, which may not be the one found.
    named = {re.split(r"\.\d+\.", name)[0] for name in masks}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = named.pop() if len(named) == 1 and named <= lists else None
    layers = {layer.name: layer for layer in _layers(model, blocks)}
    for name, mask in masks.items():
        if name not in layers:
            raise InvalidInput(f"The model has no linear layer '{name}' for which there is a mask.")
        _check(layers[name], mask, "the masks")
    return [(layers[name], mask) for name, mask in masks.items()]


def _check(layer: PrunableLayer, mask: Tensor | None, source: str) -> None:
    if mask is None:
        raise InvalidInput(f"There is no mask for layer {layer.name} in {source}.")
    if mask.dtype != torch.bool or mask.shape != layer.weight.shape:
        raise InvalidInput(
            f"The mask of layer {layer.name} in {source} is {mask.dtype} {tuple(mask.shape)}, "
            f"not bool {tuple(layer.weight.shape)}; take masks of the same model."
        )


def _removed(model: nn.Module, masks: Masks) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters with what is removed of them, bool in the parameter's own layout.

    A layer's weight is a view of a parameter: the parameter itself, its transpose, or a slice.
    The same view of a tensor shaped like the parameter carries the mask over.
    """
    parameters = list(model.parameters())
    removed: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer, mask in _matched(model, masks):
        view = layer.weight
        parameter = next(p for p in parameters if _holds(p, view))
        gone = removed.setdefault(
            id(parameter), (parameter, torch.zeros(parameter.shape, dtype=torch.bool))
        )[1]
        offset = view.storage_offset() - parameter.storage_offset()
        gone.as_strided(view.size(), view.stride(), offset).copy_(~mask)
    return [(parameter, gone.to(parameter.device)) for parameter, gone in removed.values()]


def _holds(parameter: Tensor, view: Tensor) -> bool:
    """Whether ``view`` looks at the memory of a parameter (contiguous)."""
    if parameter.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
        return False
    begin = parameter.storage_offset()
    return begin <= view.storage_offset() < begin + parameter.numel()
