"""Channel permutation in the run: MLP neurons in an order that suits an N:M pattern.

The groups of a pattern N:M are consecutive inputs of a layer. A model computes the same with its
MLP neurons in any order, if whatever writes them (rows, biases) and the layer that reads them
(columns) have them in the same; so they take the one in which the layer that reads them loses
least by the mask (`solvers.order_inputs`, after RIA). Which parameters these are is found as for
the removal of neurons (`mipprune.structured.coupling`), and every block has to give what it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from solvers import NM, InputOrder, InvalidInput, order_inputs

from .calibration import Windows, window_length
from .journal import Finished, Journal
from .models import PrunableLayer
from .observer import Observer
from .placement import Placement
from .ranks import ALONE, Ranks
from .rules import Rules
from .settings import Settings
from .structured.coupling import Coupling, Layout, find_structure, group_count
from .structured.smaller import silenced
from .walk import HOST_BYTES, BlockStep, BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Orders = dict[str, InputOrder]
"""By the layer that reads the inputs."""

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Change of a block's output allowed, as a share of what its neurons do to it."""


def permutable(placement: Placement, rules: Rules) -> dict[int, Coupling]:
    """By block, its neurons, where rules give the layer that reads them a pattern N:M.

    Raises
    ------
    InvalidInput
        If it is not understood what carries the model's neurons, or none are read in groups.
    """
    found = _neurons(placement, lambda reader: isinstance(rules.pattern_for(reader), NM))
    if not found:
        raise InvalidInput(
            "None of the layers that read MLP neurons has a keep:group pattern; leave --permute "
            "out."
        )
    return found


def orders_of_run(
    settings: Settings,
    placement: Placement,
    windows: Windows,
    finished: Finished,
    journal: Journal,
    *,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Orders:
    """Reorder a run's model in place: as its journal says, or else as one dense pass finds.

    What is found is written to the journal.
    """
    if finished.orders is not None:
        apply_orders(placement, finished.orders, windows.tokens[: settings.windows_at_once])
        return finished.orders
    orders = find_orders(
        placement,
        settings.rules,
        windows.tokens,
        settings.windows_at_once,
        host_bytes=host_bytes,
        ranks=ranks,
        observer=observer,
    )
    journal.reorder(orders)
    return orders


def find_orders(
    placement: Placement,
    rules: Rules,
    tokens: Tensor,
    batch_size: int,
    *,
    host_bytes: float = HOST_BYTES,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Orders:
    """Find the orders by one pass over the dense model, and reorder it in place.

    All processes end with the same.

    Parameters
    ----------
    placement
        The model, in evaluation mode.
    rules
        See `permutable`.
    tokens
        int64 ``[windows, length]``, to calibrate on.
    batch_size, host_bytes, ranks, observer
        As of a run.

    Raises
    ------
    InvalidInput
        As `permutable` does, or if a block gives anything else when its neurons are reordered; the
        model is then as it was.
    """
    observer = observer or Observer()
    couplings = permutable(placement, rules)

    def found(step: BlockStep, reader: PrunableLayer) -> InputOrder:
        observer.phase(f"order of inputs: {reader.name.removeprefix(f'{placement.blocks_name}.')}")
        gram = step.grams.gram(reader)
        pattern = rules.pattern_for(reader.name)
        assert isinstance(pattern, NM), "others are not reordered"
        mine = None
        if ranks.first:
            mine = order_inputs(_saliency(reader, gram.matrix.diagonal()), pattern)
        order = ranks.gather_objects(mine)[0]
        assert order is not None, "the first process has found it"
        return order

    observer.phase("order of inputs: capture")
    walk = BlockWalk(
        placement,
        tokens,
        batch_size,
        propagate=False,
        host_bytes=host_bytes,
        ranks=ranks,
        warn=observer.warning,
        watched={one.reader.name for one in couplings.values()},
    )
    return _reorder(placement, walk, couplings, found)


def apply_orders(placement: Placement, orders: Mapping[str, InputOrder], tokens: Tensor) -> None:
    """Reorder a model in place as an earlier run did, with a few tokens to check it on.

    Raises
    ------
    InvalidInput
        If the orders are those of another model, or as `find_orders` does.
    """
    couplings = _neurons(placement, lambda reader: reader in orders)
    sizes = {one.reader.name: one.count for one in couplings.values()}
    if sizes != {name: len(one.order) for name, one in orders.items()}:
        raise InvalidInput(
            "The order of inputs is for other layers than this model has; give the model that was "
            "reordered."
        )
    walk = BlockWalk(placement, tokens, len(tokens), propagate=False)
    _reorder(placement, walk, couplings, lambda _, reader: orders[reader.name])


def apply_order(
    model: PreTrainedModel, order: Mapping[str, Tensor], blocks: str | None = None
) -> None:
    """Reorder a model's inputs in place, as a run with ``permute`` did; it computes the same.

    Parameters
    ----------
    model
        The dense model that was pruned.
    order
        From `load_order`.
    blocks
        Name of the module list of blocks, where it is not found by itself.

    Raises
    ------
    InvalidInput
        If the order is that of another model.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(
        int(vocabulary), (1, window_length(model.config, 32)), generator=generator
    )
    apply_orders(Placement(model, blocks), as_orders(order), tokens)


def as_orders(order: Mapping[str, Tensor]) -> Orders:
    """Stored orders, without what masks lose by them."""
    unknown = float("nan")
    return {name: InputOrder(one, unknown, unknown) for name, one in order.items()}


def _saliency(reader: PrunableLayer, norms: Tensor) -> Tensor:
    """``w_ij^2 G_jj``, float64 on the CPU."""
    return reader.weight.cpu().double().square_() * norms.cpu()


def _neurons(placement: Placement, wanted: Callable[[str], bool]) -> dict[int, Coupling]:
    """By block, its neurons and what carries them, if the layer that reads them is wanted."""
    model: Any = placement.model
    try:
        count = group_count(model.config, "neurons")
        structure = find_structure(model, placement.blocks_name, {"neurons": count // 2})
    except InvalidInput as error:
        raise InvalidInput(
            "To permute MLP neurons, it has to be known what carries them, as for their removal: "
            f"{error}"
        ) from error
    return {
        index: coupling
        for index, block in enumerate(structure.couplings)
        for coupling in block
        if wanted(coupling.reader.name)
    }


def _reorder(
    placement: Placement,
    walk: BlockWalk,
    couplings: Mapping[int, Coupling],
    order_of: Callable[[BlockStep, PrunableLayer], InputOrder],
) -> Orders:
    """Check every order while its block is on the device; make the changes when all are right."""
    orders: Orders = {}
    right: list[Coupling] = []
    for step in walk:
        if step.index in couplings:
            reader = couplings[step.index].reader
            orders[reader.name] = order_of(step, reader)
            order = orders[reader.name].order
            right.append(_understood(step, placement, couplings[step.index], order))
    for coupling in right:
        for part, dim in coupling.parts.items():
            name = f"{coupling.block_name}.{part}"
            size = placement.model.get_parameter(name).shape[dim]
            index = coupling.moved(size, orders[coupling.reader.name].order)
            placement.reorder(name, dim, index)
    return orders


def _understood(
    step: BlockStep, placement: Placement, coupling: Coupling, order: Tensor
) -> Coupling:
    """The coupling with the layout by which the block gives what it gave, in this order."""
    block = placement.blocks[step.index]
    dense = step.output(block)
    none = torch.zeros(coupling.count, dtype=torch.bool)
    with silenced([coupling], {coupling.kind: none}):
        effect = float((step.output(block) - dense).double().norm())
    allowed = max(
        _TOLERANCE.get(dense.dtype, 0.05) * effect,
        torch.finfo(dense.dtype).eps * float(dense.double().norm()),
    )
    differences = []
    for layout in get_args(Layout):
        tried = replace(coupling, layout=layout)
        with _reordered(block, tried, order):
            differences.append(float((step.output(block) - dense).double().norm()))
        if differences[-1] <= allowed:
            return tried
    model: Any = placement.model
    share = min(differences) / effect if effect else 0.0
    raise InvalidInput(
        f"Block {step.index} of a model of type {model.config.model_type} gives something else "
        f"when its MLP neurons are reordered (by {share:.2g} of what they do); its structure is "
        "not understood, and nothing was changed. Leave --permute out."
    )


@contextmanager
def _reordered(block: nn.Module, coupling: Coupling, order: Tensor) -> Iterator[None]:
    """While this lasts, the block's neurons are in another order."""
    before = {name: block.get_parameter(name).data for name in coupling.parts}
    try:
        for name, dim in coupling.parts.items():
            index = coupling.moved(before[name].shape[dim], order).to(before[name].device)
            block.get_parameter(name).data = before[name].index_select(dim, index)
        yield
    finally:
        for name, data in before.items():
            block.get_parameter(name).data = data
