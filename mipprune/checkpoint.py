"""A model on disk: plain safetensors, the tokenizer, packed masks, and the record."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from solvers import InvalidInput
from solvers.files import replaced_on_success, to_disk

from .record import PruneReport, pack, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .record import Record

MASKS_FILE = PruneReport.masks_file
ORDER_FILE = "order.safetensors"
RECORD_FILE = "mipprune.json"
TIMINGS_FILE = "timings.json"

_WIDTHS = "widths"


def check_new(out: str | Path) -> Path:
    """The output path; `InvalidInput` if something is there already or nothing can be written."""
    path = Path(out).expanduser()
    if path.exists() or path.is_symlink():
        raise InvalidInput(f"{path} exists already; choose another output or remove it.")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InvalidInput(f"{path} cannot be written, since {above} is no folder to write in.")
    return path


def save(
    out: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: Record,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a pruned or smaller model that plain transformers loads.

    Parameters
    ----------
    out
        A folder that does not exist; it appears when everything is written.
    model
        It is converted in place to ``dtype``.
    tokenizer
        Saved beside it.
    report
        The record (a `PruneReport` or a `ShrinkReport`), saved as `RECORD_FILE` with a card for
        people, and its masks, one bit per entry.
    dtype
        Type of the stored weights; None leaves the model's. The type that the model was stored
        in is exact where weights change only to zero.

    Raises
    ------
    InvalidInput
        If there is something at ``out`` already.
    """
    with replaced_on_success(check_new(out)) as folder:
        folder.mkdir()
        model.to(dtype or model.dtype).save_pretrained(folder)
        save_beside(folder, tokenizer, report)


def save_beside(folder: Path, tokenizer: PreTrainedTokenizerBase, report: Record) -> None:
    """Write what a model's folder holds beside the weights.

    Times have a file of their own, so that all others of an interrupted and resumed run are what
    they would have been.
    """
    from .results import write_results

    tokenizer.save_pretrained(folder)
    save_masks(folder / report.masks_file, report.masks)
    if isinstance(report, PruneReport) and report.orders:
        save_order(folder / ORDER_FILE, {name: one.order for name, one in report.orders.items()})
    write_json(folder / RECORD_FILE, report.to_dict())
    write_json(folder / TIMINGS_FILE, report.timings())
    write_results(folder, report.to_dict())


class Shards:
    """Weights written one block at a time, as the shards of a sharded checkpoint.

    Parameters
    ----------
    folder
        Made if it does not exist.
    count
        How many there will be.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def write(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write shard ``index``, whole or not at all, and have it on disk."""
        from safetensors.torch import save_file

        self._folder.mkdir(exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replaced_on_success(self._file(index)) as temporary:
            save_file(contiguous, temporary, metadata={"format": "pt"})
            to_disk(temporary)

    def holds(self, index: int) -> bool:
        """Whether shard ``index`` is written."""
        return self._file(index).exists()

    def write_index(self) -> None:
        """Write which shard holds which weight."""
        from safetensors import safe_open

        weight_map: dict[str, str] = {}
        size = 0
        for index in range(self._count):
            with safe_open(self._file(index), "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    weight_map[name] = self._file(index).name
                    size += stored.get_tensor(name).nbytes
        record = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(self._folder / "model.safetensors.index.json", record)

    def _file(self, index: int) -> Path:
        return self._folder / f"model-{index + 1:05d}-of-{self._count:05d}.safetensors"


def write_json(path: str | Path, record: Any) -> None:
    """JSON in one piece; not-a-number is written as null."""
    with replaced_on_success(path) as temporary:
        text = json.dumps(finite(record), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def save_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Masks (bool ``[outputs, inputs]``) packed to one bit per weight, rows padded to bytes."""
    from safetensors.numpy import save_file

    packed, widths = {}, {}
    for name, mask in masks.items():
        packed[name], widths[name] = pack(mask), mask.shape[1]
    with replaced_on_success(path) as temporary:
        # one entry, since several are written in an order that changes from run to run
        save_file(packed, temporary, metadata={_WIDTHS: json.dumps(widths)})


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Masks of a pruned model's folder (or of a masks file), bool, True = keep.

    Raises
    ------
    InvalidInput
        If there are none.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    file = path / MASKS_FILE if path.is_dir() else path
    if not file.is_file():
        raise InvalidInput(f"There are no masks at {file}.")
    try:
        with safe_open(file, "np") as stored:
            widths = json.loads((stored.metadata() or {})[_WIDTHS])
            return {
                name: unpack(stored.get_tensor(name), widths[name])
                for name in stored.keys()  # noqa: SIM118 (not a mapping)
            }
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidInput(f"{file} is no file of packed masks ({error}).") from error


def save_order(path: str | Path, order: Mapping[str, Tensor]) -> None:
    """Orders of inputs by the layer that reads them, int32 ``[d]``."""
    from safetensors.torch import save_file

    with replaced_on_success(path) as temporary:
        save_file({name: one.to(torch.int32) for name, one in order.items()}, temporary)


def load_order(folder: str | Path) -> dict[str, Tensor]:
    """In what order a pruned model's inputs are: by layer, long ``[d]``, the input of each place.

    Empty for a model whose inputs are in the order of the dense model.

    Raises
    ------
    InvalidInput
        If the file that says it cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / ORDER_FILE
    if not file.is_file():
        return {}
    try:
        order = {name: one.long() for name, one in load_file(file).items()}
    except SafetensorError as error:
        raise InvalidInput(f"{file} is not a readable safetensors file ({error}).") from error
    for name, one in order.items():
        if not torch.equal(one.flatten().sort().values, torch.arange(one.numel())):
            raise InvalidInput(f"{file} holds no order of the inputs of {name}.")
    return order


def finite(value: Any) -> Any:
    """The same structure with floats that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
