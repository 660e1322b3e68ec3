"""What a run did: every layer's result, the masks, and what is needed to repeat it.

Times are kept apart from everything else, so that a run that was interrupted and resumed leaves
the same record as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, ClassVar, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from solvers import InputOrder

from .models import Coverage

REFERENCE = "wanda"
"""Every layer's loss is also given relative to this solver's mask on the same problem."""

Masks: TypeAlias = Mapping[str, Tensor]
"""By layer: bool ``[outputs, inputs]``, True = keep."""

_TIMES = ("seconds", "time")


@dataclass(frozen=True)
class LayerResult:
    """What was done to one layer. Losses are squared output changes per token, float64.

    Attributes
    ----------
    name, rows, inputs
        The layer and its shape.
    tokens
        Calibration tokens it saw.
    dead_inputs
        Inputs that were always zero.
    sparsity
        Share of its weights removed.
    loss_start
        Of the mask that the solver started from; None for a solver without a start.
    loss
        Of the mask that was written, with the weights as they were; against the layer's own
        output on the inputs that it saw, as all losses but ``surrogate_loss``.
    updated_loss
        With the weights and the bias as they were written. With dense targets the layer aims at
        another output than its own, so that this does not fall as far as it could.
    loss_reference
        Of `REFERENCE`'s mask on the same problem.
    surrogate_loss
        Of the mask, by what masks were judged by; ``loss`` if that is the plain loss. With dense
        targets that is the loss of the weight `mipprune.surrogate.retargeted` or, where weights
        stay, has a linear term and may be negative.
    relative_error
        ``updated_loss`` as a share of the mean square of the dense output.
    status
        Why the solver stopped.
    seconds
        Of solving.
    stats
        The solver's own counts.
    note
        Anything out of the ordinary; empty otherwise.
    held_out_loss, held_out_updated_loss
        As ``loss`` and ``updated_loss``, on windows that were held out; None without such.
    choice
        Where an option was left open: its name, the value chosen, and the held-out loss (with the
        weights as they were written) of every value, in order; None otherwise.
    """

    name: str
    rows: int
    inputs: int
    tokens: int
    dead_inputs: int
    sparsity: float
    loss_start: float | None
    loss: float
    updated_loss: float
    loss_reference: float
    surrogate_loss: float
    relative_error: float
    status: str
    seconds: float
    stats: dict[str, Any]
    note: str = ""
    held_out_loss: float | None = None
    held_out_updated_loss: float | None = None
    choice: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without times."""
        fields = {key: value for key, value in asdict(self).items() if key not in _TIMES}
        fields["stats"] = {k: v for k, v in self.stats.items() if k not in _TIMES}
        return fields


class PackedMasks(MutableMapping[str, Tensor]):
    """Masks by layer, bool ``[outputs, inputs]``, True = keep; held as one bit per weight.

    What is read is a copy.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._packed: dict[str, npt.NDArray[np.uint8]] = {}
        self._widths: dict[str, int] = {}
        self.update(masks or {})

    def __getitem__(self, name: str) -> Tensor:
        return unpack(self._packed[name], self._widths[name])

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._packed[name] = pack(mask)
        self._widths[name] = mask.shape[1]

    def __delitem__(self, name: str) -> None:
        del self._packed[name], self._widths[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def pack(mask: Tensor) -> npt.NDArray[np.uint8]:
    """One bit per weight, uint8 ``[outputs, ceil(inputs / 8)]``."""
    return np.packbits(mask.cpu().numpy(), axis=1)


def unpack(packed: npt.NDArray[np.uint8], width: int) -> Tensor:
    """What `pack` packed, bool ``[outputs, width]``."""
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=width)).bool()


def order_digest(orders: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and orders (as int32), in the order of the names."""
    digest = sha256()
    for name in sorted(orders):
        digest.update(f"{name} {len(orders[name])}".encode())
        digest.update(orders[name].numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def mask_digest(masks: Masks) -> str:
    """SHA-256 over the names, shapes and packed masks, in the order of the names."""
    digest = sha256()
    for name in sorted(masks):
        mask = masks[name]
        digest.update(f"{name} {tuple(mask.shape)}".encode())
        digest.update(pack(mask).tobytes())
    return digest.hexdigest()


class Record(Protocol):
    """What a run tells of itself, as `mipprune.save` writes it.

    Attributes
    ----------
    masks_file
        Name of the file that the masks are packed in.
    """

    masks_file: ClassVar[str]

    @property
    def masks(self) -> Masks:
        """What is kept, by layer."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without masks and times."""

    def timings(self) -> dict[str, Any]:
        """JSON-ready times."""


@dataclass(frozen=True)
class PrunedLayer:
    """A finished layer.

    Attributes
    ----------
    result
        What was done to it.
    mask
        Bool ``[outputs, inputs]``.
    weight
        Its new weight; None if the kept weights stay as they are.
    bias
        Its new bias; None if it has none, or it stays as it is.
    """

    result: LayerResult
    mask: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class PruneReport:
    """Everything needed to repeat a run and to judge it."""

    masks_file: ClassVar[str] = "masks.safetensors"

    settings: dict[str, Any]
    calibration: dict[str, Any]
    environment: dict[str, Any]
    coverage: Coverage
    replay_error: float
    orders: dict[str, InputOrder] = field(default_factory=dict)
    layers: list[LayerResult] = field(default_factory=list)
    masks: MutableMapping[str, Tensor] = field(default_factory=PackedMasks)
    warnings: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Summed layer loss."""
        return sum(layer.loss for layer in self.layers)

    @property
    def updated_loss(self) -> float:
        """Summed layer loss with the weights as they were written."""
        return sum(layer.updated_loss for layer in self.layers)

    @property
    def loss_start(self) -> float | None:
        """Summed layer loss of the starts; None if the solver had none."""
        starts = [layer.loss_start for layer in self.layers if layer.loss_start is not None]
        return sum(starts) if len(starts) == len(self.layers) else None

    @property
    def loss_reference(self) -> float:
        """Summed layer loss of `REFERENCE` on the same problems."""
        return sum(layer.loss_reference for layer in self.layers)

    @property
    def held_out_loss(self) -> float | None:
        """Summed ``held_out_updated_loss``; None if a layer has none."""
        losses = [layer.held_out_updated_loss for layer in self.layers]
        known = [loss for loss in losses if loss is not None]
        return sum(known) if len(known) == len(losses) else None

    @property
    def sparsity(self) -> float:
        """Share removed of all prunable weights."""
        removed = sum(layer.sparsity * layer.rows * layer.inputs for layer in self.layers)
        return removed / self.coverage.prunable

    @property
    def mask_hash(self) -> str:
        """SHA-256 over the names, shapes and packed masks of all layers."""
        return mask_digest(self.masks)

    def add(self, pruned: PrunedLayer) -> None:
        """Take in a finished layer."""
        result = pruned.result
        self.layers.append(result)
        self.masks[result.name] = pruned.mask
        if result.note:
            self.warnings.append(f"{result.name} {result.note}.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, without the masks themselves and without times."""
        return {
            "format": 1,
            "settings": self.settings,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "environment": {k: v for k, v in self.environment.items() if k not in _TIMES},
            "coverage": {**asdict(self.coverage), "share": self.coverage.share},
            "replay_error": self.replay_error,
            "sparsity": self.sparsity,
            "loss_start": self.loss_start,
            "loss": self.loss,
            "updated_loss": self.updated_loss,
            "held_out_loss": self.held_out_loss,
            "loss_reference": self.loss_reference,
            "reference": REFERENCE,
            "mask_hash": self.mask_hash,
            "order": self._about_orders(),
            "warnings": self.warnings,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def _about_orders(self) -> dict[str, Any] | None:
        """What reordering inputs did: the saliency that masks lose, with and without."""
        if not self.orders:
            return None
        return {
            "sha256": order_digest({name: one.order for name, one in self.orders.items()}),
            "lost": {name: one.lost for name, one in self.orders.items()},
            "lost_as_given": {name: one.lost_as_given for name, one in self.orders.items()},
        }

    def timings(self) -> dict[str, Any]:
        """JSON-ready times: when the run was, its seconds, and those of each layer's solver."""
        return {
            "time": self.environment.get("time"),
            "seconds": self.seconds,
            "layers": {layer.name: layer.seconds for layer in self.layers},
        }
