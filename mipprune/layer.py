"""One layer: its problem, solved."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solvers import (
    InvalidInput,
    MaskProblem,
    MaskSolution,
    Pattern,
    Status,
    get_solver,
    solve,
)

from .errors import OutOfMemory
from .gram import Gram
from .masks import StartMasks
from .models import PrunableLayer
from .ranks import ALONE, Ranks
from .record import REFERENCE, LayerResult, PrunedLayer
from .settings import CURRENT, Settings
from .surrogate import Inputs, output_change
from .time_budget import TimeBudget

_ZERO_TOKENS = "saw no calibration token: pruned by magnitude"

_RANK = (
    Status.TIME_LIMIT,
    Status.ITERATION_LIMIT,
    Status.FEASIBLE,
    Status.LOCAL_OPTIMUM,
    Status.OPTIMAL,
)
"""What is claimed about a whole is the least that is claimed about a part."""


def check_layer(layer: PrunableLayer, settings: Settings) -> Pattern:
    """The pattern of a layer that is to be pruned; `InvalidInput` if it cannot be.

    Of a layer on the meta device, only the shape is looked at.
    """
    pattern = settings.rules.pattern_for(layer.name)
    assert pattern is not None, "only layers that are pruned are checked"
    for name in settings.solvers:
        reason = get_solver(name).unable(pattern)
        if reason is not None:
            raise InvalidInput(reason)
    if isinstance(settings.start, StartMasks):
        settings.start.check(layer)
    rows, inputs = layer.weight.shape
    try:
        pattern.check((rows, inputs))
        settings.layer_step.surrogate.check(pattern)
    except InvalidInput as error:
        raise InvalidInput(f"Layer {layer.name}: {error}") from None
    if layer.weight.is_meta:
        return pattern
    if not bool(torch.isfinite(layer.weight).all()):
        raise InvalidInput(f"Layer {layer.name} has NaN or infinite weights; mend the model first.")
    if settings.start == CURRENT:
        mask = layer.weight != 0
        if not pattern.is_feasible(mask):
            raise InvalidInput(
                f"Layer {layer.name} has {1 - float(mask.double().mean()):.1%} zeros, which do not "
                f"follow the pattern {pattern}; start from a solver's mask, such as wanda."
            )
    return pattern


class LayerSolver:
    """Solves layers, in pieces where processes share the rows or memory asks for it.

    Parameters
    ----------
    settings
        Pattern, solver and start.
    ranks
        The processes that share the rows.
    warn
        Told when rows have to be solved in smaller pieces.
    budget
        Limits each layer's search; None lets it end by itself.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks = ALONE,
        warn: Callable[[str], None] = lambda _: None,
        budget: TimeBudget | None = None,
    ) -> None:
        self._settings, self._ranks, self._warn = settings, ranks, warn
        self._budget, self._limit = budget, math.inf
        self._pieces = 1
        self._sharable = get_solver(settings.solver, **settings.solver_options).rowwise

    def __call__(self, layer: PrunableLayer, gram: Gram) -> PrunedLayer:
        """A layer's result, mask and new weight; its weight in the model is left as it is.

        Raises
        ------
        OutOfMemory
            If the device's memory does not suffice for a single row.
        """
        began = time.perf_counter()
        settings, step = self._settings, self._settings.layer_step
        pattern = check_layer(layer, settings)
        aim = step.aim(layer.weight, gram.inputs, layer.bias is not None)
        problems = aim.problems(pattern)
        plain = (
            problems[0]
            if aim.plain
            else MaskProblem(layer.weight, gram.matrix, pattern, copy=False)
        )
        note, start = gram.note, None
        if gram.tokens == 0:
            note = _ZERO_TOKENS
            solution = _joined(
                [solve(one, "magnitude", seed=settings.seed) for one in problems], plain.device
            )
        else:
            start = self._start(layer, plain, problems)
            solution = self._solve_in_time(layer.name, problems, start, gram.inputs)
        new = aim.updated(solution.mask)
        bias = aim.new_bias(new, layer.bias)
        seconds = time.perf_counter() - began

        by_plain_loss = aim.plain
        loss = float(
            (solution.objective if by_plain_loss else plain.objective(solution.mask)).sum()
        )
        loss_start = None if start is None else float(plain.objective(start).sum())
        if by_plain_loss and settings.start == REFERENCE and loss_start is not None:
            reference = loss_start
        elif by_plain_loss and settings.solver == REFERENCE and gram.tokens:
            reference = loss
        else:
            reference = float(solve(plain, REFERENCE).objective.sum())
        after = loss
        if not step.keeps_weights or bias is not None:
            after = loss_as_written(layer, gram, new, bias)
        energy = float(plain.output_energy().sum())
        rows, columns = plain.shape
        result = LayerResult(
            name=layer.name,
            rows=rows,
            inputs=columns,
            tokens=gram.tokens,
            dead_inputs=int((gram.matrix.diagonal() == 0).sum()),
            sparsity=1.0 - float(solution.mask.double().mean()),
            loss_start=loss_start,
            loss=loss,
            updated_loss=after,
            loss_reference=reference,
            surrogate_loss=float(solution.objective.sum()),
            relative_error=after / energy if energy > 0 else 0.0,
            status=solution.status.name,
            seconds=seconds,
            stats=solution.stats,
            note=note,
        )
        return PrunedLayer(result, solution.mask, None if step.keeps_weights else new, bias)

    def _start(
        self, layer: PrunableLayer, plain: MaskProblem, problems: Sequence[MaskProblem]
    ) -> Tensor | None:
        start = self._settings.start
        if start is None:
            return None
        if isinstance(start, StartMasks):
            return start.solution(layer.name, problems[0] if len(problems) == 1 else plain).mask
        if start == CURRENT:
            return layer.weight != 0
        return torch.cat([solve(one, start, seed=self._settings.seed).mask for one in problems])

    def _rows_apart(self, problem: MaskProblem) -> bool:
        """Whether rows may be solved in several pieces."""
        return self._sharable and not problem.pattern.coupled

    def _solve_in_time(
        self, name: str, problems: Sequence[MaskProblem], start: Tensor | None, inputs: Inputs
    ) -> MaskSolution:
        """Solve groups of rows within the layer's part of the time budget, if there is one."""
        began, whole = time.perf_counter(), math.inf
        if self._budget is not None:
            whole = self._budget.limit(name)
        rows = sum(problem.shape[0] for problem in problems)
        groups = self._settings.layer_step.surrogate.by_group(inputs, len(problems))
        parts, done = [], 0
        for problem, group in zip(problems, groups, strict=True):
            own = slice(done, done + problem.shape[0])
            self._limit, done = whole * problem.shape[0] / rows, own.stop
            options = self._options(group)
            parts.append(self._solve(problem, None if start is None else start[own], options))
        if self._budget is not None:
            self._budget.spent(name, time.perf_counter() - began)
        return _joined(parts, problems[0].device)

    def _options(self, inputs: Inputs) -> dict[str, Any]:
        """The solver's, with the mean that belongs to a problem's Gram matrix."""
        options = self._settings.solver_options
        if "mean" not in get_solver(self._settings.solver).options():
            return options
        return {"mean": inputs.mean, **options}

    def _solve(
        self, problem: MaskProblem, start: Tensor | None, options: dict[str, Any]
    ) -> MaskSolution:
        ranks, rows = self._ranks, torch.arange(problem.shape[0])
        if ranks.size == 1 or not self._rows_apart(problem) or len(rows) < ranks.size:
            return self._solve_rows(problem, start, options, rows)
        mine = self._solve_rows(problem, start, options, rows.tensor_split(ranks.size)[ranks.rank])
        portable = replace(mine, mask=mine.mask.cpu(), objective=mine.objective.cpu(), trace=())
        return _joined(ranks.gather_objects(portable), problem.device)

    def _solve_rows(
        self, problem: MaskProblem, start: Tensor | None, options: dict[str, Any], rows: Tensor
    ) -> MaskSolution:
        """Solve some rows, in ever more pieces until the device's memory suffices."""
        while True:
            try:
                return _joined(
                    [
                        self._solve_piece(problem, start, options, part)
                        for part in rows.tensor_split(self._pieces)
                    ],
                    problem.device,
                )
            except torch.OutOfMemoryError:
                if not self._rows_apart(problem) or 2 * self._pieces > len(rows):
                    raise OutOfMemory(
                        f"{problem.device} has too little memory to solve {self._pieces} of "
                        f"{len(rows)} rows of {problem.shape[1]} inputs; use a larger device or "
                        "--device cpu (--dry-run estimates the memory needed)."
                    ) from None
            self._pieces *= 2
            self._warn(
                f"Out of device memory: from here on rows are solved in {self._pieces} pieces."
            )

    def _solve_piece(
        self, problem: MaskProblem, start: Tensor | None, options: dict[str, Any], rows: Tensor
    ) -> MaskSolution:
        whole = len(rows) == problem.shape[0]
        part = problem if whole else problem.rows(rows)
        begin = start if whole or start is None else start[rows.to(start.device)]
        settings, limit = self._settings, None
        if self._budget is not None:
            limit = self._limit * len(rows) / problem.shape[0]
        return solve(
            part, settings.solver, start=begin, time_limit=limit, seed=settings.seed, **options
        )


def loss_as_written(layer: PrunableLayer, gram: Gram, weight: Tensor, bias: Tensor | None) -> float:
    """Squared change of a layer's own output by a new weight and perhaps a new bias."""
    shift = None
    if bias is not None and layer.bias is not None:
        shift = bias.double() - layer.bias.double()
    return output_change(layer.weight, weight, gram.matrix, gram.mean, shift)


def _joined(parts: Sequence[MaskSolution], device: torch.device) -> MaskSolution:
    """Solutions of some rows each as one."""
    if len(parts) == 1:
        return parts[0]
    return MaskSolution(
        mask=torch.cat([part.mask.to(device) for part in parts]),
        objective=torch.cat([part.objective.to(device) for part in parts]),
        status=min((part.status for part in parts), key=_RANK.index),
        solver=parts[0].solver,
        stats={key: _summed([part.stats.get(key) for part in parts]) for key in parts[0].stats},
    )


def _summed(values: Sequence[Any]) -> Any:
    """Counts added up; of other numbers the one furthest from zero; else the first."""
    if all(isinstance(value, int) for value in values):
        return sum(values)
    if all(isinstance(value, (int, float)) for value in values):
        return max(values, key=abs)
    return values[0]
