"""A run's record made readable: the model card and the report, written beside the record."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solvers import InvalidInput, checker_folder
from solvers.files import replaced_on_success

from .checkpoint import MASKS_FILE, ORDER_FILE, RECORD_FILE, TIMINGS_FILE, write_json
from .layer_step import LayerStep
from .rules import Rules
from .surrogate import Surrogate

if TYPE_CHECKING:
    from .calibration import Windows
    from .evaluate import Perplexity, SideBySide

CARD_FILE = "README.md"
REPORT_FILE = "report.html"
RECIPE_FILE = "recipe.yaml"


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a pruned model's folder.

    Raises
    ------
    InvalidInput
        If there is none.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise InvalidInput(
            f"There is no {RECORD_FILE} in {folder}; it is no pruned model's folder."
        )
    record: dict[str, Any] = _json(path)
    if not isinstance(record, dict) or not {"settings", "layers"} <= record.keys():
        raise InvalidInput(f"{path} is not the record of a run.")
    return record


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON ({error}).") from error


def write_results(folder: Path, record: dict[str, Any]) -> None:
    """Write a record's card and recipe into its folder, and its report if there is one already.

    Card and recipe hold no times, so that they are the same for equal runs; the report does.
    """
    from .recipe import recipe_text

    texts = {CARD_FILE: _card(record)}
    if record.get("recipe"):
        texts[RECIPE_FILE] = recipe_text(record["recipe"])
    for name, text in texts.items():
        with replaced_on_success(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if (folder / REPORT_FILE).exists():
        write_report(folder, record)


def _card(record: dict[str, Any]) -> str:
    if record.get("kind") != "shrink":
        return model_card(record)
    from .structured.report import smaller_card

    return smaller_card(record, _evaluation_table(record.get("evaluations", [])))


def write_report(folder: Path, record: dict[str, Any]) -> None:
    """Write a record's HTML report into its folder, with times from `TIMINGS_FILE` if there.

    Raises
    ------
    InvalidInput
        If it is the record of a model made smaller, for which there is no such report.
    """
    from .html_report import html_report

    if record.get("kind") == "shrink":
        raise InvalidInput(
            f"{folder} holds a model made smaller, whose results are in its {CARD_FILE}; the "
            "report is for models with masks."
        )

    timings = folder / TIMINGS_FILE
    times = _json(timings) if timings.is_file() else {}
    with replaced_on_success(folder / REPORT_FILE) as temporary:
        temporary.write_text(html_report(record, times), encoding="utf-8")


def add_evaluation(folder: str | Path, evaluation: dict[str, Any]) -> None:
    """Put an evaluation into a folder's record, in place of an earlier one of the same kind."""
    folder = Path(folder)
    record = read_record(folder)
    kept = [one for one in record.get("evaluations", []) if _kind(one) != _kind(evaluation)]
    record["evaluations"] = [*kept, evaluation]
    write_json(folder / RECORD_FILE, record)
    write_results(folder, record)


def _kind(evaluation: dict[str, Any]) -> tuple[Any, ...]:
    against = evaluation.get("against") or {}
    tasks = evaluation.get("tasks") or {}
    return (
        *(evaluation.get(key) for key in ("text_sha256", "length", "stride")),
        against.get("model"),
        tuple(tasks.get("tasks", {})),
    )


def evaluation_record(
    model: str, windows: Windows, result: Perplexity | SideBySide, against: str | None = None
) -> dict[str, Any]:
    """An evaluation as it stands in the record, JSON-ready.

    Parameters
    ----------
    model, against
        Names of the models.
    windows
        What they were evaluated on.
    result
        Of one model, or of the model beside ``against``.
    """
    from .evaluate import Perplexity

    own = result if isinstance(result, Perplexity) else result.pruned
    record = {
        "model": model,
        "text": windows.source,
        "text_sha256": windows.digest,
        "method": own.method,
        **asdict(own),
    }
    if not isinstance(result, Perplexity):
        record["against"] = {
            "model": against,
            "perplexity": result.dense.perplexity,
            "nll": asdict(result.dense.nll),
            "nll_increase": asdict(result.nll_increase),
            "kl": asdict(result.kl),
            "agreement": asdict(result.agreement),
        }
    return record


@dataclass(frozen=True)
class LayerSum:
    """Layers of a record summed up; see `LayerResult` for the fields of one.

    Attributes
    ----------
    layers, weights
        How many.
    sparsity
        Share of the weights removed.
    loss, loss_start, loss_reference
        Sums; the start's is None unless every layer has one.
    relative_error
        Summed loss over summed output energy.
    gap
        Summed certified loss minus bound, over that loss; None if no layer is certified.
    bounded
        Whether a certified layer has a bound that says something.
    """

    layers: int
    weights: int
    sparsity: float
    loss: float
    loss_start: float | None
    loss_reference: float
    relative_error: float
    gap: float | None
    bounded: bool = False

    @property
    def gap_text(self) -> str:
        """The gap, for people."""
        if self.gap is None:
            return "–"
        return f"{self.gap:.2%}" if self.bounded else "no bound"


def summed(layers: Sequence[dict[str, Any]]) -> LayerSum:
    """Sum over layers of a record."""
    sizes = [layer["rows"] * layer["inputs"] for layer in layers]
    removed = sum(layer["sparsity"] * size for layer, size in zip(layers, sizes, strict=True))
    loss = sum(layer["loss"] for layer in layers)
    starts = [layer["loss_start"] for layer in layers if layer["loss_start"] is not None]
    errors = [layer["relative_error"] for layer in layers]
    energy = sum(
        layer["loss"] / error for layer, error in zip(layers, errors, strict=True) if error
    )
    certified = [layer["certificate"] for layer in layers if layer.get("certificate")]
    proven = sum(one["loss"] for one in certified)
    known = [one for one in certified if not is_unbounded(one)]
    return LayerSum(
        layers=len(layers),
        weights=sum(sizes),
        sparsity=removed / sum(sizes),
        loss=loss,
        loss_start=sum(starts) if len(starts) == len(layers) else None,
        loss_reference=sum(layer["loss_reference"] for layer in layers),
        relative_error=loss / energy if energy else 0.0,
        gap=(proven - sum(one["bound"] for one in certified)) / abs(proven) if proven else None,
        bounded=len(known) > 0,
    )


def is_unbounded(certificate: dict[str, Any]) -> bool:
    """Whether a certificate says nothing: a plain loss is above zero without it."""
    plain = not any(one["linear"] for one in certificate.get("digests", []))
    gap = math.inf if certificate["gap"] is None else certificate["gap"]
    return bool(plain and certificate["bound"] <= 0 < gap)


def gap_text(certificate: dict[str, Any]) -> str:
    """A layer's certified gap, for people."""
    if is_unbounded(certificate) or certificate["gap"] is None:
        return "no bound"
    return f"{certificate['gap']:.2%}"


def certified_text(record: dict[str, Any]) -> str:
    """How much of a model is certified, and between which gaps; empty if nothing is."""
    layers = record["layers"]
    found = [layer["certificate"] for layer in layers if layer.get("certificate")]
    if not found:
        return ""
    gaps = [math.inf if one["gap"] is None else one["gap"] for one in found]
    coverage = checker_folder.coverage_text(
        len(found),
        len(layers),
        sum(len(one["rows"]) for one in found),
        sum(layer["rows"] for layer in layers),
    )
    about = checker_folder.gaps_text(gaps, sum(map(is_unbounded, found)))
    unproven = (record.get("certificate") or {}).get("not_proven", checker_folder.NOT_PROVEN)
    return f"Certified: {coverage}; gaps of layers: {about}. {unproven}"


def by_kind(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The record's layers by their name after the block's number, experts together."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        kinds.setdefault(place(record, layer["name"])[1], []).append(layer)
    return kinds


def place(record: dict[str, Any], name: str) -> tuple[str, str]:
    """Number of a layer's block, and its kind: the rest of the name, numbers as ``*``."""
    block, _, rest = name.removeprefix(f"{record['settings']['blocks']}.").partition(".")
    return block, re.sub(r"(?<=\.)\d+(?=\.|$)|(?<=\[)\d+(?=\])", "*", rest)


def pattern_text(record: dict[str, Any]) -> str:
    """The patterns of a run, for people."""
    rules = Rules.of_settings(record["settings"])
    allocation = record["settings"].get("allocation")
    if allocation is not None:
        shared = allocation["method"].replace("_", " ")
        return f"{rules.default} on average, allocated to layers by {shared}"
    others = len(rules.rules) + len(rules.ignore) + len(rules.only)
    return f"{rules.default}" + (", with rules by layer" if others else "")


_GAP = (
    " Gap: no mask of the pattern has a loss lower than this one's by more than this share, on the "
    "rows that were certified."
)


def model_card(record: dict[str, Any]) -> str:
    """The card of a pruned model, in Markdown with the hub's front matter."""
    settings = record["settings"]
    model = settings.get("model")
    head = ["---", "library_name: transformers", "tags:", "- pruning", "- sparsity"]
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        head.append(f"base_model: {model}")
    start = f" from {settings['start']}" if settings.get("start") else ""
    everything = summed(record["layers"])
    share = record["coverage"]["share"]
    parts = [
        "\n".join([*head, "---"]),
        f"# {model or 'A language model'}, pruned",
        f"{record['sparsity']:.1%} of the weights in the blocks' linear layers are zero "
        f"({pattern_text(record)}; {share:.0%} of the blocks' weights are in such layers). "
        f"The masks were chosen by mipprune with the solver `{settings['solver']}`{start} on "
        f"{record['calibration']['windows']} windows of {record['calibration']['length']} tokens "
        f"of {record['calibration']['source']}.{_method_text(settings)}",
        _order_text(record),
        _evaluation_table(record.get("evaluations", [])),
        "## Layers",
        "Loss: squared change of a layer's output per token on the calibration text."
        + (_GAP if everything.gap is not None else ""),
        _layer_table({**by_kind(record), "all": record["layers"]}, everything.gap is not None),
        certified_text(record),
        "## Use",
        "Weights are stored dense, with zeros: the model loads like any other, and is neither "
        "smaller nor faster by itself.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n```',
        f"`{MASKS_FILE}` holds the masks, one bit per weight (`mipprune.load_masks`; "
        f"`mipprune.keep_zeros` holds them through fine-tuning), `{RECORD_FILE}` the record of the "
        f"run with all versions and hashes; `mipprune report` shows it to people. "
        f"Hash of the masks: `{record['mask_hash']}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_UPDATES = {
    "gain": "kept weights were scaled, row by row, so that outputs keep their size",
    "least_squares": "kept weights were fitted anew by least squares",
    "sparsegpt": "kept weights were corrected as SparseGPT does",
}


def _method_text(settings: dict[str, Any]) -> str:
    """What else was done than to choose masks by the plain layer loss, in a sentence."""
    said = []
    if settings.get("allocation"):
        method = settings["allocation"]["method"]
        said.append(f"the sparsity was shared out among the layers ({method})")
    if "layer_step" in settings:
        step, plain = LayerStep.from_dict(settings["layer_step"]), asdict(Surrogate())
        differing = [
            f"{name} {value}"
            for name, value in asdict(step.surrogate).items()
            if value != plain[name]
        ]
        if differing:
            said.append(f"layers were judged with {', '.join(differing)}")
        if step.update in _UPDATES:
            said.append(_UPDATES[step.update])
        if step.bias != "none":
            said.append("biases make up for the mean of what was removed")
    if settings.get("grams", "pruned") != "pruned":
        said.append(f"inputs were {settings['grams']}")
    return f" Besides, {'; '.join(said)}." if said else ""


def _order_text(record: dict[str, Any]) -> str:
    """What was reordered, in a sentence."""
    order = record.get("order")
    if order is None:
        return ""
    shares = [
        lost / order["lost_as_given"][name] if order["lost_as_given"][name] else 1.0
        for name, lost in order["lost"].items()
    ]
    return (
        f"Before that, inputs ({record['settings']['permute']}) were put in an order in which "
        f"masks of the pattern lose {sum(shares) / len(shares):.0%} of the saliency that they "
        "would, on average; the dense model computes the same in it. "
        f"`{ORDER_FILE}` holds that order (`mipprune.apply_order` puts the dense model in it; "
        f"SHA-256 `{order['sha256']}`)."
    )


def _layer_table(kinds: dict[str, list[dict[str, Any]]], certified: bool) -> str:
    rows = [
        ["layer", "weights removed", "loss", "/ wanda", "/ output"] + ["gap"] * certified,
        ["---"] + ["---:"] * (4 + certified),
    ]
    for kind, layers in kinds.items():
        total = summed(layers)
        ratio = f"{total.loss / total.loss_reference:.3f}" if total.loss_reference else "–"
        cells = [kind, f"{total.sparsity:.1%}", f"{total.loss:.4g}", ratio]
        cells.append(f"{total.relative_error:.2%}")
        if certified:
            cells.append(total.gap_text)
        rows.append(cells)
    return _markdown(rows)


def _evaluation_table(evaluations: Sequence[dict[str, Any]]) -> str:
    rows = [["measure", "on", "dense", "pruned"], ["---", "---", "---:", "---:"]]
    for one in evaluations:
        against = one.get("against") or {}
        if "perplexity" in one:
            where = f"{one['text']}, {one['method']}"
            dense = f"{against['perplexity']:.3f}" if against else "–"
            rows.append(["perplexity", where, dense, f"{one['perplexity']:.3f}"])
            if against:
                rows.append(["KL(dense ‖ pruned), nats", where, "", with_error(against["kl"], 4)])
                agreement = with_error(against["agreement"], 2, percent=True)
                rows.append(["same top token", where, "", agreement])
        dense_tasks = (against.get("tasks") or {}).get("tasks", {})
        for task, result in (one.get("tasks") or {}).get("tasks", {}).items():
            for metric, value in result["metrics"].items():
                if metric.endswith("_stderr"):
                    continue
                dense = dense_tasks.get(task, {}).get("metrics", {}).get(metric)
                where = f"{task}, {result['shots']} shots"
                rows.append(
                    [metric, where, "–" if dense is None else f"{dense:.4f}", f"{value:.4f}"]
                )
    return _markdown(rows) if len(rows) > 2 else ""


def with_error(estimate: dict[str, Any], digits: int, percent: bool = False) -> str:
    """An `Estimate` as it is stored, with its standard error."""
    scale, unit = (100, " %") if percent else (1, "")
    error = estimate["standard_error"]
    margin = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * estimate['mean']:.{digits}f}{margin}{unit}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
