"""A certified folder checked from its files alone: what `checker` proves of rows, of a model.

``python solvers/checker_folder.py DIR`` (or ``mipprune check DIR``) reads a folder that ``mipprune
certify`` wrote. It imports `checker`, NumPy and the standard library, and needs no package to be
installed. What is checked, `check_folder` says; what files cannot prove, `NOT_PROVEN`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING or __package__:
    from .checker import (
        NOTHING,
        Array,
        Claim,
        Problem,
        Refused,
        Row,
        gap,
        prove_rows,
        summed,
        violation,
    )
else:  # run by itself, beside checker.py
    from checker import (
        NOTHING,
        Array,
        Claim,
        Problem,
        Refused,
        Row,
        gap,
        prove_rows,
        summed,
        violation,
    )

NOT_PROVEN = (
    "That the Gram matrices belong to the calibration text cannot be proven from files; "
    "mipprune certify, run again on the recorded model, text, seed and versions, computes them "
    "anew."
)

_SAME = 1e-6  # what is recomputed on another machine may differ from the record by so much


class Proven(NamedTuple):
    """What is proven of a layer: how many rows, and the gap of their summed loss."""

    rows: int
    gap: float


# Samples of rows --------------------------------------------------------------------------------


def estimates(rows: Sequence[Row], population: int) -> dict[str, float | None]:
    """Loss, bound and gap of some rows, and what they say about all rows of the layer.

    ``gap_margin`` and ``margin`` are half widths of 95 % confidence intervals: of the gap (ratio
    estimate) and of ``mean_row_gap`` (Student's t, finite population); 0 for all rows, None for
    a single one.
    """
    losses, bounds = np.array([row.loss for row in rows]), np.array([row.bound for row in rows])
    loss, bound, scale = summed(rows)
    of_all = gap(loss, bound, scale)
    gaps = np.array([gap(*row) for row in rows])
    mean = losses.mean()
    apart = (losses - bounds - of_all * losses) / mean if of_all and mean else 0 * losses
    return {
        "loss": loss,
        "bound": bound,
        "gap": of_all,
        "gap_margin": margin(apart, population),
        "mean_row_gap": float(gaps.mean()),
        "margin": margin(gaps, population),
    }


def margin(values: Array, population: int) -> float | None:
    """Half width of the 95 % confidence interval of the mean over the whole population."""
    n = len(values)
    if n == population:
        return 0.0
    if n == 1:
        return None
    spread = float(values.std(ddof=1)) if np.isfinite(values).all() else math.inf
    return _quantile(n - 1) * spread / math.sqrt(n) * math.sqrt(1 - n / population)


def _quantile(freedom: int) -> float:
    """The t that Student's distribution exceeds in absolute value with probability 5 %."""

    def inside(t: float) -> float:  # Abramowitz and Stegun 26.7.3 and 26.7.4
        angle = math.atan2(t, math.sqrt(freedom))
        odd, square = freedom % 2, math.cos(angle) ** 2
        k = np.arange(1, (freedom - odd) // 2 if not odd else (freedom - 1) // 2)
        ratios = (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * square
        series = 1 + float(np.cumprod(ratios).sum())
        if not odd:
            return math.sin(angle) * series
        tail = math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0
        return (angle + tail) * 2 / math.pi

    low, high = 0.0, 13.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


# Files ------------------------------------------------------------------------------------------

_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip


class Tensor(NamedTuple):
    """A stored tensor: its type as safetensors calls it, and its numbers (BF16 as uint16)."""

    dtype: str
    data: Array

    def float64(self) -> Array:
        """The same numbers, exactly."""
        if self.dtype == "BF16":
            wide: Array = self.data.astype(np.uint32) << np.uint32(16)
            return np.asarray(wide.view(np.float32).astype(np.float64))
        if not self.dtype.startswith("F"):
            raise Refused(f"A tensor of type {self.dtype} holds no real numbers.")
        return self.data.astype(np.float64)

    def digest(self) -> str:
        """SHA-256 over type, shape and numbers."""
        head = f"{self.dtype} {self.data.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.data).tobytes()).hexdigest()


def _real_file(path: Path) -> Path:
    """A path that is a file of its own: no link leads to it, or away from it."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        raise Refused(f"There is no file {path}.") from None
    if stat.S_ISLNK(mode) or stat.S_ISLNK(os.lstat(path.parent).st_mode):
        raise Refused(
            f"{path} is a link, or its folder is; copy the folder with its links followed (cp -rL) "
            "and check the copy."
        )
    if not stat.S_ISREG(mode):
        raise Refused(f"{path} is no regular file; put the file that certify wrote there.")
    return path


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("A name stands twice in a JSON object; keep one.")
    return found


def _no_number(text: str) -> float:
    raise Refused(f"{text} is no number of a record.")


def _json(text: bytes, what: object) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} is not JSON ({error}).") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, mapped and not yet read, and its metadata.

    The format: eight bytes with the length of a JSON header, the header, and the data, which the
    tensors have to fill without gap or overlap.
    """
    _real_file(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise Refused(f"{path} is shorter than its header says.")
        header = _json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    tensors, ends = {}, 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = tuple(about["shape"]), about["data_offsets"]
        if about["dtype"] not in _TYPES:
            raise Refused(f"{path} stores {name} as {about['dtype']}, which is not known here.")
        kind = np.dtype(_TYPES[about["dtype"]])
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise Refused(f"{path} gives {name} an impossible shape or place.")
        if begin != ends or end - begin != math.prod(shape) * kind.itemsize:
            raise Refused(f"{path} gives {name} a place that does not fit its shape.")
        ends = end
        if begin == end:
            data = np.zeros(shape, kind)
        else:
            data = np.memmap(path, kind, "r", 8 + length + begin, shape)
        tensors[name] = Tensor(about["dtype"], data)
    if ends != total - 8 - length:
        raise Refused(f"{path} has {total - 8 - length} bytes of data where {ends} are named.")
    return tensors, metadata


def read_problem(path: Path) -> tuple[Problem, dict[str, str | None]]:
    """A problem, and the digests of its parts as the record has them."""
    stored, _ = read_tensors(path)
    linear = stored.get("linear")
    problem = Problem(
        stored["weight"].float64(),
        stored["gram"].float64(),
        None if linear is None else linear.float64(),
    )
    return problem, {
        name: stored[name].digest() if name in stored else None
        for name in ("weight", "gram", "linear")
    }


def read_claims(path: Path) -> list[Claim]:
    """The certificates of a file."""
    t = {name: tensor.data for name, tensor in read_tensors(path)[0].items()}
    counts = t["cuts"]
    if counts.dtype.kind not in "iu" or t["row"].dtype.kind not in "iu" or (counts < 0).any():
        raise Refused(f"{path.name} counts rows or cuts in no whole numbers.")
    if any(t[name].dtype != np.float64 for name in ("bound", "offset", "shift", "price")):
        raise Refused(f"{path.name} has numbers that are not stored as float64.")
    ends = np.cumsum(counts)
    if len(counts) == 0 or any(len(t[n]) != ends[-1] for n in ("family", "index", "multiplier")):
        raise Refused(f"{path.name} has no rows, or cuts that belong to no row.")
    per_row = ("row", "bound", "offset", "shift", "price", "mask", "diagonal")
    if any(len(t[name]) != len(counts) for name in per_row):
        raise Refused(f"{path.name} has rows of which something is missing.")
    claims = []
    for i, (end, count) in enumerate(zip(ends, counts, strict=True)):
        cuts, price = slice(int(end - count), int(end)), float(t["price"][i])
        about: dict[str, Any] = {n: float(t[n][i]) for n in ("bound", "offset", "shift")}
        about |= {n: t[n][cuts] for n in ("family", "index", "multiplier")}
        about["price"] = None if math.isnan(price) else price
        claims.append(Claim(int(t["row"][i]), t["mask"][i], diagonal=t["diagonal"][i], **about))
    return claims


# A folder as a whole ----------------------------------------------------------------------------


class Checked(dict[str, Proven]):
    """What a folder's files prove: by layer, and of how much of the model.

    Attributes
    ----------
    layers, rows
        Of the record, certified or not.
    missing
        Layers without a certificate.
    no_bound
        Layers whose loss cannot be negative and whose bound is not above zero: nothing is known.
    not_proven
        `NOT_PROVEN`.
    """

    not_proven = NOT_PROVEN

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        self.layers, self.rows = layers, rows
        self.missing: list[str] = []
        self.no_bound: list[str] = []

    @property
    def certified_rows(self) -> int:
        """How many rows are certified."""
        return sum(one.rows for one in self.values())

    @property
    def smallest(self) -> float:
        """Smallest gap of a layer."""
        return min(one.gap for one in self.values())

    @property
    def largest(self) -> float:
        """Largest gap of a layer."""
        return max(one.gap for one in self.values())

    def __str__(self) -> str:
        return (
            f"{coverage_text(len(self), self.layers, self.certified_rows, self.rows)} verified; "
            f"layer gaps {gaps_text([g for _, g in self.values()], len(self.no_bound))}."
        )


def coverage_text(layers: int, of_layers: int, rows: int, of_rows: int) -> str:
    """``7 of 42 layers, 14 of 10 368 rows``."""
    counts = f"{rows:,} of {of_rows:,} rows".replace(",", " ")
    return f"{layers} of {of_layers} layers, {counts}"


def gaps_text(gaps: Sequence[float], unbounded: int) -> str:
    """Smallest and largest gap of layers, of which some have no bound."""
    known = f"{min(gaps):.2%} to {max(gaps):.2%}"
    if not unbounded:
        return known
    if unbounded == len(gaps):
        return "no bound"
    return f"{min(gaps):.2%} to no bound ({unbounded} of {len(gaps)} layers have none)"


class _Folder:
    """A folder's record, masks and weights, each read with suspicion."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = _json(_real_file(path / "mipprune.json").read_bytes(), "mipprune.json")
        self.settings: dict[str, Any] = self.record["settings"]
        self.layers: list[dict[str, Any]] = self.record["layers"]
        self.names = [layer["name"] for layer in self.layers]
        if not self.names or len(set(self.names)) != len(self.names):
            raise Refused("The record names a layer twice, or none.")
        for name in self.names:
            if not isinstance(name, str) or not name or re.search(r"[/\\\0]", name):
                raise Refused(f"{name!r} is no name of a layer.")
        if all(layer.get("certificate") is None for layer in self.layers):
            raise Refused(f"{path} has no certificates; make them with mipprune certify.")
        self.masks = self._read_masks()
        self.tensors = self._read_model()

    def _read_masks(self) -> dict[str, Array]:
        """Masks by layer, bool ``[rows, d]``, those that the record's hash is of."""
        stored, metadata = read_tensors(self.path / "masks.safetensors")
        widths, masks, digest = json.loads(metadata["widths"]), {}, hashlib.sha256()
        for name in sorted(stored):
            packed, width = stored[name].data, widths[name]
            if packed.dtype != np.uint8 or packed.shape[1] != -(-width // 8):
                raise Refused(f"Layer {name}: its mask is not one bit per weight.")
            masks[name] = np.unpackbits(packed, axis=1, count=width).astype(bool)
            digest.update(f"{name} {masks[name].shape}".encode())
            digest.update(np.packbits(masks[name], axis=1).tobytes())
        if set(masks) != set(self.names):
            raise Refused("masks.safetensors and the record name different layers.")
        if digest.hexdigest() != self.record["mask_hash"]:
            raise Refused("masks.safetensors is not what the record's hash of the masks says.")
        for layer in self.layers:
            if masks[layer["name"]].shape != (layer["rows"], layer["inputs"]):
                raise Refused(f"Layer {layer['name']}: its mask has not the size in the record.")
        return masks

    def _read_model(self) -> dict[str, Tensor]:
        """The saved model's tensors by name."""
        single, index = "model.safetensors", "model.safetensors.index.json"
        files = [name for name in (single, index) if os.path.lexists(self.path / name)]
        if len(files) != 1:
            raise Refused(f"The folder needs either {single} or {index}, and has {len(files)}.")
        if files == [single]:
            return read_tensors(self.path / single)[0]
        where = _json(_real_file(self.path / index).read_bytes(), index)["weight_map"]
        if any(re.search(r"[/\\\0]", file) for file in where.values()):
            raise Refused(f"{index} names files outside the folder.")
        shards = {file: read_tensors(self.path / file)[0] for file in set(where.values())}
        return {name: shards[file][name] for name, file in where.items()}

    def pattern(self, name: str) -> dict[str, Any]:
        """The pattern of a layer, by the record's rules."""
        rules = self.settings.get("rules")
        default: dict[str, Any] = self.settings["pattern"]
        if rules is None:
            return default
        if rules["default"] != default:
            raise Refused("The record's pattern is not the default of its rules.")
        only = rules["only"]
        dense = any(_matches(one, name) for one in rules["ignore"])
        if dense or (only and not any(_matches(one, name) for one in only)):
            raise Refused("the record's rules leave it dense.")
        for expression, pattern in rules["rules"]:
            if _matches(expression, name):
                default = pattern
                break
        if default is None:
            raise Refused("the record's rules leave it dense.")
        return default

    def sample(self, name: str) -> list[int]:
        """The rows that the recorded seed draws: by block, and by place within the block."""
        about, rows = self.record["certificate"], len(self.masks[name])
        if about["rows"] is None or about["rows"] >= rows:
            return list(range(rows))
        blocks = [self._block(other) for other in self.names]
        own = self.names.index(name)
        place = blocks[:own].count(blocks[own])
        random = np.random.default_rng((about["seed"], blocks[own], place))
        return sorted(int(row) for row in random.choice(rows, about["rows"], replace=False))

    def _block(self, name: str) -> int:
        prefix = self.settings["blocks"] + "."
        number = name.removeprefix(prefix).partition(".")[0]
        if not name.startswith(prefix) or not number.isdecimal():
            raise Refused(f"Layer {name} is in no block of {prefix}")
        return int(number)

    def stored(self, parts: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> Tensor:
        """A layer's weight ``[rows, d]`` out of the saved tensors, as its record says."""
        if not parts:
            raise Refused("its record does not say where the model stores it.")
        found, kinds = [], set()
        for part in parts:
            tensor = self.tensors[part["tensor"]]
            matrix = tensor.data if part["index"] is None else tensor.data[part["index"]]
            found.append(matrix.T if part["transposed"] else matrix)
            kinds.add(tensor.dtype)
        matrix = np.concatenate(found) if len(found) > 1 else found[0]
        if matrix.shape != shape or len(kinds) != 1:
            raise Refused(f"the model stores it as {matrix.shape}, but its mask is {shape}.")
        return Tensor(kinds.pop(), matrix)


def _matches(expression: str, layer: str) -> bool:
    """Whether a name with ``*``, or a regular expression after ``re:``, is a layer's name."""
    if expression.startswith("re:"):
        return re.fullmatch(expression[3:], layer) is not None
    return re.fullmatch(".*".join(map(re.escape, expression.split("*"))), layer) is not None


def check_folder(folder: str | Path, exact: bool = False) -> Checked:
    """Check a certified folder from its files alone.

    For every layer of the record: the mask in ``masks.safetensors`` follows the pattern of the
    record's rules and is the one that the saved weights carry; the certified rows are those that
    the recorded seed draws, their masks the layer's, their kept weights the saved ones (where a
    run changes weights: their digest is the record's); every row's bound is proven; loss, bound,
    gap and margins, computed from these, are those of the record.

    Raises
    ------
    Refused
        If anything of this does not hold.
    """
    what = "The folder"
    try:
        opened = _Folder(Path(folder))
        checked = Checked(len(opened.names), sum(len(mask) for mask in opened.masks.values()))
        for layer in opened.layers:
            what = f"Layer {layer['name']}"
            if layer.get("certificate") is None:
                checked.missing.append(layer["name"])
            else:
                _check_layer(opened, layer, exact, checked)
    except Refused as refused:
        text = str(refused)
        raise Refused(text if what == "The folder" else f"{what}: {text}") from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever else forged files make of this code is a refusal too
        raise Refused(f"{what} is not what mipprune certify writes ({error!r}).") from error
    return checked


def _check_layer(folder: _Folder, layer: dict[str, Any], exact: bool, checked: Checked) -> None:
    name, claimed = layer["name"], layer["certificate"]
    mask, pattern = folder.masks[name], folder.pattern(name)
    wrong = violation(pattern, mask)
    if wrong is not None:
        raise Refused(f"The mask does not follow the pattern: {wrong}.")
    rows = folder.sample(name)
    if claimed["rows"] != rows:
        raise Refused("the certified rows are not those that the recorded seed draws.")
    if "stored" not in claimed:
        raise Refused("it was certified by an older version; run mipprune certify again.")
    saved = folder.stored(claimed["stored"], mask.shape)
    if Tensor(saved.dtype, saved.data[~mask]).float64().any():
        raise Refused("the saved weights are not zero where its mask removes them.")
    proven, plain = _prove_groups(folder, layer, pattern, rows, saved, exact)
    found = estimates(proven, len(mask))
    _check_claimed(claimed, found, sum(one.scale for one in proven))
    loss, bound = found["loss"] or 0.0, found["bound"] or 0.0
    if plain:
        whole = layer["loss"] if layer.get("surrogate_loss") is None else layer["surrogate_loss"]
        # Losses of runs are of the dense model in its own precision; certify allows 1e-3 too.
        if not loss <= whole + 2e-3 * abs(whole) + NOTHING * sum(one.scale for one in proven):
            raise Refused(f"its rows lose {loss:.6g}, more than the record's {whole:.6g}.")
        if len(rows) == len(mask) and not loss >= whole - 2e-3 * abs(whole):
            raise Refused(f"its rows lose {loss:.6g}, less than the record's {whole:.6g}.")
    checked[name] = Proven(len(rows), found["gap"] or 0.0)
    if plain and bound <= 0 and checked[name].gap > 0:
        checked.no_bound.append(name)


def _check_claimed(
    claimed: Mapping[str, Any], found: Mapping[str, float | None], scale: float
) -> None:
    """Refuse a record whose numbers are not those computed here."""
    for key, value in found.items():
        said = claimed[key]
        if value is None or not math.isfinite(value):
            same = said is None
        else:
            near = abs(value) if key in ("loss", "bound") else max(1.0, abs(value))
            margin = _SAME * near + (1e-12 * scale if key in ("loss", "bound") else 0.0)
            same = isinstance(said, (int, float)) and abs(said - value) <= margin
        if not same:
            raise Refused(f"the record claims the {key} {said!r}, but it is {value!r}.")


def _prove_groups(
    folder: _Folder,
    layer: dict[str, Any],
    pattern: dict[str, Any],
    rows: list[int],
    saved: Tensor,
    exact: bool,
) -> tuple[list[Row], bool]:
    """The certified rows of a layer, by groups with Gram matrices of their own; and if plain."""
    name, claimed, mask = layer["name"], layer["certificate"], folder.masks[layer["name"]]
    step = folder.settings.get("layer_step") or {"update": "none", "surrogate": {}}
    wanted = min(step["surrogate"].get("row_groups", 1), len(mask))
    size, larger = divmod(len(mask), wanted)
    begins = [size * group + min(group, larger) for group in range(wanted + 1)]
    found: list[Row] = []
    plain, digests = True, list(claimed["digests"])
    for group in range(wanted):
        own = [row for row in rows if begins[group] <= row < begins[group + 1]]
        if not own:
            continue
        base = f"{name}.group{group}" if wanted > 1 else name
        place = folder.path / "certificates"
        problem, digest = read_problem(place / f"{base}.problem.safetensors")
        claims = read_claims(place / f"{base}.safetensors")
        if not digests or digests.pop(0) != digest:
            raise Refused("its problem is not the one whose digests the record has.")
        if [c.row for c in claims] != list(range(len(own))) or len(problem.weight) != len(own):
            raise Refused("its files hold other rows than were certified.")
        if not all(np.array_equal(c.mask, mask[row]) for c, row in zip(claims, own, strict=True)):
            raise Refused("a certified mask is not the model's.")
        if step["update"] == "none" and not _same_weights(problem.weight, saved, mask, own):
            raise Refused("the kept weights of its problem are not those of the saved model.")
        part = pattern
        if pattern["kind"] == "per_layer":
            part = {"kind": "per_layer", "keep": int(mask[own].sum())}
        found += prove_rows(problem, part, claims, exact)
        plain = plain and problem.linear is None
    if digests:
        raise Refused("the record has digests of problems that are not there.")
    return found, plain


def _same_weights(weight: Array, saved: Tensor, mask: Array, rows: list[int]) -> bool:
    """Whether kept weights (float64 ``[rows, d]``), rounded to the stored type, are the saved."""
    kept = mask[rows]
    stored, dense = Tensor(saved.dtype, saved.data[rows]).float64()[kept], weight[kept]
    with np.errstate(over="ignore"):
        if saved.dtype != "F64":
            dense = dense.astype(np.float32)
        if saved.dtype == "F16":
            dense = dense.astype(np.float16)
        elif saved.dtype == "BF16":  # to nearest, ties to even
            bits = dense.view(np.uint32).astype(np.uint64)
            bits = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & 0xFFFF0000
            dense = bits.astype(np.uint32).view(np.float32)
    return bool((stored == dense.astype(np.float64)).all())


def main(arguments: Sequence[str]) -> int:
    """``checker_folder.py DIR [--exact]``: 0 if the folder is what it claims to be."""
    folders = [one for one in arguments if one != "--exact"]
    if len(folders) != 1:
        print("usage: checker_folder.py DIR [--exact]", file=sys.stderr)
        return 2
    try:
        print(f"{check_folder(folders[0], '--exact' in arguments)}\n{NOT_PROVEN}")
    except (Refused, ModuleNotFoundError) as refused:
        print(refused, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
