"""What making a model smaller did: the record and the model card."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..checkpoint import RECORD_FILE
from ..record import PackedMasks, mask_digest
from .choice import GroupResult, weakest
from .coupling import WORDS, Kind


@dataclass
class ShrinkReport:
    """Everything needed to repeat a run and to judge it.

    Attributes
    ----------
    settings, calibration, environment
        As of `mipprune.PruneReport`.
    counts
        By kind: groups in every block before and after.
    parameters_before, parameters_after
        Of the whole model, tied ones once.
    curves
        What each count costs, where a budget decided; see `mipprune.structured.budget.Curve`.
    latency
        Where the time of a pass was bound: what each count saves as it was measured, which decided,
        and the smaller model's time, measured afterwards (`mipprune.structured.latency`).
    layers
        One result per block and kind.
    masks
        Groups by the layer that reads them: bool ``[1, K]``, True = keep.
    difference
        Largest difference between a smaller block's outputs and those of the block with zeros, as
        a share of the largest output.
    """

    masks_file: ClassVar[str] = "groups.safetensors"

    settings: dict[str, Any]
    calibration: dict[str, Any]
    environment: dict[str, Any]
    counts: dict[Kind, tuple[int, int]]
    parameters_before: int
    parameters_after: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, Any] | None = None
    layers: list[GroupResult] = field(default_factory=list)
    masks: PackedMasks = field(default_factory=PackedMasks)
    difference: float = 0.0
    warnings: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, result: GroupResult, kept: Tensor) -> None:
        """Take in a finished layer."""
        self.layers.append(result)
        self.masks[result.name] = kept[None]

    @property
    def loss(self) -> float:
        """Summed loss of the groups removed, weights as they were."""
        return sum(one.loss for one in self.layers)

    @property
    def updated_loss(self) -> float:
        """Summed loss of the weights as they were written."""
        return sum(one.updated_loss for one in self.layers)

    @property
    def loss_wanda_sp(self) -> float:
        """Summed loss of Wanda-sp's choice on the same inputs."""
        return sum(one.loss_wanda_sp for one in self.layers)

    @property
    def gap(self) -> float | None:
        """Largest proven gap of a choice; None unless every choice has one."""
        gaps = [one.gap for one in self.layers if one.gap is not None]
        return max(gaps) if gaps and len(gaps) == len(self.layers) else None

    @property
    def evidence(self) -> str | None:
        """The weakest that `gap` rests on; None without a gap."""
        return None if self.gap is None else weakest(self.layers)

    @property
    def mask_hash(self) -> str:
        """SHA-256 over the kept groups of all readers."""
        return mask_digest(self.masks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, without the kept groups themselves and without times."""
        return {
            "format": 1,
            "kind": "shrink",
            "settings": self.settings,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "environment": {k: v for k, v in self.environment.items() if k != "time"},
            "counts": {kind: list(counts) for kind, counts in self.counts.items()},
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "curves": self.curves,
            "latency": self.latency,
            "loss": self.loss,
            "updated_loss": self.updated_loss,
            "loss_wanda_sp": self.loss_wanda_sp,
            "gap": self.gap,
            "evidence": self.evidence,
            "difference": self.difference,
            "mask_hash": self.mask_hash,
            "warnings": self.warnings,
            "layers": [one.to_dict() for one in self.layers],
        }

    def timings(self) -> dict[str, Any]:
        """JSON-ready times."""
        return {
            "time": self.environment.get("time"),
            "seconds": self.seconds,
            "layers": {one.name: one.seconds for one in self.layers},
        }


def smaller_card(record: dict[str, Any], evaluations: str) -> str:
    """The card of a smaller model, in Markdown with the hub's front matter.

    Parameters
    ----------
    record
        Of the run.
    evaluations
        A table in Markdown; empty if there are none.
    """
    settings = record["settings"]
    model = settings.get("model")
    head = ["---", "library_name: transformers", "tags:", "- pruning", "- structured-pruning"]
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        head.append(f"base_model: {model}")
    left = " and ".join(
        f"{after} of {before} {WORDS[kind]}" for kind, (before, after) in record["counts"].items()
    )
    share = 1 - record["parameters_after"] / record["parameters_before"]
    fitted = (
        " The weights that read what is left were fitted anew by least squares."
        if settings["update"] == "least_squares"
        else ""
    )
    gap = (
        f" No choice of so many groups loses less by more than {record['gap']:.2%}, in any block "
        f"(evidence: {record.get('evidence', 'not recorded')})."
        if record["gap"] is not None
        else ""
    )
    latency = settings.get("latency")
    asked = (
        f" A forward pass of {latency['batch']} x {latency['tokens']} tokens was to take at most "
        f"{latency['share']} of the large model's time on {record['environment']['device']}."
        if latency
        else ""
    )
    parts = [
        "\n".join([*head, "---"]),
        f"# {model or 'A language model'}, made smaller",
        f"Every block has {left} left: {record['parameters_after']:,} of "
        f"{record['parameters_before']:,} parameters, {share:.1%} fewer. What goes was chosen by "
        f"mipprune with `{settings['solver']}` on {record['calibration']['windows']} windows of "
        f"{record['calibration']['length']} tokens of {record['calibration']['source']}.{fitted}"
        f"{gap}{asked}",
        evaluations,
        "## Use",
        "The model is an ordinary one of its family, and loads like any other.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n```',
        f"`{ShrinkReport.masks_file}` holds which groups of the original are left, one bit each "
        f"(`mipprune.load_masks` reads that file), `{RECORD_FILE}` the record of the run with all "
        f"versions and hashes. Hash of the groups: `{record['mask_hash']}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
