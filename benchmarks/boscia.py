"""Solve Boscia's test problems at full size, and compare the hull with the relaxation.

Every problem of ``tests/boscia_problems.py`` is solved to a relative gap of 1e-6 and compared with
its known optimum. Then quadratics over one knapsack are solved twice, with nodes over the convex
hull of the integer points and over the continuous relaxation, by two oracles: HiGHS, and dynamic
programming (relaxed: Dantzig's rule).

    python benchmarks/boscia.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, draw, write
from matplotlib.figure import Figure

from solvers.hull import HullSolution, minimize

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import boscia_problems as boscia

REL_GAP = 1e-6

ORACLES = ("highs", "dynamic")


def figures(solution: HullSolution) -> dict[str, Any]:
    """What is kept of a solution."""
    counts = ("nodes", "lmo_calls", "relaxed_lmo_calls", "heuristic_lmo_calls", "iterations")
    return {
        "objective": solution.objective,
        "bound": solution.bound,
        "evidence": solution.evidence.label,
        "status": solution.status.name,
        **{name: solution.stats[name] for name in counts},
        "seconds": round(solution.stats["time"], 3),
    }


def known_problems(time_limit: float) -> list[dict[str, Any]]:
    """All of Boscia's problems; T10 also with half of the amounts whole."""
    builders = [
        *boscia.BUILDERS,
        lambda: boscia.worst_case(alpha=0.05),
        lambda: boscia.nonlinear(30),
        lambda: boscia.portfolio(20, share=0.5),
    ]
    record = []
    for build in builders:
        instance = build()
        solution = minimize(
            instance.f, None, instance.domain, rel_gap=REL_GAP, time_limit=time_limit
        )
        entry = {
            "problem": instance.name,
            "variables": instance.domain.n,
            "known": None if np.isnan(instance.optimum) else instance.optimum,
            **figures(solution),
        }
        if instance.strong_convexity > 0:
            lifted = minimize(
                instance.f,
                None,
                instance.domain,
                rel_gap=REL_GAP,
                time_limit=time_limit,
                strong_convexity=instance.strong_convexity,
            )
            entry["with strong convexity"] = figures(lifted)
        record.append(entry)
        print(
            f"{instance.name:30} n={instance.domain.n:<4} known {instance.optimum:<12.8g} "
            f"found {solution.objective:<12.8g} bound {solution.bound:<12.8g} "
            f"{solution.stats['nodes']:6} nodes {solution.stats['lmo_calls']:6} oracle calls "
            f"{solution.stats['time']:7.2f} s  {solution.status.name}",
            flush=True,
        )
    return record


def hull_against_relaxation(
    sizes: list[int], seeds: int, time_limit: float
) -> list[dict[str, Any]]:
    """Knapsack quadratics by both oracles, with and without the hull."""
    record = []
    for oracle in ORACLES:
        for n in sizes:
            for seed in range(seeds):
                instance = boscia.knapsack_quadratic(n, seed, oracle)
                entry: dict[str, Any] = {"oracle": oracle, "n": n, "seed": seed}
                for name, hull in (("hull", True), ("relaxation", False)):
                    root = minimize(
                        instance.f, None, instance.domain, hull=hull, node_limit=1, node_gap=1e-4
                    )
                    solution = minimize(
                        instance.f,
                        None,
                        instance.domain,
                        rel_gap=REL_GAP,
                        hull=hull,
                        time_limit=time_limit,
                    )
                    best = abs(solution.objective)
                    entry[name] = {
                        **figures(solution),
                        "root_gap": (solution.objective - root.stats["root_bound"]) / best,
                    }
                record.append(entry)
                print(
                    f"{oracle:8} n={n} seed {seed}: "
                    + "; ".join(
                        f"{name} root gap {entry[name]['root_gap']:.2%}, "
                        f"{entry[name]['nodes']} nodes, {entry[name]['seconds']:.2f} s"
                        for name in ("hull", "relaxation")
                    ),
                    flush=True,
                )
    return record


def means(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means per oracle and size: geometric for nodes and seconds, arithmetic for root gaps."""
    summary = []
    for oracle, n in dict.fromkeys((entry["oracle"], entry["n"]) for entry in record):
        chosen = [e for e in record if (e["oracle"], e["n"]) == (oracle, n)]
        line: dict[str, Any] = {"oracle": oracle, "n": n}
        for name in ("hull", "relaxation"):
            found = {
                key: np.array([entry[name][key] for entry in chosen])
                for key in ("nodes", "seconds", "root_gap")
            }
            line[name] = {
                "nodes": float(np.exp(np.log(found["nodes"]).mean())),
                "seconds": float(np.exp(np.log(found["seconds"].clip(1e-3)).mean())),
                "root_gap": float(found["root_gap"].mean()),
            }
        summary.append(line)
    return summary


def plot(summary: list[dict[str, Any]], path: Path) -> None:
    """Root gap, nodes and time over the number of variables."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    titles = {"root_gap": "root gap", "nodes": "nodes", "seconds": "seconds"}
    names = {"highs": "HiGHS", "dynamic": "dynamic programming"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for oracle, line in zip(ORACLES, ("-", "--"), strict=True):
            chosen = [s for s in summary if s["oracle"] == oracle]
            sizes = [s["n"] for s in chosen]
            for colour, name in enumerate(("hull", "relaxation")):
                values = [s[name][key] for s in chosen]
                label = f"{name}, {names[oracle]}"
                axes.plot(sizes, values, line, marker="o", color=f"C{colour}", label=label)
        axes.set_title(title)
        axes.set_xlabel("variables")
        axes.set_xticks(sizes)
        if key == "root_gap":
            axes.set_ylim(0)
        else:
            axes.set_yscale("log")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    draw(figure, path)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--time-limit", type=float, default=60.0, help="seconds per solve")
    options.add_argument("--sizes", type=int, nargs="+", default=[20, 25, 30])
    options.add_argument("--seeds", type=int, default=5)
    arguments = options.parse_args()
    known = known_problems(arguments.time_limit)
    compared = hull_against_relaxation(arguments.sizes, arguments.seeds, arguments.time_limit)
    summary = means(compared)
    write(
        arguments.out,
        "boscia",
        {"rel_gap": REL_GAP, "problems": known, "knapsacks": summary, "knapsack_runs": compared},
    )
    plot(summary, arguments.out / "boscia.png")


if __name__ == "__main__":
    main()
