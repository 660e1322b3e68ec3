"""Sparsity that differs from layer to layer at equal total: which layers can spare more weights.

`loss_curves` measures in one pass over the dense model what every layer loses at each of several
sparsities; `allocate` picks one of them per layer so that the summed cost is least while as many
weights go as under uniform sparsity: a multiple-choice knapsack, solved exactly as an integer
program. `owl` is the published allocation by outlier ratios. Both give `Rules` for `prune`.

How losses of different layers compare decides everything. On the embedded model at 60 % (swap
masks, 48 calibration windows, one run; uniform: perplexity 35.2, dense: 30.7) the least sum of
layer losses gave 39.6, of losses relative to the layers' output energy 37.4, but of losses weighted
by what they do to the model 32.0. That weight, the default, is the KL divergence of the model's
next-token distribution with this layer alone pruned, per unit of the layer's loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from solvers import InvalidInput, MaskProblem, PerLayer, PerRow, get_solver, solve
from solvers.registry import DEFAULT_START

from .calibration import Windows, window_length
from .capture import forward
from .estimate import choose_batch
from .gram import Gram
from .models import PrunableLayer
from .observer import Observer
from .placement import Placement
from .prune import all_layers, calibration_windows
from .rules import Rules
from .walk import BlockWalk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Scope = Literal["row", "layer"]
Criterion = Literal["loss", "relative", "divergence"]
Method = Literal["uniform", "owl", "integer_program"]

STEP = 0.05
"""Between the sparsities of a default grid."""

REACH = 0.3
"""How far from the uniform sparsity a layer's may be by default."""

_PROBABILITIES = 1 << 28
"""Of the dense model, held in float32 for comparison."""

_WORST = 1e4
"""Largest cost that HiGHS sees; its absolute gap of 1e-6 is then 1e-10 of that."""


@dataclass(frozen=True)
class Option:
    """One sparsity that a layer may have.

    Attributes
    ----------
    keep
        Weights kept per row (per layer: on average).
    removed
        Weights removed in the whole layer.
    loss
        Squared change of the outputs per token, float64.
    cost
        What it counts in an allocation.
    """

    keep: int
    removed: int
    loss: float
    cost: float


@dataclass(frozen=True)
class LossCurve:
    """What a layer loses at each of several sparsities, sparsest last.

    Attributes
    ----------
    layer, rows, inputs
        The layer's full name, and its shape.
    energy
        Mean square of its dense output, summed over rows.
    options
        At least one, ordered by weights removed.
    divergence
        KL(dense ‖ pruned) in nats per token with only this layer pruned, by weights kept per row;
        empty unless the costs were weighted by it.
    """

    layer: str
    rows: int
    inputs: int
    energy: float
    options: tuple[Option, ...]
    divergence: dict[int, float]


@dataclass(frozen=True)
class BlockOutliers:
    """A block's share of outliers.

    Attributes
    ----------
    shapes
        ``(rows, inputs)`` of its layers, by full name.
    ratio
        Share of its weights whose ``|w| ‖x‖`` is larger than M times the block's mean.
    """

    shapes: dict[str, tuple[int, int]]
    ratio: float


def allocated_rules(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    sparsity: float,
    method: Method = "integer_program",
    *,
    scope: Scope = "row",
    low: float | None = None,
    high: float | None = None,
    criterion: Criterion = "divergence",
    solver: str = "wanda",
    ignore: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    **options: Any,
) -> Rules:
    """Rules that give every layer its own sparsity; the model is left as it was.

    Parameters
    ----------
    model, tokenizer, calibration
        As in `prune`.
    sparsity
        Fraction of the weights to remove of all layers that are pruned at all.
    method
        "uniform"; "owl", see `owl`; or "integer_program", see `loss_curves` and `allocate`.
    scope
        Whether each row of a layer has the layer's sparsity, or only the layer as a whole.
    low, high
        Of a layer's sparsity, for the integer program; by default 0.3 less and more than
        ``sparsity``, within 0.05..0.95.
    criterion, solver
        Of `loss_curves`.
    ignore, only
        Names of layers as in `Rules`; layers left dense by them do not count.
    **options
        ``samples``, ``seqlen``, ``batch_size``, ``seed``, ``blocks``, ``token_cache`` and
        ``observer`` as in `prune`; for the integer program also ``anchors``, ``anchor_solver``
        and ``probe`` of `loss_curves`.

    Raises
    ------
    InvalidInput
        If the sparsity, the bounds or a name cannot be worked with.
    """
    base = Rules(_uniform(sparsity, scope), ignore=ignore, only=only)
    if method == "uniform":
        return base
    if method == "owl":
        ratios = outlier_ratios(model, tokenizer, calibration, rules=base, **options)
        return owl(ratios, sparsity, scope=scope, ignore=ignore)
    if method == "integer_program":
        low = max(STEP, sparsity - REACH) if low is None else low
        high = min(1 - STEP, sparsity + REACH) if high is None else high
        curves = loss_curves(
            model, tokenizer, calibration, sparsity, _grid(sparsity, low, high),
            rules=base, criterion=criterion, solver=solver, **options,
        )  # fmt: skip
        return allocate(curves, sparsity, low, high, scope=scope, ignore=ignore)
    raise InvalidInput(f"Allocation '{method}' is none of {', '.join(get_args(Method))}.")


@torch.no_grad()
def loss_curves(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    sparsity: float,
    grid: Sequence[float],
    *,
    rules: Rules | None = None,
    criterion: Criterion = "divergence",
    solver: str = "wanda",
    anchors: Sequence[float] | None = None,
    anchor_solver: str = "swap",
    probe: int = 8,
    **options: Any,
) -> list[LossCurve]:
    """Loss against sparsity of every layer, all on inputs of the dense model.

    Parameters
    ----------
    model, tokenizer, calibration
        As in `prune`; the model is left as it was.
    sparsity
        Uniform sparsity that will be compared with; it is an option of every layer, and the only
        one of a layer that saw no calibration token.
    grid
        Sparsities to measure.
    rules
        Layers that they leave dense are left out.
    criterion
        What an option costs: "loss" as it is; "relative" to the layer's output energy; or
        "divergence": the loss times the KL divergence per unit of loss, measured at the anchors
        with this layer alone pruned and interpolated linearly in between.
    solver
        Of the masks; a cheap one will do, for the allocation needs only how losses compare.
    anchors
        Sparsities at which the divergence is measured; by default ``sparsity``.
    anchor_solver
        Of the masks that it is measured with; best the one that the model will be pruned with.
    probe
        Calibration windows that divergences are measured on. One anchor takes one forward of them
        per layer.
    **options
        ``samples``, ``seqlen``, ``batch_size``, ``seed``, ``blocks``, ``token_cache`` and
        ``observer`` as in `prune`.

    Raises
    ------
    InvalidInput
        If a sparsity is outside (0, 1), or the model or the text cannot be worked with.
    """
    if criterion not in get_args(Criterion):
        raise InvalidInput(f"Criterion '{criterion}' is none of {', '.join(get_args(Criterion))}.")
    if probe < 1:
        raise InvalidInput(f"probe={probe} is below 1; it is a number of windows.")
    anchors = ([sparsity] if anchors is None else anchors) if criterion == "divergence" else []
    uniform = PerRow(sparsity=sparsity)
    patterns = [PerRow(sparsity=share) for share in {*grid, *anchors, sparsity}]
    walk = _DenseWalk(model, tokenizer, calibration, rules, **options)
    divergence = _Divergence(model, walk.windows.tokens[:probe], walk.batch_size)
    curves = []
    for _, layer, gram in walk:
        rows, inputs = shape = _shape(layer)
        keeps = {pattern.kept_per_cell(shape) for pattern in patterns}
        anchored = {PerRow(sparsity=share).kept_per_cell(shape) for share in anchors}
        if gram.tokens == 0:
            keeps, anchored = {uniform.kept_per_cell(shape)}, set()
        losses, measured = {}, {}
        for keep in sorted(keeps):
            problem = MaskProblem(layer.weight, gram.matrix, PerRow(keep=keep))
            losses[keep] = float(problem.objective(_mask(problem, solver)).sum())
            if keep in anchored:
                measured[keep] = divergence.of(layer, _mask(problem, anchor_solver))
        energy = float(MaskProblem(layer.weight, gram.matrix, uniform).output_energy().sum())
        scale = _scale(criterion, losses, energy, measured)
        curve = tuple(
            Option(keep, rows * (inputs - keep), losses[keep], losses[keep] * scale[keep])
            for keep in sorted(keeps, reverse=True)
            if keep in scale
        )
        curves.append(LossCurve(layer.name, rows, inputs, energy, curve, measured))
    return curves


def _mask(problem: MaskProblem, solver: str) -> Tensor:
    start = DEFAULT_START if get_solver(solver).needs_start else None
    return solve(problem, solver, start=start).mask


def _scale(
    criterion: Criterion, losses: dict[int, float], energy: float, measured: dict[int, float]
) -> dict[int, float]:
    """Cost per unit of loss, by weights kept; none where it is unknown and there is a loss."""
    if criterion == "loss":
        return dict.fromkeys(losses, 1.0)
    if criterion == "relative":
        return dict.fromkeys(losses, 1 / energy if energy > 0 else 0.0)
    known = sorted(keep for keep in measured if losses[keep] > 0)
    if not known:
        return {keep: 0.0 for keep, loss in losses.items() if loss == 0}
    weights = [measured[keep] / losses[keep] for keep in known]
    return {keep: float(np.interp(keep, known, weights)) for keep in losses}


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
    uniform = _uniform(sparsity, scope)
    target = _target([(curve.rows, curve.inputs) for curve in curves], uniform)
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
    return _rules(keeps, uniform, scope, ignore)


def choose(
    costs: Sequence[Sequence[float]], removed: Sequence[Sequence[int]], target: int
) -> list[int]:
    """Multiple-choice knapsack: one option per layer, least cost that removes enough.

    ``min sum c_lj x_lj`` subject to ``sum_j x_lj = 1`` for every layer ``l`` and
    ``sum r_lj x_lj >= target``, x binary; then among its solutions the least ``sum r_lj x_lj``.
    HiGHS solves both; counts are checked in integers and costs in float64.

    Parameters
    ----------
    costs
        Finite and not negative.
    removed
        Weights removed, not negative.
    target
        To remove at least; some choice does.

    Returns
    -------
    list of int
        Index of each layer's option.
    """
    layer = np.repeat(np.arange(len(costs)), [len(one) for one in costs])
    cost = np.concatenate([np.asarray(one, dtype=np.float64) for one in costs])
    counts = np.concatenate([np.asarray(one, dtype=np.int64) for one in removed])
    unit = max(1, int(np.gcd.reduce(counts)))
    need = -(-target // unit)
    scaled = cost / (float(cost.max()) or 1.0) * _WORST
    first = _milp(scaled, layer, counts / unit, need)
    best = _total(first, cost)
    # A second program settles ties; its tolerance may let in a worse choice, which is refused.
    second = _milp(counts / unit, layer, counts / unit, need, scaled, _total(first, scaled))
    chosen = first
    if second is not None and _total(second, cost) <= best:
        chosen = second
    assert chosen is not None, "some choice removes enough"
    if int(counts[chosen].sum()) < target:
        raise RuntimeError("HiGHS gave an allocation that removes too few weights.")
    starts = np.searchsorted(layer, np.arange(len(costs)))
    return [int(index) for index in chosen - starts]


def _milp(
    objective: npt.NDArray[np.float64],
    layer: npt.NDArray[np.int64],
    amount: npt.NDArray[np.float64],
    need: int,
    cost: npt.NDArray[np.float64] | None = None,
    limit: float = math.inf,
) -> npt.NDArray[np.int64] | None:
    """Indices of the chosen options, layer by layer; None if there is no choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = np.arange(len(layer))
    one_each = csr_array((np.ones(len(layer)), (layer, options)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(amount[None], need, np.inf),
    ]
    if cost is not None:
        constraints.append(LinearConstraint(cost[None], -np.inf, limit))
    result = milp(
        objective,
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    if result.status != 0:
        raise RuntimeError(f"HiGHS found no allocation: {result.message}")
    chosen = np.flatnonzero(result.x > 0.5)
    if not np.array_equal(layer[chosen], np.unique(layer)):
        raise RuntimeError("HiGHS gave an allocation without exactly one option per layer.")
    return chosen


def _total(chosen: npt.NDArray[np.int64] | None, values: npt.NDArray[np.float64]) -> float:
    return math.inf if chosen is None else math.fsum(values[chosen])


@torch.no_grad()
def outlier_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Windows | None,
    threshold: float = 5.0,
    *,
    rules: Rules | None = None,
    **options: Any,
) -> list[BlockOutliers]:
    """Every block's share of outliers on dense inputs (OWL, arXiv:2310.05175).

    An outlier is a weight whose ``|w| ‖x‖`` is larger than ``threshold`` (the paper's M) times the
    mean over all prunable weights of its block, as in the published code; ``‖x‖`` is the norm of
    its input over the calibration tokens.

    Parameters
    ----------
    model, tokenizer, calibration
        As in `prune`; the model is left as it was.
    threshold
        M.
    rules
        Layers that they leave dense are left out.
    **options
        As in `loss_curves`.
    """
    if not threshold > 0:
        raise InvalidInput(f"Threshold {threshold} is not positive; the paper's is 5.")
    scores: dict[int, list[Tensor]] = {}
    shapes: dict[int, dict[str, tuple[int, int]]] = {}
    for index, layer, gram in _DenseWalk(model, tokenizer, calibration, rules, **options):
        norm = gram.matrix.diagonal().sqrt().float()
        scores.setdefault(index, []).append((layer.weight.float().abs() * norm).flatten())
        shapes.setdefault(index, {})[layer.name] = _shape(layer)
    found = []
    for index, parts in scores.items():
        score = torch.cat(parts)
        ratio = float((score > threshold * score.mean(dtype=torch.float64)).double().mean())
        found.append(BlockOutliers(shapes[index], ratio))
    return found


def owl(
    outliers: Sequence[BlockOutliers],
    sparsity: float,
    spread: float = 0.08,
    *,
    scope: Scope = "row",
    ignore: tuple[str, ...] = (),
) -> Rules:
    """Outlier-weighed layerwise sparsity (OWL, arXiv:2310.05175): more outliers, more weights kept.

    Ratios are stretched to a width of ``2 * spread`` and moved so that the kept shares have the
    mean ``1 - sparsity``. The published code rounds down per row; here all sparsities then move
    together by the least amount at which as many weights are removed as by uniform sparsity, which
    makes up for the rounding and for blocks of unequal size.

    Parameters
    ----------
    outliers
        Of all blocks, from `outlier_ratios`.
    sparsity
        Fraction of their weights to remove.
    spread
        The paper's λ.
    scope, ignore
        Of the rules that are given back.

    Raises
    ------
    InvalidInput
        If the spread is negative.
    """
    if not spread >= 0:
        raise InvalidInput(f"Spread {spread} is negative; the paper's is 0.08.")
    uniform = _uniform(sparsity, scope)
    ratios = np.array([block.ratio for block in outliers])
    width = float(np.ptp(ratios))
    kept = (ratios - ratios.min()) / width * 2 * spread if width else np.zeros(len(ratios))
    wanted = 1 - (kept - kept.mean() + 1 - sparsity)
    shapes = [shape for block in outliers for shape in block.shapes.values()]
    target = _target(shapes, uniform)

    def keeps(shift: float) -> dict[str, tuple[int, tuple[int, int]]]:
        return {
            name: (shape[1] - int(shape[1] * min(max(share + shift, 0.0), 1.0)), shape)
            for block, share in zip(outliers, wanted, strict=True)
            for name, shape in block.shapes.items()
        }

    few, enough = -1.0, 1.0  # of the least shift, found by bisection to the last bit
    while few < (middle := (few + enough) / 2) < enough:
        removed = sum(rows * (d - keep) for keep, (rows, d) in keeps(middle).values())
        few, enough = (few, middle) if removed >= target else (middle, enough)
    return _rules(keeps(enough), uniform, scope, ignore)


class _DenseWalk:
    """All layers that rules prune, with their Gram matrices on the dense model's inputs."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        calibration: str | Windows | None,
        rules: Rules | None,
        *,
        samples: int = 128,
        seqlen: int = 2048,
        batch_size: int | None = None,
        seed: int = 0,
        blocks: str | None = None,
        token_cache: Any = None,
        observer: Observer | None = None,
    ) -> None:
        self._rules, self._observer = rules, observer or Observer()
        placement = Placement(model, blocks)
        self._name = placement.blocks_name
        if rules is not None:
            rules.check(layer.name for layer in all_layers(self._name, placement.blocks))
        model.eval()
        if batch_size is None:
            batch_size = choose_batch(placement, window_length(model.config, seqlen))
        self.batch_size = batch_size
        self._observer.phase("calibration text")
        self.windows = calibration_windows(
            model, tokenizer, calibration, samples, seqlen, seed, token_cache
        )
        self._observer.phase("replay check and capture")
        self._walk = BlockWalk(placement, self.windows.tokens, batch_size, propagate=False)

    def __iter__(self) -> Iterator[tuple[int, PrunableLayer, Gram]]:
        """Block's index, layer, its Gram matrix."""
        for step in self._walk:
            self._observer.phase(f"{step.index}: Gram matrices")
            for layer in step.layers:
                if self._rules is None or self._rules.pattern_for(layer.name) is not None:
                    gram = step.grams.gram(layer)
                    self._observer.phase(f"allocation: {layer.name.removeprefix(f'{self._name}.')}")
                    yield step.index, layer, gram


class _Divergence:
    """KL(dense ‖ pruned) of the next-token distribution with one layer pruned alone."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, batch_size: int) -> None:
        self._model = model
        self._batches = torch.split(tokens, batch_size)
        self._dense: list[Tensor] = []
        self._stride = 1

    def of(self, layer: PrunableLayer, mask: Tensor) -> float:
        """In nats per token; the layer is as before afterwards."""
        if not self._dense:
            self._dense = [self._log_probabilities(batch) for batch in self._batches]
        weight = layer.weight
        before = weight.clone()
        total = tokens = 0.0
        try:
            weight.masked_fill_(~mask, 0.0)
            for batch, p in zip(self._batches, self._dense, strict=True):
                q = self._log_probabilities(batch)
                total += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
                tokens += len(p)
        finally:
            weight.copy_(before)
        return max(total / tokens, 0.0)  # not below zero by rounding

    def _log_probabilities(self, batch: Tensor) -> Tensor:
        logits = forward(self._model, batch)[:, :-1].flatten(0, 1)
        held = sum(one.numel() for one in self._batches) * logits.shape[-1]
        return log_softmax(logits[:: -(-held // _PROBABILITIES)].float(), dim=-1)


def _uniform(sparsity: float, scope: Scope) -> PerRow | PerLayer:
    if scope not in get_args(Scope):
        raise InvalidInput(f"Scope '{scope}' is none of {', '.join(get_args(Scope))}.")
    return PerRow(sparsity=sparsity) if scope == "row" else PerLayer(sparsity=sparsity)


def _grid(sparsity: float, low: float, high: float) -> list[float]:
    """Sparsities from low to high, evenly, about `STEP` apart."""
    if not 0 < low <= sparsity <= high < 1:
        raise InvalidInput(
            f"Sparsity {sparsity} needs bounds 0 < low <= {sparsity} <= high < 1, not {low} and "
            f"{high}."
        )
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


def _target(shapes: Sequence[tuple[int, int]], uniform: PerRow | PerLayer) -> int:
    """Weights that uniform sparsity removes."""
    per_row = isinstance(uniform, PerRow)
    return sum(
        rows * d - uniform.kept_per_cell((rows, d)) * (rows if per_row else 1) for rows, d in shapes
    )


def _rules(
    keeps: dict[str, tuple[int, tuple[int, int]]],
    uniform: PerRow | PerLayer,
    scope: Scope,
    ignore: tuple[str, ...],
) -> Rules:
    """Rules for exactly these layers, of weights kept per row and shape."""
    patterns = tuple(
        (name, PerRow(keep=keep) if scope == "row" else PerLayer(keep=rows * keep))
        for name, (keep, (rows, _)) in keeps.items()
    )
    return Rules(uniform, patterns, ignore, tuple(keeps))


def _shape(layer: PrunableLayer) -> tuple[int, int]:
    rows, inputs = layer.weight.shape
    return rows, inputs
