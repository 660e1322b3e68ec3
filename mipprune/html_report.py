"""The record of a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from .results import (
    certified_text,
    gap_text,
    pattern_text,
    place,
    summed,
    with_error,
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2128; background: #fff;
       max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0 .8rem; color: #4a5460; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #d7dce2; border-radius: 6px; padding: .6rem .9rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.tile span { color: #4a5460; font-size: .85rem; }
.scroll { overflow: auto; max-height: 42rem; width: fit-content; max-width: 100%;
          border: 1px solid #d7dce2; border-radius: 6px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
table.results td:first-child { white-space: normal; min-width: 14rem; }
thead th { position: sticky; top: 0; background: #f3f5f7; border-bottom: 1px solid #d7dce2; }
tbody tr:nth-child(even) td { background: #fafbfc; }
table.heat td { text-align: center; min-width: 3.6rem; border: 1px solid #fff; }
table.heat th { background: #fff; position: static; border: 0; font-weight: 500; }
table.text td { text-align: left; white-space: normal; vertical-align: top; }
.legend { display: flex; align-items: center; gap: .5rem; font-size: .85rem; margin: .5rem 0; }
.legend i { width: 12rem; height: .8rem; display: inline-block; }
ul { padding-left: 1.2rem; }
"""

_LIGHT, _DARK = (247, 251, 255), (8, 48, 107)
"""Ends of the colour scale."""


def html_report(record: dict[str, Any], times: dict[str, Any] | None = None) -> str:
    """A page with key figures, heat maps, all layers, evaluations and settings.

    Parameters
    ----------
    record
        As `mipprune.json` has it.
    times
        "time" (when the run was), "seconds" (of it) and "layers" (seconds of each one's solver),
        where the record itself does not have them.

    Returns
    -------
    str
        HTML that refers to nothing outside; its own policy forbids any request.
    """
    times = {
        "time": record["environment"].get("time"),
        "seconds": record.get("seconds"),
        "layers": {layer["name"]: layer.get("seconds") for layer in record["layers"]},
        **(times or {}),
    }
    title = f"{record['settings'].get('model') or 'A language model'}, pruned"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_subtitle(record, times))}</p>",
        _tiles(record, times),
        _notes(record),
        _evaluations(record.get("evaluations", [])),
        _heat_map(
            record,
            "Relative error by block and layer",
            "Squared change of a layer's output as a share of the output's mean square, on the "
            "calibration text.",
            lambda layers: summed(layers).relative_error,
        ),
        _heat_map(
            record,
            "Certified gap by block and layer",
            "No mask of the pattern has a loss lower by more than this share, on the rows that "
            "were certified.",
            lambda layers: summed(layers).gap if summed(layers).bounded else None,
        ),
        f"<p>{escape(certified_text(record))}</p>" if certified_text(record) else "",
        _layers(record, times),
        _settings(record),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _subtitle(record: dict[str, Any], times: dict[str, Any]) -> str:
    settings, text = record["settings"], record["calibration"]
    start = f" from {settings['start']}" if settings.get("start") else ""
    return (
        f"{pattern_text(record)}; {settings['solver']}{start}; calibrated on {text['windows']} "
        f"windows of {text['length']} tokens of {text['source']}"
        + (f"; {times['time']}" if times["time"] else "")
    )


def _tiles(record: dict[str, Any], times: dict[str, Any]) -> str:
    total = summed(record["layers"])
    tiles = [
        (f"{record['sparsity']:.1%}", f"of {record['coverage']['prunable']:,} weights removed"),
        (f"{total.relative_error:.2%}", "of the layers' output lost"),
    ]
    if total.loss_reference:
        tiles.append((f"{total.loss / total.loss_reference:.3f}", "layer loss / wanda"))
    for one in record.get("evaluations", []):
        if "perplexity" not in one:
            continue
        against = one.get("against")
        dense = f" (dense {against['perplexity']:.3f})" if against else ""
        tiles.append((f"{one['perplexity']:.3f}", f"perplexity{dense}"))
        if against:
            tiles.append((f"{against['kl']['mean']:.4f}", "KL(dense ‖ pruned), nats"))
            tiles.append((f"{against['agreement']['mean']:.1%}", "same top token"))
        break
    if total.gap is not None:
        tiles.append((total.gap_text, "gap at most, certified"))
    if times["seconds"]:
        tiles.append((_duration(times["seconds"]), "for the run"))
    inner = "".join(
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(label)}</span></div>'
        for figure, label in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _notes(record: dict[str, Any]) -> str:
    notes = list(record.get("warnings", []))
    dead = [layer for layer in record["layers"] if layer["dead_inputs"]]
    if dead:
        inputs = sum(layer["dead_inputs"] for layer in dead)
        notes.append(f"{inputs} inputs of {len(dead)} layers were always zero.")
    if not notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _evaluations(evaluations: Sequence[dict[str, Any]]) -> str:
    texts, tasks = [], []
    for one in evaluations:
        against = one.get("against") or {}
        if "perplexity" in one:
            error = one["nll"]["standard_error"]
            spread = "" if error is None else f" ± {one['perplexity'] * error:.3f}"
            texts.append(
                [
                    f"{one['text']}, {one['method']}",
                    f"{against['perplexity']:.3f}" if against else "–",
                    f"{one['perplexity']:.3f}{spread}",
                    with_error(against["nll_increase"], 4) if against else "–",
                    with_error(against["kl"], 4) if against else "–",
                    with_error(against["agreement"], 2, percent=True) if against else "–",
                ]
            )
        dense = (against.get("tasks") or {}).get("tasks", {})
        for task, result in (one.get("tasks") or {}).get("tasks", {}).items():
            for metric, value in result["metrics"].items():
                if metric.endswith("_stderr"):
                    continue
                error = result["metrics"].get(f"{metric}_stderr")
                of_dense = dense.get(task, {}).get("metrics", {}).get(metric)
                tasks.append(
                    [
                        task,
                        metric,
                        str(result["questions"] if result["questions"] is not None else "–"),
                        "–" if of_dense is None else f"{of_dense:.4f}",
                        f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"),
                    ]
                )
    parts = []
    if texts:
        parts.append(
            "<h2>Perplexity</h2><p>± is the standard error over windows; the increase is of the "
            "mean negative log-likelihood, over the same windows of both models.</p>"
            + _table(
                ["text", "dense", "pruned", "increase, nats", "KL, nats", "same top token"],
                texts,
                "results",
            )
        )
    if tasks:
        parts.append(
            "<h2>Tasks</h2>" + _table(["task", "metric", "questions", "dense", "pruned"], tasks)
        )
    return "".join(parts)


def _heat_map(
    record: dict[str, Any],
    title: str,
    about: str,
    value: Callable[[list[dict[str, Any]]], float | None],
) -> str:
    """A table of blocks by kinds, coloured from zero to the largest value."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in record["layers"]:
        cells.setdefault(place(record, layer["name"]), []).append(layer)
    blocks = list(dict.fromkeys(block for block, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    values = {at: value(layers) for at, layers in cells.items()}
    known = [one for one in values.values() if one is not None]
    if not known:
        return ""
    top = max(known)
    rows = []
    for block in blocks:
        row = [f"<th>{escape(block)}</th>"]
        for kind in kinds:
            one = values.get((block, kind))
            if one is None:
                row.append("<td></td>")
                continue
            share = one / top if top > 0 else 0.0
            ink = "#fff" if share > 0.55 else "#1c2128"
            tip = escape(f"block {block}, {kind}: {one:.3%}")
            row.append(
                f'<td title="{tip}" style="background:{_colour(share)};color:{ink}">{one:.1%}</td>'
            )
        rows.append(f"<tr>{''.join(row)}</tr>")
    header = "".join(f"<th>{escape(kind)}</th>" for kind in kinds)
    legend = f"linear-gradient(to right, {_colour(0)}, {_colour(1)})"
    return (
        f"<h2>{escape(title)}</h2><p>{escape(about)}</p>"
        f'<div class="scroll"><table class="heat"><thead><tr><th>block</th>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<div class="legend">0 % <i style="background:{legend}"></i> {top:.1%}</div>'
    )


def _colour(share: float) -> str:
    mixed = (round(a + share * (b - a)) for a, b in zip(_LIGHT, _DARK, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _layers(record: dict[str, Any], times: dict[str, Any]) -> str:
    rows = []
    apart = record["settings"].get("held_out") is not None
    for layer in record["layers"]:
        start, reference = layer["loss_start"], layer["loss_reference"]
        certificate, seconds = layer.get("certificate"), times["layers"].get(layer["name"])
        rows.append(
            [
                layer["name"],
                f"{layer['rows']} × {layer['inputs']}",
                f"{layer['tokens']:,}",
                f"{layer['sparsity']:.1%}",
                f"{layer['loss']:.4g}",
                f"{layer['loss'] / start:.3f}" if start else "–",
                f"{layer['loss'] / reference:.3f}" if reference else "–",
                f"{layer['relative_error']:.2%}",
                *(_held_out(layer) if apart else []),
                gap_text(certificate) if certificate else "–",
                layer["status"].lower().replace("_", " "),
                "–" if seconds is None else f"{seconds:.2f}",
                layer["note"],
            ]
        )
    names = ["layer", "size", "tokens", "removed", "loss", "/ start", "/ wanda", "/ output"]
    names += ["held out", "/ own", "chosen"] if apart else []
    return "<h2>Layers</h2>" + _table([*names, "gap", "status", "s", "note"], rows)


def _held_out(layer: dict[str, Any]) -> list[str]:
    """What a layer loses on held-out windows, that over its own loss, and what was chosen by it."""
    loss, own, choice = (
        layer.get(key) for key in ("held_out_updated_loss", "updated_loss", "choice")
    )
    return [
        "–" if loss is None else f"{loss:.4g}",
        "–" if loss is None or not own else f"{loss / own:.3f}",
        "–" if choice is None else f"{choice['option']} {choice['value']}",
    ]


def _settings(record: dict[str, Any]) -> str:
    parts = []
    for title in ("settings", "calibration", "environment"):
        rows = [[key, _plain(value)] for key, value in record[title].items()]
        parts.append(f"<h2>{title.capitalize()}</h2>" + _table(["", ""], rows, "text"))
    hashed = f"<p>Hash of the masks: {escape(record['mask_hash'])}</p>"
    return "".join(parts) + hashed


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    header = "".join(f"<th>{escape(name)}</th>" for name in names)
    head = f"<thead><tr>{header}</tr></thead>" if any(names) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    attribute = f' class="{kind}"' if kind else ""
    return f'<div class="scroll"><table{attribute}>{head}<tbody>{body}</tbody></table></div>'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
