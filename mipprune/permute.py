"""Channel permutation in the run: inputs in an order that suits an N:M pattern.

The groups of a pattern N:M are consecutive inputs of a layer. A model computes the same with its
MLP neurons in any order, if whatever writes them (rows, biases) and the layer that reads them
(columns) have them in the same; so they take the one in which the layer that reads them loses
least by the mask (`solvers.order_inputs`, after RIA). Likewise the values within a head, and the
residual stream, for all layers that read it at once. What has to be moved is found by
`mipprune.symmetry`, and every block, or the whole model, has to give what it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from solvers import NM, InputOrder, InvalidInput, order_inputs

from .calibration import Windows, window_length
from .capture import forward
from .journal import Finished, Journal
from .models import PrunableLayer
from .observer import Observer
from .placement import Placement
from .ranks import ALONE, Ranks
from .rules import Rules
from .settings import Settings
from .structured.smaller import silenced
from .symmetry import Moves, Neurons, Residual, Values, neurons, residual, values
from .walk import HOST_BYTES, BlockStep, BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Orders = dict[str, InputOrder]
"""By the layer that reads the inputs, or `RESIDUAL`."""

RESIDUAL = "residual stream"

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Change of a block's output allowed, as a share of what the reordered inputs do to it, and of the
logits."""

_ROWS = 1 << 15
"""Rows of all layers that the order of the residual stream is chosen by, a random sample."""


@dataclass(frozen=True)
class Symmetries:
    """What a run reorders.

    Attributes
    ----------
    inside
        By block, what is reordered in it.
    residual
        The residual stream, if it is.
    """

    inside: dict[int, list[Neurons | Values]]
    residual: Residual | None = None

    @property
    def readers(self) -> set[str]:
        """All layers that read something reordered."""
        found = {one.coupling.reader.name for some in self.inside.values() for one in some}
        if self.residual is not None:
            found.update(reader.name for reader in self.residual.readers)
        return found


def permutable(placement: Placement, rules: Rules, permute: Sequence[str]) -> Symmetries:
    """What may be reordered of what layers with a pattern N:M read.

    Raises
    ------
    InvalidInput
        If it is not understood what carries it, or nothing is read in groups.
    """

    def grouped(layer: PrunableLayer) -> bool:
        return isinstance(rules.pattern_for(layer.name), NM)

    found: list[Neurons | Values] = []
    if "neurons" in permute:
        found += neurons(placement)
    if "values" in permute:
        found += values(placement)
    whole = None
    if "residual" in permute:
        whole = residual(placement)
        readers = tuple(filter(grouped, whole.readers))
        patterns = sorted({str(rules.pattern_for(reader.name)) for reader in readers})
        if len(patterns) > 1:
            raise InvalidInput(
                "The layers that read the residual stream have it in one order, but patterns "
                f"{' and '.join(patterns)}; leave residual out of --permute."
            )
        whole = Residual(whole.count, whole.parts, readers) if readers else None
    inside = _by_block(placement, [one for one in found if grouped(one.coupling.reader)])
    if not inside and whole is None:
        raise InvalidInput(
            "None of the layers that read what --permute reorders has a keep:group pattern; leave "
            "it out."
        )
    return Symmetries(inside, whole)


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
        settings.permuted,
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
    permute: Sequence[str],
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
    rules, permute
        See `permutable`.
    tokens
        int64 ``[windows, length]``, to calibrate on.
    batch_size, host_bytes, ranks, observer
        As of a run.

    Raises
    ------
    InvalidInput
        As `permutable` does, or if a block or the model gives anything else when it is reordered;
        the model is then as it was.
    """
    observer = observer or Observer()
    symmetries = permutable(placement, rules, permute)
    observer.phase("order of inputs: capture")
    walk = BlockWalk(
        placement,
        tokens,
        batch_size,
        propagate=False,
        host_bytes=host_bytes,
        ranks=ranks,
        warn=observer.warning,
        watched=symmetries.readers,
    )
    return _reorder(
        placement, symmetries, walk, tokens, _Search(rules, symmetries, ranks, observer)
    )


def apply_orders(placement: Placement, orders: Mapping[str, InputOrder], tokens: Tensor) -> None:
    """Reorder a model in place as an earlier run did, with a few tokens to check it on.

    Raises
    ------
    InvalidInput
        If the orders are those of another model, or as `find_orders` does.
    """
    found: list[Neurons | Values] = []
    for kind in (neurons, values):
        if len(found) < len(orders.keys() - {RESIDUAL}):
            with suppress(InvalidInput):  # then these orders are not of that kind
                found += [one for one in kind(placement) if one.coupling.reader.name in orders]
    whole = residual(placement) if RESIDUAL in orders else None
    fit = {one.coupling.reader.name for one in found if one.fits(_order(orders, one))}
    if whole is not None and len(orders[RESIDUAL].order) == whole.count:
        fit.add(RESIDUAL)
    if fit != orders.keys():
        raise InvalidInput(
            "The order of inputs is for other layers than this model has; give the model that was "
            "reordered."
        )
    walk = BlockWalk(placement, tokens, len(tokens), propagate=False)
    symmetries = Symmetries(_by_block(placement, found), whole)
    _reorder(placement, symmetries, walk, tokens, _Known(orders))


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


class _Source(Protocol):
    """Where orders are from."""

    def look(self, step: BlockStep) -> None:
        """Take from a block what the order of the residual stream follows from."""

    def inside(self, step: BlockStep, one: Neurons | Values) -> InputOrder:
        """The order of something inside the block."""

    def residual(self) -> InputOrder:
        """That of the residual stream, when all blocks were looked at."""


@dataclass(frozen=True)
class _Known:
    """An earlier run's."""

    orders: Mapping[str, InputOrder]

    def look(self, step: BlockStep) -> None:
        """Nothing is needed."""

    def inside(self, step: BlockStep, one: Neurons | Values) -> InputOrder:
        return self.orders[one.coupling.reader.name]

    def residual(self) -> InputOrder:
        return self.orders[RESIDUAL]


class _Search:
    """Found by the saliencies ``w_ij^2 G_jj``; by the first process, for all."""

    def __init__(
        self, rules: Rules, symmetries: Symmetries, ranks: Ranks, observer: Observer
    ) -> None:
        self._rules, self._ranks, self._observer = rules, ranks, observer
        self._readers = () if symmetries.residual is None else symmetries.residual.readers
        self._seen: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def look(self, step: BlockStep) -> None:
        """Some rows of each layer, as shares of all that it has: no layer counts for more."""
        here = {layer.name for layer in step.layers}
        for reader in self._readers:
            if reader.name in here:
                diagonal = step.grams.gram(reader).matrix.diagonal()
                if self._ranks.first:
                    rows = torch.randperm(len(reader.weight), generator=self._generator)
                    chosen = rows[: max(1, _ROWS // len(self._readers))]
                    saliency = _saliency(reader.weight[chosen.to(reader.weight.device)], diagonal)
                    total = float(saliency.sum())
                    self._seen.append(saliency / total if total else saliency)

    def inside(self, step: BlockStep, one: Neurons | Values) -> InputOrder:
        reader = one.coupling.reader
        self._observer.phase(f"order of inputs: block {step.index}, {one.what}")
        gram = step.grams.gram(reader)
        mine = None
        if self._ranks.first:
            mine = one.order(
                _saliency(reader.weight, gram.matrix.diagonal()), self._pattern(reader)
            )
        return self._from_first(mine)

    def residual(self) -> InputOrder:
        self._observer.phase(f"order of inputs: {Residual.what}")
        mine = None
        if self._ranks.first:
            mine = order_inputs(torch.cat(self._seen), self._pattern(self._readers[0]))
        return self._from_first(mine)

    def _pattern(self, reader: PrunableLayer) -> NM:
        pattern = self._rules.pattern_for(reader.name)
        assert isinstance(pattern, NM), "others are not reordered"
        return pattern

    def _from_first(self, mine: InputOrder | None) -> InputOrder:
        order = self._ranks.gather_objects(mine)[0]
        assert order is not None, "the first process has found it"
        return order


def _reorder(
    placement: Placement, symmetries: Symmetries, walk: BlockWalk, tokens: Tensor, source: _Source
) -> Orders:
    """Check what is inside a block while it is on the device; move all when all are right."""
    orders: Orders = {}
    right: list[Moves] = []
    for step in walk:
        source.look(step)
        for one in symmetries.inside.get(step.index, []):
            order = source.inside(step, one)
            orders[one.coupling.reader.name] = order
            right.append(_understood(step, placement, one, order.order))
    if symmetries.residual is not None:
        order = orders[RESIDUAL] = source.residual()
        _move_checked(placement, symmetries.residual.moves(order.order), tokens[:1])
    for moves in right:
        _move(placement, moves)
    return orders


def _understood(
    step: BlockStep, placement: Placement, one: Neurons | Values, order: Tensor
) -> Moves:
    """What to move, so that the block gives what it gave."""
    block, coupling = placement.blocks[step.index], one.coupling
    dense = step.output(block)
    none = torch.zeros(coupling.count, dtype=torch.bool)
    with silenced([coupling], {coupling.kind: none}):
        effect = float((step.output(block) - dense).double().norm())
    allowed = max(
        _TOLERANCE.get(dense.dtype, 0.05) * effect,
        torch.finfo(dense.dtype).eps * float(dense.double().norm()),
    )
    differences = []
    for moves in one.moves(order, block):
        with _moved(block, f"{coupling.block_name}.", moves):
            differences.append(float((step.output(block) - dense).double().norm()))
        if differences[-1] <= allowed:
            return moves
    share = min(differences, default=effect) / effect if effect else 0.0
    raise InvalidInput(
        f"Block {step.index} of a model of type {_family(placement)} gives something else when its "
        f"{one.what} are reordered (by {share:.2g} of what they do); its structure is not "
        f"understood, and nothing was changed. Leave {one.kind} out of --permute."
    )


@contextmanager
def _moved(block: nn.Module, prefix: str, moves: Moves) -> Iterator[None]:
    """While this lasts, the block's parameters are moved."""
    named = {name.removeprefix(prefix): move for name, move in moves.items()}
    before = {name: block.get_parameter(name).data for name in named}
    try:
        for name, (dim, index) in named.items():
            data = before[name]
            block.get_parameter(name).data = data.index_select(dim, index.to(data.device))
        yield
    finally:
        for name, data in before.items():
            block.get_parameter(name).data = data


def _move_checked(placement: Placement, moves: Moves, tokens: Tensor) -> None:
    """Move parameters; the model has to give what it gave, or they are moved back."""
    before = _logits(placement, tokens)
    _move(placement, moves)
    difference = float((_logits(placement, tokens) - before).double().norm())
    share = difference / float(before.double().norm())
    if not share <= _TOLERANCE.get(before.dtype, 0.05):
        _move(placement, {name: (dim, index.argsort()) for name, (dim, index) in moves.items()})
        raise InvalidInput(
            f"A model of type {_family(placement)} gives something else when {Residual.what} is "
            f"reordered (off by {share:.2g} of the logits); its structure is not understood, and "
            "nothing was changed. Leave residual out of --permute."
        )


@torch.no_grad()
def _logits(placement: Placement, tokens: Tensor) -> Tensor:
    with placement.forward():
        return forward(placement.model, tokens)


def _move(placement: Placement, moves: Moves) -> None:
    for name, (dim, index) in moves.items():
        placement.reorder(name, dim, index)


def _by_block(
    placement: Placement, found: list[Neurons | Values]
) -> dict[int, list[Neurons | Values]]:
    inside: dict[int, list[Neurons | Values]] = {}
    for one in found:
        index = one.coupling.block_name.removeprefix(f"{placement.blocks_name}.")
        inside.setdefault(int(index), []).append(one)
    return inside


def _order(orders: Mapping[str, InputOrder], one: Neurons | Values) -> Tensor:
    return orders[one.coupling.reader.name].order


def _saliency(weight: Tensor, norms: Tensor) -> Tensor:
    """``w_ij^2 G_jj``, float64 on the CPU."""
    return weight.cpu().double().square_() * norms.cpu()


def _family(placement: Placement) -> str:
    model: Any = placement.model
    return str(model.config.model_type)
