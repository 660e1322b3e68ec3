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
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers import InvalidInput, MaskProblem, Pattern, PerLayer, solve
from solvers.certificate import Verified, check, load_certificates, save_certificates
from solvers.clock import Clock
from solvers.semidefinite.layer import fitted_price

from .calibration import Windows, calibration_windows
from .checkpoint import ORDER_FILE, RECORD_FILE, load_masks, load_order, write_json
from .choice import step_chosen
from .held_out import split_windows
from .layer_step import LayerStep
from .models import LoadedModel, load_model, resolve_device
from .observer import Observer
from .permute import apply_orders, as_orders
from .placement import Placement
from .record import order_digest
from .results import read_record, write_results
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
    gap, gap_margin
        ``(loss - bound) / |loss|``, and the half width of its 95 % confidence interval for the
        whole layer (ratio estimate; 0 for all rows, None for a single one).
    mean_row_gap, margin
        Mean of the rows' gaps, and the half width of its 95 % confidence interval for the whole
        layer (Student's t with finite population; 0 for all rows, None for a single one).
    price
        Of a pruned weight, where the rows share a budget; it is found on other rows than these.
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
    if record.get("kind") == "shrink":
        raise InvalidInput(
            f"{folder} holds a model made smaller, without masks to certify; its record has the "
            "gap of a solver that proves one (mipprune shrink --solver branch_and_bound)."
        )
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
            result = _certify_layer(folder, layer.name, problems, mask, chosen, row_seconds, seed)
            results.append(result)
            recorded[layer.name]["certificate"] = asdict(result)
            new = aim.updated(mask.to(layer.weight.device))
            step.prune(layer, mask, new, aim.new_bias(new, layer.bias))
    record["certificate"] = {"rows": rows, "row_seconds": row_seconds, "seed": seed}
    write_json(folder / RECORD_FILE, record)
    write_results(folder, record)
    return results


def check_folder(folder: str | Path) -> dict[str, tuple[int, float]]:
    """Verify all certificates of a folder from its files alone.

    Returns
    -------
    dict
        By layer: rows verified, and the gap proven for their summed loss.

    Raises
    ------
    InvalidInput
        If there are none, or one of them does not prove what it claims; it names the layer.
    """
    folder = Path(folder)
    record = read_record(folder)
    patterns = _patterns(record)
    certified = [layer for layer in record["layers"] if "certificate" in layer]
    if not certified:
        raise InvalidInput(f"{folder} has no certificates; make them with mipprune certify.")
    masks = load_masks(folder)
    row_groups = _layer_step(record["settings"]).surrogate.row_groups
    verified = {}
    for layer in certified:
        name, claimed = layer["name"], layer["certificate"]
        rows: list[Verified] = []
        try:
            violation = patterns[name].violation(masks[name])
            if violation is not None:
                raise InvalidInput(f"The mask does not follow the pattern: {violation}.")
            for group, of_group in _rows_by_group(claimed["rows"], len(masks[name]), row_groups):
                certificates_file, problem_file = _files(folder, name, group)
                certificates = load_certificates(certificates_file)
                part = _pattern_of_rows(patterns[name], masks[name][of_group])
                rows += check(MaskProblem.load(problem_file, part), certificates)
                for certificate, row in zip(certificates, of_group, strict=True):
                    if not np.array_equal(certificate.mask, masks[name][row].numpy()):
                        raise InvalidInput("a certified mask is not the model's.")
        except InvalidInput as error:
            raise InvalidInput(f"Layer {name}: {error}") from error
        loss, bound = sum(row.objective for row in rows), sum(row.bound for row in rows)
        if bound < claimed["bound"] - 1e-6 * abs(claimed["bound"]):
            raise InvalidInput(
                f"Layer {name}: the record claims the bound {claimed['bound']:.6g}, "
                f"but its certificates prove {bound:.6g}."
            )
        verified[name] = (len(rows), (loss - bound) / abs(loss) if loss else 0.0)
    return verified


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


def _certify_layer(
    folder: Path,
    name: str,
    problems: Sequence[MaskProblem],
    mask: Tensor,
    chosen: list[int],
    row_seconds: float,
    seed: int,
) -> LayerCertificate:
    """Bound some rows of a layer's groups, write their certificates, and sum up."""
    verified: list[Verified] = []
    price = None
    groups = row_slices(len(mask), len(problems))
    for group, of_group in _rows_by_group(chosen, len(mask), len(problems)):
        own = groups[group or 0]
        files = _files(folder, name, group)
        rows = [row - own.start for row in of_group]
        checked, price = _certify_rows(
            files, problems[group or 0], mask[own], rows, row_seconds, seed
        )
        verified += checked
    loss, bound = sum(row.objective for row in verified), sum(row.bound for row in verified)
    gaps = torch.tensor([row.gap for row in verified], dtype=torch.float64)
    losses = torch.tensor([row.objective for row in verified], dtype=torch.float64)
    bounds = torch.tensor([row.bound for row in verified], dtype=torch.float64)
    gap = (loss - bound) / abs(loss) if loss else 0.0
    unexplained = (losses - bounds - gap * losses) / losses.mean() if loss else 0.0 * losses
    return LayerCertificate(
        name=name,
        rows=chosen,
        loss=loss,
        bound=bound,
        gap=gap,
        gap_margin=_margin(unexplained, len(mask)),
        mean_row_gap=float(gaps.mean()),
        margin=_margin(gaps, len(mask)),
        price=price,
    )


def _certify_rows(
    files: tuple[Path, Path],
    problem: MaskProblem,
    mask: Tensor,
    chosen: list[int],
    row_seconds: float,
    seed: int,
) -> tuple[list[Verified], float | None]:
    """Bound some rows of one problem and write their certificates; also the price of a budget."""
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
    verified = check(part, certificates)
    certificates_file, problem_file = files
    part.save(problem_file)
    save_certificates(certificates_file, certificates)
    return verified, price


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


def _margin(gaps: Tensor, population: int) -> float | None:
    """Half width of the 95 % confidence interval of the mean over the whole population."""
    n = len(gaps)
    if n == population:
        return 0.0
    if n == 1:
        return None
    from scipy.stats import t

    error = float(gaps.std()) / math.sqrt(n) * math.sqrt(1 - n / population)
    return float(t.ppf(0.975, n - 1)) * error


def _files(folder: Path, layer: str, group: int | None) -> tuple[Path, Path]:
    """Certificate file and problem file of a layer, or of a group of its rows."""
    safe = layer.replace(os.sep, "_")
    if group is not None:
        safe += f".group{group}"
    base = folder / FOLDER
    return base / f"{safe}.safetensors", base / f"{safe}.problem.safetensors"
