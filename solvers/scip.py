"""Exact masks by SCIP: a mixed-integer program per row, or one for a layer with one budget."""

from __future__ import annotations

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InvalidInput
from .pattern import Constraints, Pattern
from .problem import MaskProblem
from .registry import register
from .saliency import Wanda
from .solution import Status, TracePoint, shared_out
from .solver import Callback, Clock, Outcome, Progress, Solver

Floats = npt.NDArray[np.float64]

_FEASTOL = 1e-7
"""By how much SCIP may violate a constraint of the scaled program (its own default is 1e-6)."""

_GUARD = 1e-6
"""Taken off SCIP's dual bound, in units of the scaled program, for these violations."""

_LEAST_UNIT = 1e-3
"""Smallest unit of a program, as a share of ``trace(Q) + sum |linear|``: keeps ``F`` moderate."""

_EPSILON = 1e-9
"""Coefficients that SCIP takes for zero."""

_STATUS = {
    "optimal": Status.OPTIMAL,
    "gaplimit": Status.OPTIMAL,
    "timelimit": Status.TIME_LIMIT,
    "totalnodelimit": Status.ITERATION_LIMIT,
}
"""What SCIP's names mean; after any other, such as a memory limit, nothing is claimed."""

_WEAKEST_FIRST = (Status.FEASIBLE, Status.TIME_LIMIT, Status.ITERATION_LIMIT, Status.OPTIMAL)


@register
@dataclass(frozen=True)
class Scip(Solver):
    """Branch and bound of SCIP, one mixed-integer program per row.

    With ``Q = F^T F`` and binaries ``m``, a row is ``min t + linear^T (1 - m)`` such that
    ``y = F (1 - m)``, ``sum y_i^2 <= t``, and the pattern's constraints hold: several times
    faster in SCIP than the quadratic form itself. Rows that share a budget become one program.

    Parameters
    ----------
    rel_gap
        A program is solved when objective and bound differ by this share of the smaller.
    node_limit
        Most nodes per program; None for no limit.
    threads
        Programs solved at the same time; an interrupt then waits for those being solved.
    verbose
        Whether SCIP prints its log.

    Notes
    -----
    The time left is divided evenly over the programs that remain.

    SCIP begins with the start, or else with Wanda's mask.

    The bound is SCIP's claim, not a certificate: SCIP computes in floating point and lets every
    constraint be violated by 1e-7, on a program scaled so that its first mask costs about 1.
    The bound is therefore lowered by 1e-6 of that cost, and by what ``F`` lacks of ``Q``
    (negative eigenvalues of a rounded Gram matrix cannot be in it). Of rows that share a budget
    only the *sum* of the bounds is one: the gap is shared out in proportion to their losses.

    ``stats``: ``nodes`` of all trees, and lists with one entry per program: ``program_nodes``,
    ``program_times`` (seconds) and ``program_status`` (names of `Status`).
    """

    rel_gap: float = 1e-4
    node_limit: int | None = None
    threads: int = 1
    verbose: bool = False

    name = "scip"
    summary = "exact, by SCIP's branch and bound; for rows of some 100 inputs at most"
    patterns = (Pattern,)
    exact = True
    gives_bound = True
    requires = ("pyscipopt",)

    def __post_init__(self) -> None:
        if not self.rel_gap >= 0:
            raise InvalidInput(f"rel_gap={self.rel_gap} is negative; give 0 or more.")
        if self.node_limit is not None and self.node_limit < 1:
            raise InvalidInput(f"node_limit={self.node_limit} solves nothing; give at least 1.")
        if self.threads < 1:
            raise InvalidInput(f"threads={self.threads} solves nothing; give at least 1.")

    def _search(
        self,
        problem: MaskProblem,
        start: Tensor | None,
        clock: Clock,
        seed: int,
        callback: Callback | None,
    ) -> Outcome:
        trace = []
        if start is not None:
            trace.append(TracePoint(clock.seconds, float(problem.objective(start).sum())))
        answers: list[_Answer] = []
        done = 0
        with closing(self._answers(problem, start, clock, seed)) as arriving:
            for answer in arriving:
                answers.append(answer)
                done += len(answer.mask)
                if callback is not None:
                    callback(Progress(done, problem.shape[0], clock.seconds))
        bound = torch.cat([answer.bound for answer in answers])
        objective = float(torch.cat([answer.objective for answer in answers]).sum())
        trace.append(TracePoint(clock.seconds, objective, float(bound.sum())))
        return Outcome(
            mask=torch.cat([answer.mask for answer in answers]).to(problem.device),
            status=min((answer.status for answer in answers), key=_WEAKEST_FIRST.index),
            bound=bound.to(problem.device),
            stats={
                "nodes": sum(answer.nodes for answer in answers),
                "program_nodes": [answer.nodes for answer in answers],
                "program_times": [answer.seconds for answer in answers],
                "program_status": [answer.status.name for answer in answers],
            },
            trace=trace,
        )

    def _answers(
        self, problem: MaskProblem, start: Tensor | None, clock: Clock, seed: int
    ) -> Generator[_Answer]:
        """Solve all programs; their answers in the order of the rows."""
        rows = problem.shape[0]
        step = rows if problem.pattern.coupled else 1
        parts = [slice(at, at + step) for at in range(0, rows, step)]
        problem = problem.to("cpu")
        tasks = [
            partial(
                self._solve_part,
                problem.rows(part),
                None if start is None else start[part].cpu(),
                clock,
                math.ceil((len(parts) - at) / self.threads),
                seed,
            )
            for at, part in enumerate(parts)
        ]
        if self.threads == 1:
            for task in tasks:
                yield task()
            return
        pool = ThreadPoolExecutor(self.threads)
        try:
            for future in [pool.submit(task) for task in tasks]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _solve_part(
        self, part: MaskProblem, start: Tensor | None, clock: Clock, remaining: int, seed: int
    ) -> _Answer:
        """Solve one program in one of ``remaining`` equal shares of the time left."""
        clock = clock.part(1 / remaining)
        if start is None:
            start = part.pattern.round(Wanda().score(part))
        program = _Program.of(part, start)
        found = self._run_scip(program, start, clock, seed)
        mask, status = found.values.view(part.shape) > 0.5, found.status
        if not part.pattern.is_feasible(mask):  # by less than SCIP's tolerance
            mask, status = part.pattern.round(found.values.view(part.shape)), Status.FEASIBLE
        if float(part.objective(start).sum()) < float(part.objective(mask).sum()):
            mask = start
        objective = part.objective(mask)
        return _Answer(
            mask=mask,
            objective=objective,
            bound=shared_out(max(found.bound, program.least) * program.unit, objective),
            status=status,
            nodes=found.nodes,
            seconds=clock.seconds,
        )

    def _run_scip(self, program: _Program, start: Tensor, clock: Clock, seed: int) -> _Found:
        """Let SCIP solve a program from a start; what it found, in the program's units."""
        from pyscipopt import SCIP_PARAMSETTING

        model, mask = program.model(start)
        if clock.expired:
            return _Found(Status.TIME_LIMIT, start.double(), -math.inf, 0)
        model.hideOutput(not self.verbose)
        model.setHeuristics(SCIP_PARAMSETTING.FAST)  # half the time, from any start
        model.setParams(
            {
                "limits/gap": self.rel_gap,
                "limits/absgap": _FEASTOL,
                "limits/totalnodes": -1 if self.node_limit is None else self.node_limit,
                "limits/time": min(clock.remaining, 1e20),
                "numerics/feastol": _FEASTOL,
                "randomization/randomseedshift": seed % 2**31,
                # SCIP's handler of interrupts belongs to one model at a time.
                "misc/catchctrlc": self.threads == 1,
            }
        )
        model.optimizeNogil()
        outcome = model.getStatus()
        if outcome == "userinterrupt":
            raise KeyboardInterrupt
        if outcome == "infeasible":
            raise InvalidInput(f"No mask follows the pattern {program.pattern}; loosen it.")
        values = start.double()
        if model.getNSols() > 0:  # a limit may come before SCIP has looked at the start
            values = torch.tensor([model.getVal(variable) for variable in mask])
        return _Found(
            status=_STATUS.get(outcome, Status.FEASIBLE),
            values=values,
            bound=model.getDualbound() - _GUARD - program.missing,
            nodes=int(model.getNTotalNodes()),
        )


@dataclass(frozen=True)
class _Found:
    """What SCIP found: values of the mask, and a bound in the program's units."""

    status: Status
    values: Tensor
    bound: float
    nodes: int


@dataclass(frozen=True)
class _Answer:
    """A program's rows: bool mask ``[rows, d]``, float64 objective and bound ``[rows]``."""

    mask: Tensor
    objective: Tensor
    bound: Tensor
    status: Status
    nodes: int
    seconds: float


@dataclass(frozen=True)
class _Program:
    """One mixed-integer program: rows of a problem, divided by ``unit``.

    Attributes
    ----------
    factors
        ``F [rank, d]`` of each row.
    linear
        Float64 ``[rows, d]``.
    constraints
        Of the pattern.
    unit
        Loss of the start, or a thousandth of ``trace(Q) + sum |linear|`` if that is larger; 1 if
        both are 0.
    missing
        By how much the loss of a mask may be below what ``factors`` make of it.
    """

    factors: list[Floats]
    linear: Floats
    constraints: Constraints
    pattern: Pattern
    unit: float
    missing: float

    @classmethod
    def of(cls, problem: MaskProblem, start: Tensor) -> _Program:
        """The program of all rows of ``problem``, which is on the CPU."""
        weight, gram = problem.weight.double().numpy(), problem.gram.double().numpy()
        linear = np.zeros(problem.shape) if problem.linear is None else problem.linear.numpy()
        size = float((weight**2 * gram.diagonal()).sum() + np.abs(linear).sum())
        loss = abs(float(problem.objective(start).sum()))
        unit = max(loss, _LEAST_UNIT * size) or 1.0
        pairs = [_factor(w[:, None] * gram * w / unit) for w in weight]
        return cls(
            factors=[factor for factor, _ in pairs],
            linear=linear / unit,
            constraints=problem.pattern.constraints(problem.shape),
            pattern=problem.pattern,
            unit=unit,
            missing=sum(missing for _, missing in pairs),
        )

    @property
    def least(self) -> float:
        """A bound without any search: no quadratic loss, and all that pruning can gain."""
        return float(np.minimum(self.linear, 0).sum()) - self.missing

    def model(self, start: Tensor) -> tuple[Any, list[Any]]:
        """SCIP's model, which knows the mask ``start``, and its variables for the mask."""
        from pyscipopt import Model, quicksum

        model = Model()
        mask = [model.addVar(vtype="B", obj=-cost) for cost in self.linear.flat]
        model.addObjoffset(float(self.linear.sum()))
        self._constrain(model, mask)
        variables, values = list(mask), start.flatten().double().tolist()
        d = start.shape[1]
        for r, factor in enumerate(self.factors):
            outputs = [model.addVar(lb=None) for _ in factor]
            for output, row in zip(outputs, factor, strict=True):
                kept = quicksum(float(row[j]) * mask[r * d + int(j)] for j in row.nonzero()[0])
                model.addCons(output + kept == float(row.sum()))
            loss = model.addVar(obj=1.0)
            model.addCons(quicksum(output * output for output in outputs) <= loss)
            lost = factor @ (~start[r]).double().numpy()
            variables += [*outputs, loss]
            values += [*lost.tolist(), float(lost @ lost)]
        solution = model.createSol()
        for variable, value in zip(variables, values, strict=True):
            model.setSolVal(solution, variable, value)
        model.addSol(solution)
        return model, mask

    def _constrain(self, model: Any, mask: list[Any]) -> None:
        """Add the pattern, each constraint with a largest coefficient of 1."""
        from pyscipopt import quicksum

        for i, (lower, upper) in enumerate(
            zip(self.constraints.lower, self.constraints.upper, strict=True)
        ):
            index, coefficients = _entries(self.constraints, i)
            if len(index) == 0:
                continue
            size = np.abs(coefficients).max()
            total = quicksum(
                float(a) * mask[j] for j, a in zip(index, coefficients / size, strict=True)
            )
            if lower == upper:
                model.addCons(total == float(lower / size))
                continue
            if np.isfinite(lower):
                model.addCons(total >= float(lower / size))
            if np.isfinite(upper):
                model.addCons(total <= float(upper / size))


def _factor(matrix: Floats) -> tuple[Floats, float]:
    """Triangular ``F [rank, d]`` with ``F^T F`` close to a symmetric matrix, and what it lacks.

    The columns that matter most come last, where the triangle has the most entries.

    Returns
    -------
    F
        Of the nearest positive semi-definite matrix, less coefficients that SCIP ignores.
    missing
        Non-negative; ``x^T matrix x >= |F x|^2 - missing`` for every binary ``x``.
    """
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = eigenvalues > len(matrix) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
    root = np.sqrt(eigenvalues[kept])[:, None] * vectors[:, kept].T
    order = np.argsort(matrix.diagonal(), kind="stable")
    factor = np.zeros_like(root)
    if len(root):
        factor[:, order] = np.linalg.qr(root[:, order], mode="r")
    factor[np.abs(factor) < _EPSILON] = 0.0
    least = float(np.linalg.eigvalsh(matrix - factor.T @ factor)[0])
    return factor, max(0.0, -least) * len(matrix)


def _entries(constraints: Constraints, i: int) -> tuple[Any, Floats]:
    """Places and values of the coefficients of constraint ``i``."""
    part = slice(*constraints.matrix.indptr[i : i + 2])
    return constraints.matrix.indices[part], constraints.matrix.data[part]
