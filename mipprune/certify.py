"""Certificates for a pruned model: how far each layer's mask can be from the best one.

The run is repeated from the record: same dense model, same calibration tokens, same masks, so
that every layer's problem is rebuilt; then rows are bounded from below, all or a random sample.

Where the rows of a layer share a budget, they are bounded at one price of a pruned weight. For
all rows together that bounds the layer. For a sample it bounds these rows with the number of
weights that they keep now; and because the layer's gap at this price is the sum of its rows'
gaps, the sample estimates it.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers import Evidence, InvalidInput, MaskProblem, Pattern, PerLayer, checker_folder, solve
from solvers.certificate import Certificate, InvalidCertificate, check_rows, save_certificates
from solvers.checker import Refused, Row
from solvers.clock import Clock
from solvers.semidefinite.layer import fitted_price

from .calibration import Windows, calibration_windows
from .checkpoint import ORDER_FILE, RECORD_FILE, finite, load_masks, load_order, write_json
from .choice import step_chosen
from .environment import model_environment
from .folder import StoredWeights
from .held_out import split_windows
from .layer_step import LayerStep
from .models import LoadedModel, load_model, resolve_device
from .observer import Observer
from .permute import apply_orders, as_orders
from .placement import Placement
from .record import order_digest
from .results import is_unbounded, read_record, write_results
from .rules import Rules
from .stages import Stages
from .surrogate import row_slices
from .token_weights import token_weights
from .walk import BlockWalk

FOLDER = "certificates"
_REPRODUCED = 1e-3
"""A layer's loss may differ by so much, relatively, from the record's (other machines round
otherwise); beyond it, this is not the run that the record describes."""

_PILOT = 8
"""Rows on which the price of a layer's budget is found."""


@dataclass(frozen=True)
class LayerCertificate:
    """What is proven about one layer's mask.

    Attributes
    ----------
    name
        The layer.
    rows
        Certified rows; all or a random sample.
    loss, bound
        Summed over these rows, by what masks were judged by; no mask of the pattern loses less
        than the bound on them (with a shared budget: that keeps as many weights in these rows).
    evidence
        What the bound rests on: "certified", by the witnesses in the files.
    gap, gap_margin
        ``(loss - bound) / |loss|``, and the half width of its 95 % confidence interval for the
        whole layer (ratio estimate; 0 for all rows, None for a single one).
    mean_row_gap, margin
        Mean of the rows' gaps, and the half width of its 95 % confidence interval for the whole
        layer (Student's t with finite population; 0 for all rows, None for a single one).
    price
        Of a pruned weight, where the rows share a budget; it is found on other rows than these.
    digests
        SHA-256 of weight, Gram matrix and linear term of the certified problems, by group of rows.
    stored
        Where the saved model has the layer's weight: parts of its rows, each a tensor's name, its
        index in that tensor (None: all of it), and whether it is transposed.
    """

    name: str
    rows: list[int]
    loss: float
    bound: float
    gap: float
    gap_margin: float | None
    mean_row_gap: float
    margin: float | None
    price: float | None
    digests: list[dict[str, str | None]]
    stored: list[dict[str, Any]]
    evidence: str = Evidence.CERTIFIED.label

    @property
    def says_nothing(self) -> bool:
        """Whether the bound is no better than that a plain loss is not negative."""
        return is_unbounded(asdict(self))


def certify(
    folder: str | Path,
    *,
    rows: int | None = 16,
    row_seconds: float = 10.0,
    seed: int = 0,
    device: str = "auto",
    model: LoadedModel | None = None,
    calibration: str | Windows | None = None,
    trust_remote_code: bool = False,
    observer: Observer | None = None,
) -> list[LayerCertificate]:
    """Bound the layers of a pruned model; write certificates and results into its folder.

    Parameters
    ----------
    folder
        What `mipprune.save` wrote, with a record that names its model.
    rows
        Rows per layer, a random sample; None for all.
    row_seconds
        Most seconds per row.
    seed
        Of the sample.
    device
        For the model; bounds are computed on the CPU.
    model
        The dense model, if it is at hand already; it is pruned in place.
    calibration
        Instead of the record's, for a model that was pruned on ready windows.
    trust_remote_code
        See `load_model`.
    observer
        Told about phases.

    Raises
    ------
    InvalidInput
        If the folder holds no such model, or the run it records cannot be repeated here.
    """
    observer = observer or Observer()
    folder = Path(folder)
    record = read_record(folder)
    settings = record["settings"]
    _must_have_masks(folder, record)
    patterns = _patterns(record)
    if rows is not None and rows < 1:
        raise InvalidInput(f"{rows} rows certify nothing; give at least 1.")
    if model is None:
        model = _dense_model(settings, device, trust_remote_code)
    masks = load_masks(folder)
    windows = calibration_windows(
        model.model,
        model.tokenizer,
        calibration or settings.get("calibration"),
        settings["samples"],
        settings["seqlen"],
        settings["seed"],
    )
    if settings.get("held_out") is not None:
        windows, _ = split_windows(windows, settings["held_out"])
    if windows.digest != record["calibration"]["sha256"]:
        raise InvalidInput(
            f"The calibration text '{windows.source}' gives other tokens here than when {folder} "
            "was pruned; certify with the text and versions of its record."
        )
    placement = Placement(model.model, settings["blocks"])
    _reorder(placement, folder, record, windows)
    stored = StoredWeights(folder, model.model)
    recorded = {layer["name"]: layer for layer in record["layers"]}
    observer.begin(len(placement.blocks), len(recorded))
    run_step = step_chosen(_layer_step(settings), settings.get("choice"))
    results = []
    walk = BlockWalk(
        placement,
        windows.tokens,
        settings["batch_size"],
        propagate=settings["grams"] != "dense",
        stages=Stages() if settings["grams"] == "sequential" else None,
        targets=run_step.surrogate.targets,
    )
    walk.token_weights = token_weights(
        run_step.surrogate, placement, lambda: walk, list(recorded), observer
    )
    done: Counter[int] = Counter()  # by block
    for step in walk:
        for layer in step.layers:
            if layer.name not in patterns:
                continue
            pattern = patterns[layer.name]
            observer.phase(layer.name.removeprefix(f"{placement.blocks_name}."))
            mask = masks[layer.name]
            gram = step.grams.gram(layer)
            layer_step = step_chosen(run_step, recorded[layer.name].get("choice"))
            aim = layer_step.aim(layer.weight, gram.inputs, layer.bias is not None)
            problems = [one.to("cpu") for one in aim.problems(pattern)]
            found = recorded[layer.name]
            _must_reproduce(found, problems, mask)
            place = (seed, step.index, done[step.index])
            done[step.index] += 1
            chosen = _sample(len(mask), rows, place)
            files = _Files(folder, layer.name, stored.parts(layer))
            result = _certify_layer(files, problems, mask, chosen, row_seconds, seed)
            results.append(result)
            recorded[layer.name]["certificate"] = finite(asdict(result))
            new = aim.updated(mask.to(layer.weight.device))
            step.prune(layer, mask, new, aim.new_bias(new, layer.bias))
    versions = model_environment(model.model)
    del versions["time"]  # the same certificates make the same record
    record["certificate"] = {
        "rows": rows,
        "row_seconds": row_seconds,
        "seed": seed,
        "model": settings.get("model"),
        "calibration": {"source": windows.source, "sha256": windows.digest},
        "environment": versions,
        "not_proven": checker_folder.NOT_PROVEN,
    }
    write_json(folder / RECORD_FILE, record)
    write_results(folder, record)
    return results


def check_folder(folder: str | Path, *, exact: bool = False) -> checker_folder.Checked:
    """Verify a certified folder from its files alone, see `solvers.checker_folder.check_folder`.

    Parameters
    ----------
    folder
        What `certify` wrote into.
    exact
        Repeat the proofs in ball arithmetic (needs python-flint) instead of floating point.

    Returns
    -------
    solvers.checker_folder.Checked
        By layer: rows verified, and the gap proven for their summed loss; and the coverage.

    Raises
    ------
    InvalidInput
        If there are none, or one of them does not prove what it claims; it names the layer.
    """
    _must_have_masks(folder, read_record(folder))
    try:
        return checker_folder.check_folder(folder, exact)
    except Refused as refused:
        raise InvalidCertificate(str(refused)) from None
    except ModuleNotFoundError as error:
        raise InvalidInput(str(error)) from None


def _must_have_masks(folder: str | Path, record: dict[str, Any]) -> None:
    if record.get("kind") == "shrink":
        raise InvalidInput(
            f"{folder} holds a model made smaller, without masks to certify; its record has the "
            "gap of a solver that proves one (mipprune shrink --solver branch_and_bound)."
        )


def _patterns(record: dict[str, Any]) -> dict[str, Pattern]:
    """The pattern of every layer that was pruned."""
    rules = Rules.of_settings(record["settings"])
    patterns = {layer["name"]: rules.pattern_for(layer["name"]) for layer in record["layers"]}
    return {name: pattern for name, pattern in patterns.items() if pattern is not None}


def _dense_model(settings: dict[str, Any], device: str, trust_remote_code: bool) -> LoadedModel:
    source = settings.get("model")
    if source is None:
        raise InvalidInput("The record does not name its model; pass the dense model.")
    return load_model(
        source, resolve_device(device), settings.get("dtype", "auto"), trust_remote_code
    )


def _reorder(placement: Placement, folder: Path, record: dict[str, Any], windows: Windows) -> None:
    """Put the dense model's inputs in the order that the run gave them, if it did."""
    about = record.get("order")
    if about is None:
        return
    order = load_order(folder)
    if order_digest(order) != about["sha256"]:
        raise InvalidInput(
            f"{folder / ORDER_FILE} is not what its record says; take the file of that run."
        )
    first = windows.tokens[: record["settings"]["batch_size"]]
    apply_orders(placement, as_orders(order), first)


def _layer_step(settings: dict[str, Any]) -> LayerStep:
    """The record's; records of before layer steps were plain."""
    return LayerStep.from_dict(settings["layer_step"]) if "layer_step" in settings else LayerStep()


def _must_reproduce(found: dict[str, Any], problems: Sequence[MaskProblem], mask: Tensor) -> None:
    """Refuse problems by which a layer's mask does not lose what its record says."""
    recorded = found.get("surrogate_loss", found["loss"])
    rows = row_slices(len(mask), len(problems))
    each = [problem.objective(mask[own]) for problem, own in zip(problems, rows, strict=True)]
    loss = float(torch.cat(each).sum())
    # a linear term may leave next to nothing of the loss that it was added to
    if abs(loss - recorded) > _REPRODUCED * max(abs(recorded), found["loss"]):
        raise InvalidInput(
            f"Layer {found['name']} loses {loss:.6g} here but {recorded:.6g} in the record; "
            "certify with the model and versions of the record."
        )


def _sample(rows: int, wanted: int | None, seed: tuple[int, ...]) -> list[int]:
    if wanted is None or wanted >= rows:
        return list(range(rows))
    chosen = np.random.default_rng(seed).choice(rows, wanted, replace=False)
    return sorted(int(row) for row in chosen)


@dataclass(frozen=True)
class _Files:
    """Where a layer's certificates go, and where its weight is."""

    folder: Path
    layer: str
    stored: list[dict[str, Any]]

    def of(self, group: int | None) -> tuple[Path, Path]:
        """Certificate file and problem file of the layer, or of a group of its rows."""
        return _files(self.folder, self.layer, group)


def _certify_layer(
    files: _Files,
    problems: Sequence[MaskProblem],
    mask: Tensor,
    chosen: list[int],
    row_seconds: float,
    seed: int,
) -> LayerCertificate:
    """Bound some rows of a layer's groups, write their certificates, and sum up."""
    proven: list[Row] = []
    price = None
    digests = []
    groups = row_slices(len(mask), len(problems))
    for group, of_group in _rows_by_group(chosen, len(mask), len(problems)):
        own = groups[group or 0]
        certificates_file, problem_file = files.of(group)
        rows = [row - own.start for row in of_group]
        certificates, part, price = _certify_rows(
            problems[group or 0], mask[own], rows, row_seconds, seed
        )
        part.save(problem_file)
        save_certificates(certificates_file, certificates)
        proven += check_rows(part, certificates)
        digests.append(checker_folder.read_problem(problem_file)[1])
    return LayerCertificate(
        name=files.layer,
        rows=chosen,
        price=price,
        digests=digests,
        stored=files.stored,
        **checker_folder.estimates(proven, len(mask)),  # type: ignore[arg-type]
    )


def _certify_rows(
    problem: MaskProblem, mask: Tensor, chosen: list[int], row_seconds: float, seed: int
) -> tuple[list[Certificate], MaskProblem, float | None]:
    """Bound some rows of one problem.

    Returns
    -------
    list of Certificate, MaskProblem, float or None
        One for each row; the problem of these rows; the price of a budget that they share.
    """
    kept, price = mask[chosen], None
    part = MaskProblem(
        problem.weight[chosen],
        problem.gram,
        _pattern_of_rows(problem.pattern, kept),
        None if problem.linear is None else problem.linear[chosen],
        copy=False,
    )
    if problem.pattern.coupled:
        others = sorted(set(range(len(mask))) - set(chosen)) or chosen
        pilot = [others[at] for at in _sample(len(others), _PILOT, (seed, len(others)))]
        price = fitted_price(problem, mask, pilot, Clock(len(pilot) * row_seconds / 2))
    solution = solve(
        part,
        "semidefinite",
        start=kept,
        row_seconds=row_seconds,
        seed=seed,
        decompose=problem.pattern.coupled,
        price=price,
    )
    # The solver may have found better masks; what is certified is the model's own.
    certificates = [
        dataclasses.replace(certificate, mask=kept[certificate.row].numpy())
        for certificate in solution.certificates
    ]
    return certificates, part, price


def _rows_by_group(
    rows: Sequence[int], of_layer: int, row_groups: int
) -> list[tuple[int | None, list[int]]]:
    """Those of a layer's rows that are certified, by group; None for a layer in one piece."""
    groups = row_slices(of_layer, row_groups)
    if len(groups) == 1:
        return [(None, list(rows))]
    found = [[row for row in rows if own.start <= row < own.stop] for own in groups]
    return [(group, own) for group, own in enumerate(found) if own]


def _pattern_of_rows(pattern: Pattern, kept: Tensor) -> Pattern:
    """The pattern for some rows of a layer, whose mask (bool ``[rows, d]``) follows it."""
    return PerLayer(keep=int(kept.sum())) if pattern.coupled else pattern


def _files(folder: Path, layer: str, group: int | None) -> tuple[Path, Path]:
    """Certificate file and problem file of a layer, or of a group of its rows."""
    safe = layer.replace(os.sep, "_")
    if group is not None:
        safe += f".group{group}"
    base = folder / FOLDER
    return base / f"{safe}.safetensors", base / f"{safe}.problem.safetensors"
