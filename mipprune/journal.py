"""An append-only record of finished layers, so that a killed run goes on where it was.

The file is a sequence of records ``magic, length, SHA-256, payload``, each on disk before the run
goes on. The first holds what decides the masks (settings, calibration tokens, versions); there
may be one with the order of inputs, one with the sparsity allocated to layers, and one with the
value chosen for all; every other one holds a finished layer: its result, its mask, and the hash of
the dense weight it is for. A record that a crash cut short fails its checksum; it and what
follows it are dropped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from solvers import InputOrder, InvalidInput

from .choice import Chosen
from .models import PrunableLayer
from .record import LayerResult, PrunedLayer, PruneReport, pack, unpack
from .rules import Rules

_MAGIC = b"mipj"
_RULES = b"rules of layers: "
_CHOSEN = b"value for all layers: "
_ORDERS = b"order of inputs: "
"""These begin no layer's record, which begins with a length: it would be above 10^18."""
_HEAD = struct.Struct(">4sQ32s")
_DECISIVE = ("mipprune", "torch", "numpy", "numba", "transformers", "device", "dtype", "threads")
"""What of the environment may change masks in their last bits."""


class Finished:
    """Layers that an earlier part of the run finished.

    Attributes
    ----------
    rules
        How it had allocated sparsity to layers; None if it had not.
    chosen
        What it had chosen for all layers; None if it had not.
    orders
        In what order it had put inputs; None if it had not.
    """

    def __init__(
        self,
        records: dict[str, dict[str, Any]] | None = None,
        rules: Rules | None = None,
        chosen: Chosen | None = None,
        orders: dict[str, InputOrder] | None = None,
    ) -> None:
        self._records, self.rules, self.chosen = records or {}, rules, chosen
        self.orders = orders

    def __len__(self) -> int:
        return len(self._records)

    @property
    def names(self) -> frozenset[str]:
        """The layers."""
        return frozenset(self._records)

    def get(self, layer: PrunableLayer) -> PrunedLayer | None:
        """A layer as it was finished; None if it is still to do.

        Raises
        ------
        InvalidInput
            If its weight is not the one that was pruned.
        """
        record = self._records.get(layer.name)
        if record is None:
            return None
        if record["weight"] != weight_digest(layer.weight):
            raise InvalidInput(
                f"The weight of layer {layer.name} is not the one that the interrupted run pruned; "
                "give the same model to go on with --resume."
            )
        arrays = (record.get("new"), record.get("bias"))
        weight, bias = (None if one is None else torch.from_numpy(one) for one in arrays)
        mask = unpack(record["mask"], record["result"]["inputs"])
        return PrunedLayer(LayerResult(**record["result"]), mask, weight, bias)


class Journal:
    """Where finished layers are written down. This one forgets them: nothing is resumed."""

    def begin(self, report: PruneReport) -> Finished:
        """Start or go on with the run that a (still empty) report describes."""
        return Finished()

    def allocate(self, rules: Rules) -> None:
        """Write down how sparsity is allocated to layers, before any is finished."""

    def choose(self, chosen: Chosen) -> None:
        """Write down what is chosen for all layers, before any is finished."""

    def reorder(self, orders: dict[str, InputOrder]) -> None:
        """Write down in what order inputs are put, before anything else."""

    def finish(self, layer: PrunableLayer, pruned: PrunedLayer) -> None:
        """Write down a layer, before its weight is changed."""


NO_JOURNAL = Journal()


class FileJournal(Journal):
    """A journal in a file.

    Parameters
    ----------
    file
        Its parent folder exists when `begin` is called.
    what
        What decides the masks besides the report's settings, such as the model's name.
    """

    def __init__(self, file: Path, what: dict[str, Any]) -> None:
        self._file, self._what = file, what
        self._open: IO[bytes] | None = None

    def begin(self, report: PruneReport) -> Finished:
        """See `Journal.begin`.

        Raises
        ------
        InvalidInput
            If the file is another run's; it names what differs.
        """
        decisive = {name: report.environment[name] for name in _DECISIVE}
        run = _flat({**report.settings, **self._what, "calibration tokens": report.calibration})
        run.update(_flat(decisive))
        earlier, end = self._read()
        self._open = self._file.open("r+b" if self._file.exists() else "w+b")
        self._open.truncate(end)
        self._open.seek(end)
        if not earlier:
            self._append(json.dumps(run).encode())
            return Finished()
        self._must_be_same(json.loads(earlier[0]), json.loads(json.dumps(run)))
        orders = rules = chosen = None
        if len(earlier) > 1 and earlier[1].startswith(_ORDERS):
            orders = _read_orders(earlier.pop(1).removeprefix(_ORDERS))
        if len(earlier) > 1 and earlier[1].startswith(_RULES):
            rules = Rules.from_dict(json.loads(earlier.pop(1).removeprefix(_RULES)))
        if len(earlier) > 1 and earlier[1].startswith(_CHOSEN):
            chosen = Chosen(**json.loads(earlier.pop(1).removeprefix(_CHOSEN)))
        layers = {record["result"]["name"]: record for record in map(_layer, earlier[1:])}
        return Finished(layers, rules, chosen, orders)

    def allocate(self, rules: Rules) -> None:
        self._append(_RULES + json.dumps(rules.to_dict()).encode())

    def choose(self, chosen: Chosen) -> None:
        self._append(_CHOSEN + json.dumps(chosen.to_dict()).encode())

    def reorder(self, orders: dict[str, InputOrder]) -> None:
        told = {name: {**vars(one), "order": one.order.tolist()} for name, one in orders.items()}
        self._append(_ORDERS + json.dumps(told).encode())

    def finish(self, layer: PrunableLayer, pruned: PrunedLayer) -> None:
        from safetensors.numpy import save

        about = {"result": asdict(pruned.result), "weight": weight_digest(layer.weight)}
        arrays: dict[str, Any] = {"mask": pack(pruned.mask)}
        for name, tensor in (("new", pruned.weight), ("bias", pruned.bias)):
            if tensor is not None:  # exact: float32 holds every number of the smaller types
                wide = tensor if tensor.dtype == torch.float64 else tensor.float()
                arrays[name] = wide.cpu().contiguous().numpy()
        self._append(save(arrays, {"about": json.dumps(about)}))

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()

    def _append(self, payload: bytes) -> None:
        assert self._open is not None, "a journal begins before a layer is finished"
        self._open.write(_HEAD.pack(_MAGIC, len(payload), sha256(payload).digest()) + payload)
        self._open.flush()
        os.fsync(self._open.fileno())

    def _read(self) -> tuple[list[bytes], int]:
        """The payloads of all whole records, and where they end."""
        if not self._file.exists():
            return [], 0
        payloads, end = [], 0
        with self._file.open("rb") as file:
            for payload in _payloads(file):
                payloads.append(payload)
                end += _HEAD.size + len(payload)
        return payloads, end

    def _must_be_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        # what is cut from a text differs with the settings, which say more
        last = "calibration tokens"
        for name in sorted(old.keys() | new.keys(), key=lambda name: (name.startswith(last), name)):
            if old.get(name) != new.get(name):
                raise InvalidInput(
                    f"'{name}' is {new.get(name)!r} now but was {old.get(name)!r} when the run in "
                    f"{self._file.parent} began; give the old one to go on with --resume, or "
                    "remove that folder to begin anew."
                )


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a weight's bytes, row by row."""
    raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return sha256(raw.data).hexdigest()


def _payloads(file: IO[bytes]) -> Iterator[bytes]:
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        magic, length, digest = _HEAD.unpack(head)
        left = os.fstat(file.fileno()).st_size - file.tell()
        if magic != _MAGIC or length > left:
            return
        payload = file.read(length)
        if sha256(payload).digest() != digest:
            return
        yield payload


def _layer(payload: bytes) -> dict[str, Any]:
    from safetensors.numpy import load

    size = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + size])
    about: dict[str, Any] = json.loads(header["__metadata__"]["about"])
    return {**about, **load(payload)}


def _read_orders(payload: bytes) -> dict[str, InputOrder]:
    return {
        name: InputOrder(torch.tensor(told.pop("order")), **told)
        for name, told in json.loads(payload).items()
    }


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            flat.update(_flat(item, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = item
    return flat
