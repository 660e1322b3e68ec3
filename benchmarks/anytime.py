"""Gap against time for every solver that gives bounds.

Each solves the same problems under limits from 0.1 s to 60 s; its gap is that of its own mask to
its own bound. More time must never give a worse gap, and no solver may end worse than the plain
relaxation (`frank_wolfe`) with the same limit; if one does, this says so and fails.

Problems are the first rows and inputs of the layers in a folder, or random ones where no folder is
given.

    python benchmarks/anytime.py
    python benchmarks/anytime.py --layers DIR --limits 0.1 1 10
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, draw, write
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from solvers import NM, InvalidInput, MaskProblem, MaskSolution, Pattern, PerRow, solve

SOLVERS = ("frank_wolfe", "semidefinite", "branch_and_bound", "scip", "cvxpy")
LIMITS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0)
SHAPES: dict[str, tuple[int, int, Pattern]] = {
    "24 x 96, 60 %": (24, 96, PerRow(sparsity=0.6)),
    "4 x 384, 60 %": (4, 384, PerRow(sparsity=0.6)),
    "24 x 96, 2:4": (24, 96, NM(2, 4)),
}
NOISE = 1e-6
"""Relative: gaps that differ by less are equal."""

CUT = 1e-3
"""The same where the relaxation itself was cut by its limit: it then ends at whatever iteration the
machine had reached, a few more or less in every run."""


def random_layer(rows: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and a Gram matrix with the decaying spectrum that layers have."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=random)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=random, dtype=torch.float64)).Q
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -1.0
    return weight, (basis * spectrum) @ basis.T


def problems(layers: Path | None) -> Iterator[tuple[str, MaskProblem]]:
    """What is solved, by name: every shape of every layer that is large enough."""
    for shape, (rows, inputs, pattern) in SHAPES.items():
        if layers is None:
            yield f"random, {shape}", MaskProblem(*random_layer(rows, inputs), pattern)
            continue
        for path in sorted(layers.glob("*.safetensors")):
            whole = MaskProblem.load(path, PerRow(sparsity=0.6))
            if whole.shape[0] >= rows and whole.shape[1] >= inputs:
                weight, gram = whole.weight[:rows, :inputs], whole.gram[:inputs, :inputs]
                yield f"{path.stem}, {shape}", MaskProblem(weight, gram, pattern)


def gaps_of(solution: MaskSolution) -> list[float]:
    assert solution.gap is not None
    return [float(gap) for gap in solution.gap]


def run(name: str, problem: MaskProblem, solver: str, limit: float) -> dict[str, Any]:
    """One solver with one limit."""
    began = time.perf_counter()
    solution = solve(problem, solver, time_limit=limit)
    seconds = time.perf_counter() - began
    gaps = gaps_of(solution)
    assert solution.evidence is not None
    return {
        "problem": name,
        "solver": solver,
        "limit": limit,
        "seconds": seconds,
        "share": seconds / limit,
        "mean_gap": sum(gaps) / len(gaps),
        "worst_gap": max(gaps),
        "gaps": gaps,
        "evidence": solution.evidence.name.lower(),
        "status": solution.status.name,
    }


def violations(runs: list[dict[str, Any]]) -> list[str]:
    """Sentences about gaps that are worse than with less time, or than the relaxation's."""
    found = []
    by_key = {(r["problem"], r["solver"], r["limit"]): r for r in runs}
    for at in runs:
        others = {
            f"at {limit:g} s": other
            for (problem, solver, limit), other in by_key.items()
            if (problem, solver) == (at["problem"], at["solver"]) and limit < at["limit"]
        }
        relaxation = by_key.get((at["problem"], "frank_wolfe", at["limit"]))
        if relaxation is not None:
            others["of frank_wolfe"] = relaxation
        for whose, other in others.items():
            for measure in ("mean_gap", "worst_gap"):
                cut = whose == "of frank_wolfe" and other["status"] == "TIME_LIMIT"
                noise = CUT if cut else NOISE
                if at[measure] > other[measure] + noise * max(1.0, abs(other[measure])):
                    found.append(
                        f"{at['problem']}: {at['solver']} at {at['limit']:g} s has a "
                        f"{measure.replace('_', ' ')} of {at[measure]:.4%}, worse than "
                        f"{other[measure]:.4%} {whose}"
                    )
    return found


def show(runs: list[dict[str, Any]]) -> None:
    """A table per problem: mean and worst gap by solver and limit."""
    console = Console(width=150)
    limits = sorted({r["limit"] for r in runs})
    for problem in dict.fromkeys(r["problem"] for r in runs):
        table = Table(title=f"{problem}: mean gap (worst), seconds / limit")
        table.add_column("solver")
        table.add_column("evidence")
        for limit in limits:
            table.add_column(f"{limit:g} s", justify="right")
        for solver in SOLVERS:
            some = {r["limit"]: r for r in runs if (r["problem"], r["solver"]) == (problem, solver)}
            if some:
                cells = [
                    f"{r['mean_gap']:.2%} ({r['worst_gap']:.2%}), {r['share']:.2f}"
                    if (r := some.get(limit))
                    else ""
                    for limit in limits
                ]
                evidence = ", ".join(dict.fromkeys(r["evidence"] for r in some.values()))
                table.add_row(solver, evidence, *cells)
        console.print(table)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Mean gap by limit for every solver, a panel per shape; layers of one shape averaged."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    shapes = [name for name in SHAPES if any(r["problem"].endswith(name) for r in runs)]
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        for colour, solver in enumerate(SOLVERS):
            some = [r for r in runs if r["solver"] == solver and r["problem"].endswith(shape)]
            limits = sorted({r["limit"] for r in some})
            means = [[r["mean_gap"] for r in some if r["limit"] == limit] for limit in limits]
            values = [100 * sum(mean) / len(mean) for mean in means]
            axes.plot(limits, values, marker="o", color=f"C{colour}", label=solver)
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_xlabel("time limit, s")
        axes.set_title(shape)
    panels[0].set_ylabel("mean gap to the own bound, %")
    panels[0].legend()
    draw(figure, path)


def parse() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=Path, help="folder of problem files; default: random")
    options.add_argument("--only", default="", help="layers whose name has this in it")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--limits", type=float, nargs="+", default=list(LIMITS))
    options.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    return options.parse_args()


def main() -> None:
    arguments = parse()
    chosen = [(n, p) for n, p in problems(arguments.layers) if arguments.only in n]
    if not chosen:
        raise SystemExit("No layer there is large enough; give another folder.")
    most = len(chosen) * len(arguments.solvers) * sum(arguments.limits)
    print(f"{len(chosen)} problems; at most {most / 60:.0f} minutes.", flush=True)
    small = MaskProblem(*random_layer(2, 12), PerRow(sparsity=0.5))
    runs: list[dict[str, Any]] = []
    for solver in arguments.solvers:
        solve(small, solver)  # imports and compilation
        for name, problem in chosen:
            for limit in sorted(arguments.limits):
                try:
                    runs.append(run(name, problem, solver, limit))
                except InvalidInput as refusal:
                    print(f"{name}: {refusal}")
                    break
                one = runs[-1]
                print(
                    f"{solver}, {name}, {limit:g} s: mean gap {one['mean_gap']:.3%}, "
                    f"{one['seconds']:.2f} s",
                    flush=True,
                )
    wrong = violations(runs)
    show(runs)
    record = {"noise": NOISE, "noise_if_cut": CUT, "violations": wrong, "runs": runs}
    write(arguments.out, "anytime", record)
    plot(runs, arguments.out / "anytime.png")
    for sentence in wrong:
        print(sentence)
    if wrong:
        sys.exit(f"{len(wrong)} gaps are worse than they may be.")
    print("No gap is worse than with less time, nor than the relaxation's.")


if __name__ == "__main__":
    main()
