"""How close do swaps from Wanda come to the best masks known?

For the rows in ``best_known.json`` (60 % per row): our loss against the recorded loss of plain
best-swap search from Wanda, and against the best mask ever found.

    python benchmarks/best_known.py
"""

from __future__ import annotations

import json

from common import parser, write

from solvers import MaskProblem, PerRow, solve


def main() -> None:
    arguments = parser(__doc__).parse_args()
    known = json.loads((arguments.layers / "best_known.json").read_text())
    record = {}
    for name, entry in known.items():
        problem = MaskProblem.load(
            arguments.layers / f"{name}.safetensors", PerRow(sparsity=entry["sparsity"])
        ).rows(entry["rows"])
        solution = solve(problem, "swap", start="wanda")
        loss = float(solution.objective.sum())
        record[name] = {
            "rows": len(entry["rows"]),
            "loss": loss,
            "status": solution.status.name,
            "of_wanda": loss / sum(entry["wanda"]),
            "of_recorded_swaps": loss / sum(entry["swap_from_wanda"]),
            "of_best_known": loss / sum(entry["best"]),
        }
        print(
            f"{name}: {record[name]['of_wanda']:.4f} of wanda, "
            f"{record[name]['of_recorded_swaps']:.4f} of the recorded swaps, "
            f"{record[name]['of_best_known']:.4f} of the best known"
        )
    write(arguments.out, "best_known", {"layers": record})


if __name__ == "__main__":
    main()
