"""The main job on the embedded model: several ways to choose masks, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from solvers import NM, MaskProblem, Pattern, PerRow, solve
from solvers.solution import relative_gap

from .calibration import cut_windows, read_texts
from .checkpoint import write_json
from .embedded import MODEL_NAME
from .environment import model_environment
from .evaluate import perplexity
from .models import load_model
from .observer import Observer
from .prune import layer_problem, prune
from .report import demo_plot

WINDOW = 256
"""Tokens per window: what the embedded model was trained on."""

CERTIFIED_LAYER = "model.layers.0.self_attn.q_proj"
CERTIFIED_ROWS = [17, 80, 143, 206]

PATTERNS: dict[str, Pattern] = {"60 % per row": PerRow(sparsity=0.6), "2:4": NM(keep=2, group=4)}
METHODS: dict[str, tuple[str, str | None]] = {
    "magnitude": ("magnitude", None),
    "wanda": ("wanda", None),
    "ria": ("ria", None),
    "wanda + swap": ("swap", "wanda"),
}


@dataclass(frozen=True)
class DemoRow:
    """One line of the comparison.

    Attributes
    ----------
    pattern, method
        "dense" and "–" for the unpruned model.
    relative_loss
        Summed layer loss over that of Wanda's masks on the same problems.
    loss_reduction
        By the solver, against its own start; None without a start.
    perplexity
        On evaluation text.
    seconds
        Of the whole pruning run.
    mask_hash
        Of all masks.
    certified_gap
        How far the masks of `CERTIFIED_ROWS` rows of `CERTIFIED_LAYER` can be from the best
        ones, at most: mean of ``(loss - bound) / loss``.
    evidence
        What the bounds in it rest on: "certified", "guarded" or "claimed".
    """

    pattern: str
    method: str
    relative_loss: float | None
    loss_reduction: float | None
    perplexity: float
    seconds: float | None
    mask_hash: str | None
    certified_gap: float | None
    evidence: str | None


def run_demo(
    out: str | Path,
    *,
    samples: int = 128,
    seed: int = 0,
    row_seconds: float = 8.0,
    observer: Callable[[str], Observer] | None = None,
) -> list[DemoRow]:
    """Prune the embedded model in every way, write ``demo.json`` and ``demo.png`` into ``out``.

    Parameters
    ----------
    out
        Folder for the two files.
    samples
        Windows of `WINDOW` tokens, as many to calibrate as to evaluate.
    seed
        Of the windows.
    row_seconds
        Most seconds to bound a row.
    observer
        Given a title, the observer of that run.
    """
    device = torch.device("cpu")
    loaded = load_model(MODEL_NAME, device)
    sides: dict[str, Any] = {}
    for side in ("calibration", "evaluation"):
        source, texts = read_texts(None, side)
        sides[side] = cut_windows(texts, source, loaded.tokenizer, WINDOW, samples, seed)
    dense = perplexity(loaded.model, sides["evaluation"])
    rows = [DemoRow("dense", "–", None, None, dense.perplexity, None, None, None, None)]
    # Block 0 sees the same inputs whatever is pruned, so one bound serves all methods.
    layer = layer_problem(
        loaded.model, loaded.tokenizer, sides["calibration"], CERTIFIED_LAYER, samples=samples
    )
    for pattern_name, pattern in PATTERNS.items():
        sample = MaskProblem(layer.weight, layer.gram, pattern, copy=False).rows(CERTIFIED_ROWS)
        bounded = solve(sample, "semidefinite", row_seconds=row_seconds)
        assert bounded.bound is not None
        assert bounded.evidence is not None
        for method, (solver, start) in METHODS.items():
            loaded = load_model(MODEL_NAME, device)
            report = prune(
                loaded.model,
                loaded.tokenizer,
                sides["calibration"],
                pattern,
                solver,
                start,
                samples=samples,
                seqlen=WINDOW,
                seed=seed,
                observer=observer(f"{pattern_name}, {method}") if observer else None,
            )
            start_loss = report.loss_start
            losses = sample.objective(report.masks[CERTIFIED_LAYER][CERTIFIED_ROWS])
            rows.append(
                DemoRow(
                    pattern=pattern_name,
                    method=method,
                    relative_loss=report.loss / report.loss_reference,
                    loss_reduction=None if start_loss is None else 1 - report.loss / start_loss,
                    perplexity=perplexity(loaded.model, sides["evaluation"]).perplexity,
                    seconds=report.seconds,
                    mask_hash=report.mask_hash,
                    certified_gap=float(relative_gap(losses, bounded.bound, bounded.scale).mean()),
                    evidence=bounded.evidence.label,
                )
            )
    record = {
        "model": MODEL_NAME,
        "windows": samples,
        "window": WINDOW,
        "seed": seed,
        "calibration_sha256": sides["calibration"].digest,
        "evaluation_sha256": sides["evaluation"].digest,
        "environment": model_environment(loaded.model),
        "rows": [asdict(row) for row in rows],
    }
    write_json(Path(out) / "demo.json", record)
    demo_plot(rows, Path(out) / "demo.png")
    return rows
