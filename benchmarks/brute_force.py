"""Every solver and every pattern against enumeration, on a few thousand small instances.

The instances and what is checked on each are those of the tests (``tests/instances.py``); here they
are drawn from fixed seeds, counted by solver, pattern and kind of difficulty, and reported.

    python benchmarks/brute_force.py
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import parser, write
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from instances import CONTENDERS, KINDS, PATTERNS, draw, judge


class Tally:
    """What came of one solver.

    Attributes
    ----------
    cases, violations
        Counts, of both.
    statuses
        Counts by name.
    optimal
        Masks that lose no more than the optimum, up to 1e-9 of the scale.
    gap, lost
        Largest reported gap that is finite; largest loss above the optimum, share of the scale.
    seconds
        In total.
    counts
        Cases by "pattern / kind".
    """

    def __init__(self) -> None:
        self.cases = self.violations = self.optimal = 0
        self.statuses: Counter[str] = Counter()
        self.gap: float | None = None
        self.lost = self.seconds = 0.0
        self.counts: Counter[str] = Counter()

    def record(self) -> dict[str, Any]:
        return {
            "cases": self.cases,
            "violations": self.violations,
            "optimal": self.optimal,
            "statuses": dict(self.statuses),
            "worst_gap": self.gap,
            "worst_lost": self.lost,
            "seconds": round(self.seconds, 2),
            "counts": dict(sorted(self.counts.items())),
        }


def show(tallies: dict[str, Tally]) -> None:
    table = Table(title="Solvers against enumeration")
    for column in ("solver", "cases", "optimal", "worst gap", "worst loss", "seconds", "wrong"):
        table.add_column(column, justify="left" if column == "solver" else "right")
    for label, tally in tallies.items():
        table.add_row(
            label,
            str(tally.cases),
            f"{tally.optimal / max(1, tally.cases):.1%}",
            "" if tally.gap is None else f"{tally.gap:.2g}",
            f"{tally.lost:.2g}",
            f"{tally.seconds:.1f}",
            str(tally.violations),
        )
    Console(width=110).print(table)
    print("Worst loss: above the optimum, as a share of trace(Q) + sum |linear|.")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--instances", type=int, default=3000)
    options.add_argument("--seed", type=int, default=0, help="of the first instance")
    options.add_argument("--seconds", type=float, default=float("inf"), help="draw no more after")
    arguments = options.parse_args()
    tallies = {contender.label: Tally() for contender in CONTENDERS}
    violations: list[str] = []
    drawn: Counter[str] = Counter()
    began = time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.instances):
        if time.perf_counter() - began > arguments.seconds:
            break
        instance = draw(seed)
        drawn[f"{instance.pattern} / {instance.kind}"] += 1
        for contender in CONTENDERS:
            if not contender.meets(instance):
                continue
            at = time.perf_counter()
            found = judge(contender, instance, with_start=seed % 3 == 0)
            tally = tallies[contender.label]
            tally.seconds += time.perf_counter() - at
            tally.cases += 1
            tally.violations += len(found.violations)
            tally.optimal += found.lost <= 1e-9
            tally.lost = max(tally.lost, found.lost)
            tally.statuses[found.status or "none"] += 1
            tally.counts[f"{instance.pattern} / {instance.kind}"] += 1
            if found.gap is not None and found.gap < float("inf"):
                tally.gap = max(tally.gap or 0.0, found.gap)
            for violation in found.violations:
                violations.append(
                    f"seed {seed}, {contender.label}, {instance.pattern}, {instance.kind}: "
                    f"{violation}"
                )
                print(violations[-1], flush=True)
    show(tallies)
    record = {
        "instances": sum(drawn.values()),
        "first_seed": arguments.seed,
        "patterns": list(PATTERNS),
        "kinds": list(KINDS),
        "seconds": round(time.perf_counter() - began, 1),
        "drawn": dict(sorted(drawn.items())),
        "violations": violations,
        "solvers": {label: tally.record() for label, tally in tallies.items()},
    }
    write(arguments.out, "brute_force", record)
    cases = sum(tally.cases for tally in tallies.values())
    print(f"{sum(drawn.values())} instances, {cases} answers, {len(violations)} violations.")
    if violations:
        sys.exit(1)


if __name__ == "__main__":
    main()
