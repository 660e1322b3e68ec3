"""Sparsity that differs from layer to layer at equal total: which layers can spare more weights.

An exact integer program picks one of several sparsities per layer so that the summed cost (see
`mipprune.loss_curves`) is least while as many weights go as under uniform sparsity: a
multiple-choice knapsack. OWL (`mipprune.owl`) is the published allocation by outlier ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from solvers import InvalidInput, PerLayer, PerRow
from solvers.knapsack import choose

from .budget import Scope, removed_by, rules_of, uniform_pattern
from .dense_walk import DenseWalk
from .loss_curves import Criterion, LossCurve, Option, Prune, loss_curves
from .owl import outlier_ratios, owl
from .rules import Rules

Method = Literal["uniform", "owl", "integer_program"]
Measure = Literal["swap", "run"]

STEP = 0.05
"""Between the sparsities of a default grid."""

REACH = 0.2
"""How far from the uniform sparsity a layer's may be by default."""

ANCHORED = 0.15
"""How far from the uniform sparsity divergences are measured too by default."""


@dataclass(frozen=True)
class Allocation:
    """How a total sparsity is shared out among the layers.

    Parameters
    ----------
    method
        "uniform"; "owl", see `mipprune.owl`; or "integer_program", see `allocate`.
    low, high
        Of a layer's sparsity, for the integer program; by default `REACH` less and more than
        the total, within `STEP` of 0 and 1.
    criterion, probe
        Of `loss_curves`.
    anchors
        Sparsities at which divergences are measured; by default the total and `ANCHORED` less and
        more than it, within ``low`` and ``high``.
    measure
        How a layer is pruned for it: "run" as the run will prune it, with its solver and weight
        update, which takes as long as the run for every anchor (within a time budget, by Wanda's
        masks and the update); "swap" by swaps from Wanda's mask, weights as they are.
    optional
        Whether a run that it cannot be followed in goes on without, instead of being refused.
    """

    method: Method = "integer_program"
    low: float | None = None
    high: float | None = None
    criterion: Criterion = "divergence"
    anchors: tuple[float, ...] | None = None
    measure: Measure = "run"
    probe: int = 8
    optional: bool = False

    def __post_init__(self) -> None:
        for value, kind in (
            (self.method, Method),
            (self.criterion, Criterion),
            (self.measure, Measure),
        ):
            if value not in get_args(kind):
                raise InvalidInput(f"Allocation '{value}' is none of {', '.join(get_args(kind))}.")
        if self.probe < 1:
            raise InvalidInput(f"probe={self.probe} is below 1; it is a number of windows.")

    @property
    def forwards(self) -> bool:
        """Whether it runs the whole model with a layer pruned."""
        return self.method == "integer_program" and self.criterion == "divergence"

    def check(self, rules: Rules) -> None:
        """Refuse rules that hold no sparsity to share out.

        Raises
        ------
        InvalidInput
            It says what to leave out.
        """
        if self.method == "uniform":
            return
        default = rules.default
        if not isinstance(default, (PerRow, PerLayer)) or default.sparsity is None:
            raise InvalidInput(
                f"An allocation shares out a sparsity, but the pattern is {default}; give "
                "--sparsity, or leave --allocate out."
            )
        if rules.rules:
            raise InvalidInput(
                f"An allocation gives every layer its sparsity, but a rule names one for "
                f"'{rules.rules[0][0]}'; leave --rule or --allocate out (--ignore and --only do "
                "with both)."
            )
        if self.method == "integer_program":
            self._bounds(default.sparsity)

    def _bounds(self, sparsity: float) -> tuple[float, float]:
        low = max(STEP, sparsity - REACH) if self.low is None else self.low
        high = min(1 - STEP, sparsity + REACH) if self.high is None else self.high
        if not 0 < low <= sparsity <= high < 1:
            raise InvalidInput(
                f"Sparsity {sparsity} needs bounds 0 < low <= {sparsity} <= high < 1, not {low} "
                f"and {high}."
            )
        return low, high

    def rules(self, walk: DenseWalk, rules: Rules, prune: Prune | None = None) -> Rules:
        """Rules that give every layer its own sparsity, at the total of rules that were checked.

        Parameters
        ----------
        walk
            The dense model, with those rules; it is left as it was.
        rules
            Their default is the sparsity to share out; layers that they leave dense do not count.
        prune
            How the run prunes a layer; None measures by "swap".
        """
        self.check(rules)
        if self.method == "uniform":
            return rules
        default = rules.default
        assert isinstance(default, (PerRow, PerLayer))
        assert default.sparsity is not None
        sparsity = default.sparsity
        scope: Scope = "row" if isinstance(default, PerRow) else "layer"
        if self.method == "owl":
            return owl(outlier_ratios(walk), sparsity, scope=scope, ignore=rules.ignore)
        low, high = self._bounds(sparsity)
        anchors = self.anchors
        if anchors is None:
            ends = (max(low, sparsity - ANCHORED), min(high, sparsity + ANCHORED))
            anchors = (ends[0], sparsity, ends[1])
        curves = loss_curves(
            walk,
            sparsity,
            _grid(sparsity, low, high),
            criterion=self.criterion,
            anchors=anchors,
            prune=prune if self.measure == "run" else None,
            probe=self.probe,
        )
        return allocate(curves, sparsity, low, high, scope=scope, ignore=rules.ignore)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def allocate(
    curves: Sequence[LossCurve],
    sparsity: float,
    low: float = 0.0,
    high: float = 1.0,
    *,
    scope: Scope = "row",
    ignore: tuple[str, ...] = (),
) -> Rules:
    """Choose each layer's sparsity so that the summed cost is least at equal total sparsity.

    At least as many weights are removed as by uniform sparsity; among choices of equal cost the one
    that removes the fewest is taken.

    Parameters
    ----------
    curves
        Of all layers that are to be pruned.
    sparsity
        Fraction of their weights to remove.
    low, high
        Sparsities of single layers stay within them; one with a single option keeps it.
    scope, ignore
        Of the rules that are given back. Layers without a curve stay dense.

    Raises
    ------
    InvalidInput
        If the options within the bounds cannot remove so much, or cannot remove so little.
    """
    uniform = uniform_pattern(sparsity, scope)
    target = removed_by(uniform, [(curve.rows, curve.inputs) for curve in curves])
    allowed = [_within(curve, low, high) for curve in curves]
    least, most = (sum(end(o.removed for o in some) for some in allowed) for end in (min, max))
    if not least <= target <= most:
        total = sum(curve.rows * curve.inputs for curve in curves)
        raise InvalidInput(
            f"Sparsity {sparsity} is not between {least / total:.3f} and {most / total:.3f}, which "
            "is what the layers' options allow; widen low and high."
        )
    chosen = choose(
        [[option.cost for option in options] for options in allowed],
        [[option.removed for option in options] for options in allowed],
        target,
    )
    keeps = {
        curve.layer: (options[index].keep, (curve.rows, curve.inputs))
        for curve, options, index in zip(curves, allowed, chosen, strict=True)
    }
    return rules_of(keeps, uniform, ignore)


def _grid(sparsity: float, low: float, high: float) -> list[float]:
    """Sparsities from low to high, evenly, about `STEP` apart."""
    below = np.arange(sparsity, low - 1e-9, -STEP)
    above = np.arange(sparsity, high + 1e-9, STEP)
    return sorted({*map(float, below), *map(float, above), low, high})


def _within(curve: LossCurve, low: float, high: float) -> list[Option]:
    """Options with a sparsity in low..high, to within one weight per row."""
    if len(curve.options) == 1:
        return list(curve.options)
    slack = 1 / curve.inputs
    found = [
        option for option in curve.options if low - slack <= 1 - option.keep / curve.inputs <= high
    ]
    if not found:
        raise InvalidInput(
            f"Layer {curve.layer} was not measured between {low} and {high}; widen low and high."
        )
    return found
