"""Exact masks by SCIP: a mixed-integer program per row, or one for a layer with one budget."""

from __future__ import annotations

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .clock import Clock
from .options import option
from .pattern import CellPattern, Constraints, Pattern
from .problem import MaskProblem
from .registry import register
from .semidefinite.solver import too_large
from .solution import Evidence, Status, is_closed
from .solver import Outcome, Search, Solver
from .standing import Incumbent, Standing

if TYPE_CHECKING:
    from .semidefinite.reformulation import Reformulation

Floats = npt.NDArray[np.float64]

_FEASTOL = 1e-7
"""By how much SCIP may violate a constraint of the scaled program (its own default is 1e-6)."""

_GUARD = 1e-6
"""Taken off SCIP's dual bound, in units of the scaled program, for these violations."""

_LEAST_UNIT = 5e-4
"""Smallest unit of a program, as a share of the start's `MaskProblem.scale`: keeps ``F`` moderate.

The guard is then half of `solution.ABSOLUTE_GAP`, so that an optimum of 0 is recognised as one.
"""

_PAYS = range(64, 1025)
"""Inputs of a row that is reformulated by default: below, SCIP alone is about as quick."""

_ROOT_SHARE = 0.3
"""Share of the time for the reformulation."""

_EPSILON = 1e-9
"""Coefficients that SCIP takes for zero."""

_MOST_TERMS = 8_000_000
"""Terms of a program, at most."""

_BYTES_A_TERM = 400
_SECONDS_A_TERM = 4e-6
"""What a term costs while the model is built, measured: 2 to 4 microseconds."""

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

    Before SCIP sees a program whose pattern has cells, ``Q`` and ``linear`` are replaced by the
    quadratic convex reformulation (`solvers.semidefinite.reformulation`): equal at every allowed
    mask, with a far better relaxation. If the semidefinite bound with cuts already proves the
    best mask known, SCIP is not called at all.

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
    reformulation
        Whether to reformulate; None for where it pays: rows of 64 to 1024 inputs. A shared budget
        is not reformulated by default, because the form loses the blocks that the rows are.

    Notes
    -----
    The time left is divided evenly over the programs that remain.

    SCIP begins with the best of the start, rounded Frank-Wolfe and swaps from both; for `Linear`
    with the best of the start and Wanda's mask. A program that cannot be built in the time left
    is not built.

    The bound is SCIP's claim (`Evidence.CLAIMED`), not a certificate: SCIP computes in floating
    point and lets every constraint be violated by 1e-7, on a program scaled so that its first
    mask costs about 1. The bound is therefore lowered by 1e-6 of that cost, and by what ``F``
    lacks of ``Q`` (negative eigenvalues of a rounded Gram matrix cannot be in it). The bounds of
    the plain relaxation and of the reformulation need no such trust, and count where higher.

    Where a coefficient of a `Linear` constraint is below 1e-7 of the largest, SCIP may end at masks
    that are not allowed; the nearest one that is is then the answer, `Status.FEASIBLE`, with a gap.

    ``stats``: ``nodes`` of all trees, and lists with one entry per program: ``program_nodes``,
    ``program_times`` (seconds) and ``program_status`` (names of `Status`).
    """

    rel_gap: float = option(1e-4, least=0)
    node_limit: int | None = option(None, least=1)
    threads: int = option(1, least=1)
    verbose: bool = False
    reformulation: bool | None = None

    name = "scip"
    summary = "exact, by SCIP's branch and bound; for rows of some 100 inputs at most"
    patterns = (Pattern,)
    exact = True
    rowwise = True
    gives_bound = True
    requires = ("pyscipopt",)

    def prepare(self, device: torch.device) -> None:
        import pyscipopt  # noqa: F401

        from .semidefinite import Semidefinite

        Semidefinite().prepare(device)

    def refuse(self, problem: MaskProblem) -> str | None:
        terms = _terms(problem)
        if terms > _MOST_TERMS:
            return (
                f"Solver 'scip' would get a program of {terms / 1e6:.0f} million terms, some "
                f"{terms * _BYTES_A_TERM / 2**30:.1f} GiB; take fewer rows or inputs, or the "
                "solver 'semidefinite'."
            )
        if self.reformulation and problem.pattern.coupled:
            return too_large(self.name, problem, "leave out reformulation=True")
        return None

    def _search(self, search: Search) -> Outcome:
        standing = Standing(search)
        answers: list[_Answer] = []
        with closing(self._answers(standing, search.seed)) as arriving:
            for unit, answer in enumerate(arriving):
                answers.append(answer)
                rows = standing.units[unit]
                standing.offer(rows, answer.mask.to(search.problem.device))
                for bound, evidence in answer.bounds:
                    standing.raise_bound(unit, bound, evidence)
                standing.note(rows[-1] + 1)
        statuses = [answer.status for answer in answers]
        return standing.outcome(
            min(statuses, key=_WEAKEST_FIRST.index),
            {
                "nodes": sum(answer.nodes for answer in answers),
                "program_nodes": [answer.nodes for answer in answers],
                "program_times": [answer.seconds for answer in answers],
                "program_status": [status.name for status in statuses],
            },
        )

    def _answers(self, standing: Standing, seed: int) -> Generator[_Answer]:
        """Solve all programs; their answers in the order of the rows."""
        problem, units = standing.problem.to("cpu"), standing.units
        closed = standing.closed(self.rel_gap).tolist()
        mask, relaxed = standing.mask.cpu(), standing.relaxed.cpu()

        def task(unit: int) -> _Answer:
            rows = units[unit]
            if closed[unit]:
                return _Answer(mask[rows], [], Status.OPTIMAL, 0, 0.0)
            clock = standing.clock.part(1 / math.ceil((len(units) - unit) / self.threads))
            x = relaxed[rows].flatten().numpy()
            return self._solve_part(problem.rows(rows), mask[rows], x, clock, seed)

        if self.threads == 1:
            for unit in range(len(units)):
                yield task(unit)
            return
        pool = ThreadPoolExecutor(self.threads)
        try:
            for future in [pool.submit(task, unit) for unit in range(len(units))]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _solve_part(
        self, part: MaskProblem, start: Tensor, x: Floats, clock: Clock, seed: int
    ) -> _Answer:
        """Solve one program; ``x`` ``[weights]`` is where the plain relaxation is about least."""
        proven = -math.inf
        if clock.remaining <= _SECONDS_A_TERM * _terms(part):
            return _Answer(start, [], Status.TIME_LIMIT, 0, clock.seconds)
        if self._reformulates(part):
            program, start, proven = self._reformulated(part, start, x, clock)
        else:
            program = _Program.of(part, start)
        known = [(proven, Evidence.GUARDED)]
        total = float(part.objective(start).sum())
        if total - proven <= self.rel_gap * abs(total):
            return _Answer(start, known, Status.OPTIMAL, 0, clock.seconds)
        if clock.remaining <= _SECONDS_A_TERM * _terms(part):
            return _Answer(start, known, Status.TIME_LIMIT, 0, clock.seconds)
        found = self._run_scip(program, start, clock, seed)
        mask, status = found.values.view(part.shape) > 0.5, found.status
        if not part.pattern.is_feasible(mask):  # by less than SCIP's tolerance
            mask, status = part.pattern.round(found.values.view(part.shape)), Status.FEASIBLE
        if total < float(part.objective(mask).sum()):
            mask = start
        bounds = [*known, (found.bound * program.unit, Evidence.CLAIMED)]
        if status is Status.OPTIMAL and self._too_coarse(part, mask, bounds, program.unit):
            return self._solve_part(part, mask, x, clock, seed)
        return _Answer(mask, bounds, status, found.nodes, clock.seconds)

    def _too_coarse(
        self, part: MaskProblem, mask: Tensor, bounds: list[tuple[float, Evidence]], unit: float
    ) -> bool:
        """Whether the guard leaves a gap that a smaller unit, from this mask, would close.

        The guard is a share of what the start cost, which may be far more than the optimum.
        """
        best = torch.tensor(max(bound for bound, _ in bounds), dtype=torch.float64)
        objective, scale = part.objective(mask).sum(), part.scale(mask).sum()
        closed = bool(is_closed(objective, best, scale, self.rel_gap))
        return not closed and _unit(part, mask) < unit / 2

    def _reformulates(self, part: MaskProblem) -> bool:
        if not isinstance(part.pattern, CellPattern):
            return False
        pays = not part.pattern.coupled and part.shape[1] in _PAYS
        return pays if self.reformulation is None else self.reformulation

    def _reformulated(
        self, part: MaskProblem, start: Tensor, x: Floats, clock: Clock
    ) -> tuple[_Program, Tensor, float]:
        """The reformulated program, a better start, and what the semidefinite dual proves."""
        from .semidefinite.ascent import Effort
        from .semidefinite.program import BinaryProgram
        from .semidefinite.reformulation import reformulate

        incumbent = Incumbent(part, start, clock)
        program, binary = _Program.of(part, start), BinaryProgram.of(part)
        equal, cut = (
            reformulate(
                binary,
                incumbent.total,
                Effort(
                    max_rounds=120,
                    clock=clock.part(_ROOT_SHARE / 2),
                    least_gain=0.15,
                    triangles_above=0.02,
                    cuts=cuts,
                ),
                unit=program.unit,
                rel_gap=self.rel_gap,
                relaxed=x,
                improved=incumbent.improve,
            )
            for cuts in (False, True)
        )
        reformulated = program.reformulated(equal, binary.cell_normals())
        return reformulated, incumbent.mask, max(equal.bound, cut.bound)

    def _run_scip(self, program: _Program, start: Tensor, clock: Clock, seed: int) -> _Found:
        """Let SCIP solve a program from a start; what it found, in the program's units."""
        from pyscipopt import SCIP_PARAMSETTING

        model, mask = program.model(start)
        if clock.expired:
            return _Found(Status.TIME_LIMIT, start.double(), -math.inf, 0)
        # What the guards take off SCIP's bound must not reopen the gap.
        gap = max(0.0, 0.9 * self.rel_gap - 2 * (_GUARD + program.missing))
        model.hideOutput(not self.verbose)
        model.setHeuristics(SCIP_PARAMSETTING.FAST)  # half the time, from any start
        model.setParams(
            {
                "limits/gap": gap,
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
        values = start.double()
        if outcome == "infeasible":  # a start is feasible: SCIP's tolerances say otherwise
            return _Found(Status.FEASIBLE, values, -math.inf, 0)
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
    """A program's rows: bool mask ``[rows, d]``, and bounds with what they rest on."""

    mask: Tensor
    bounds: list[tuple[float, Evidence]]
    status: Status
    nodes: int
    seconds: float


@dataclass(frozen=True)
class _Block:
    """A term ``|F (x - centre)|^2`` of the loss.

    Attributes
    ----------
    factor
        ``F [rank, n]``.
    centre
        ``[n]``.
    inputs
        Places of these x among all weights.
    """

    factor: Floats
    centre: Floats
    inputs: slice


@dataclass(frozen=True)
class _Program:
    """One mixed-integer program: rows of a problem, divided by ``unit``.

    With ``x = 1 - mask``, flat: ``sum |F (x - centre)|^2 + linear^T x + constant``.

    Attributes
    ----------
    blocks
        The squares.
    linear
        Float64 ``[rows * d]``.
    constant
        Of the loss.
    constraints
        Of the pattern.
    unit
        Loss of the start, or `_LEAST_UNIT` of its `MaskProblem.scale` if that is larger.
    missing
        By how much the loss of a mask may be below what ``blocks`` make of it.
    """

    blocks: list[_Block]
    linear: Floats
    constant: float
    constraints: Constraints
    unit: float
    missing: float

    @classmethod
    def of(cls, problem: MaskProblem, start: Tensor) -> _Program:
        """The program of all rows of ``problem``, which is on the CPU."""
        weight, gram = problem.weight.double().numpy(), problem.gram.double().numpy()
        linear = np.zeros(problem.shape) if problem.linear is None else problem.linear.numpy()
        unit = _unit(problem, start)
        forms = [w[:, None] * gram * w / unit for w in weight]
        # x_i^2 = x_i: the linear term pays for what makes a rounded Gram matrix semi-definite.
        shifts = [max(0.0, -float(np.linalg.eigvalsh(form)[0])) for form in forms]
        d = problem.shape[1]
        pairs = [
            _factor(form + shift * np.eye(d)) for form, shift in zip(forms, shifts, strict=True)
        ]
        missing = sum(missing for _, missing in pairs)
        return cls(
            blocks=[
                _Block(factor, np.zeros(d), slice(r * d, (r + 1) * d))
                for r, (factor, _) in enumerate(pairs)
            ],
            linear=(linear / unit - np.array(shifts)[:, None]).ravel(),
            constant=0.0,
            constraints=problem.pattern.constraints(problem.shape),
            unit=unit,
            missing=missing,
        )

    def reformulated(self, found: Reformulation, normals: Floats) -> _Program:
        """The same program with a form of equal values in place of the loss.

        The form is convex only where the cells' sums hold. There, ``x - centre`` is orthogonal
        to the ``normals`` (orthonormal ``[weights, cells]``) if the centre keeps the sums too;
        so they are projected out of the square. The centre is where the form is about least:
        SCIP's first tangent then gives about the semidefinite bound.
        """
        from .semidefinite.dual import projected

        form, sizes = found.form, (normals != 0).sum(axis=0)
        ones = self.constraints.matrix.sum(axis=1) - self.constraints.upper
        relaxed = np.clip(found.relaxed, 0.0, 1.0)
        sums = self.constraints.matrix @ relaxed
        centre = relaxed - normals @ ((sums - ones) / np.sqrt(sizes))
        factor, missing = _factor(projected(form.quadratic, normals))
        slope = 2 * form.quadratic @ centre + form.linear
        here = form.value(centre)
        return replace(
            self,
            blocks=[_Block(factor, centre, slice(0, len(centre)))],
            linear=slope,
            constant=here - float(slope @ centre),
            missing=missing,
        )

    def model(self, start: Tensor) -> tuple[Any, list[Any]]:
        """SCIP's model, which knows the mask ``start``, and its variables for the mask."""
        from pyscipopt import Model, quicksum

        model = Model()
        mask = [model.addVar(vtype="B", obj=-cost) for cost in self.linear]
        model.addObjoffset(self.constant + float(self.linear.sum()))
        self._constrain(model, mask)
        kept = start.flatten().double().numpy()
        variables, values = list(mask), kept.tolist()
        for block in self.blocks:
            outputs = [model.addVar(lb=None) for _ in block.factor]
            some, dense = mask[block.inputs], block.factor @ (1.0 - block.centre)
            for output, row, total in zip(outputs, block.factor, dense, strict=True):
                taken = quicksum(float(row[j]) * some[int(j)] for j in row.nonzero()[0])
                model.addCons(output + taken == float(total))
            loss = model.addVar(obj=1.0)
            model.addCons(quicksum(output * output for output in outputs) <= loss)
            lost = dense - block.factor @ kept[block.inputs]
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


def _unit(problem: MaskProblem, mask: Tensor) -> float:
    """What a program is divided by, given its first mask."""
    loss = abs(float(problem.objective(mask).sum()))
    scale = float(problem.scale(mask).sum()) or float(problem.scale().sum())
    return max(loss, _LEAST_UNIT * scale) or 1.0


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


def _terms(problem: MaskProblem) -> int:
    """Coefficients of the largest program that SCIP gets: a triangle per row."""
    rows, d = problem.shape
    return (rows if problem.pattern.coupled else 1) * d * d // 2


def _entries(constraints: Constraints, i: int) -> tuple[Any, Floats]:
    """Places and values of the coefficients of constraint ``i``."""
    part = slice(*constraints.matrix.indptr[i : i + 2])
    return constraints.matrix.indices[part], constraints.matrix.data[part]
