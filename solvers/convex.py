"""Reference relaxations by CVXPY, and bounds that do not depend on how well it solved them.

Of a conic solver's answer only a point and multipliers are used, never a value. Both enter a
bound (`_bound`) that holds for *any* point and multipliers: they decide how good it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import null_space
from scipy.sparse import csr_array, diags_array, vstack
from torch import Tensor

from .clock import Clock
from .errors import InvalidInput
from .pattern import CellPattern, Constraints, Pattern
from .problem import MaskProblem
from .registry import register
from .rounding import gamma, least_shift, proves_semidefinite
from .solution import Evidence, Status
from .solver import Outcome, Search, Solver
from .standing import Standing
from .swap import Swap
from .threads import quiet_warnings

Floats = npt.NDArray[np.float64]

_SOLVER = {"qp": "CLARABEL", "sdp": "SCS"}
"""Conic solvers that answer alike every time; only SCS is fast on dense semidefinite programs."""

_WIDEST = {False: 500, True: 200}
"""Inputs that "sdp" takes, without and with cuts: beyond, CVXPY alone needs minutes."""

_SECONDS_AN_ENTRY = 5e-7
"""What an entry of a quadratic form costs CVXPY before its solver begins, measured."""

_SETTINGS: dict[str, dict[str, Any]] = {"SCS": {"eps_abs": 1e-6, "eps_rel": 1e-6}}

_TIME_LIMIT = {
    "CLARABEL": "time_limit",
    "HIGHS": "time_limit",
    "OSQP": "time_limit",
    "SCS": "time_limit_secs",
}
"""What a conic solver calls its limit in seconds; others are not interrupted."""


@register
@dataclass(frozen=True)
class Cvxpy(Solver):
    """A convex relaxation by CVXPY, rounded, and the bound that it proves.

    With ``x = 1 - m``, "qp" minimises the loss over ``0 <= x <= 1`` and the pattern's
    constraints. "sdp" has a matrix ``Y`` in place of ``x x^T`` (Billionnet, Elloumi and
    Plateau, 2009):

        min <Q, Y> + linear^T x,  diag(Y) = x,  Y a = p x wherever the pattern has a^T x = p,
        [1 x^T; x Y] positive semi-definite

    and with ``cuts`` also ``max(0, x_i + x_j - 1) <= Y_ij <= x_i`` (McCormick).

    Parameters
    ----------
    relaxation
        "qp", for any pattern, or "sdp", where rows do not share a budget.
    cuts
        Whether "sdp" has the inequalities on ``Y_ij``: a far better bound, in far more time.
    cvxpy_solver
        A name out of `cvxpy.installed_solvers`; None takes Clarabel for "qp", SCS for "sdp".

    Notes
    -----
    The time left is divided evenly over the programs that remain: one per row, or one for rows
    that share a budget; a program that cannot be expected to end in it is not begun. No answer is
    worse than rounded Frank-Wolfe's, with swaps, nor a bound than that of the plain relaxation.

    The bound is the least value, over the pattern, of a linear function that lies below the
    loss, less what rounding may have changed. For `Linear` the least value is HiGHS's claim.

    ``stats``: ``program_status``, what CVXPY said about each program.
    """

    relaxation: Literal["qp", "sdp"] = "qp"
    cuts: bool = False
    cvxpy_solver: str | None = None

    name = "cvxpy"
    summary = "quadratic or semidefinite relaxation by CVXPY, rounded; a reference for bounds"
    patterns = (Pattern,)
    gives_bound = True
    requires = ("cvxpy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuts and self.relaxation == "qp":
            raise InvalidInput("cuts belong to relaxation 'sdp'; 'qp' has no matrix Y.")

    def prepare(self, device: torch.device) -> None:
        import cvxpy as cp

        Swap().prepare(device)
        cp.installed_solvers()

    def refuse(self, problem: MaskProblem) -> str | None:
        d = problem.shape[1]
        if self.relaxation == "sdp" and d > _WIDEST[self.cuts]:
            return (
                f"Solver 'cvxpy' takes at most {_WIDEST[self.cuts]} inputs in relaxation 'sdp'"
                f"{' with cuts' * self.cuts}, not {d}: its program would have {d * d} entries; "
                "take the solver 'semidefinite'."
            )
        return None

    def _search(self, search: Search) -> Outcome:
        problem, clock = search.problem, search.clock
        self._check(problem)
        standing = Standing(search)
        units, on_cpu = standing.units, problem.to("cpu")
        polytope = _Polytope.of(problem.pattern.constraints((len(units[0]), problem.shape[1])))
        cells = isinstance(problem.pattern, CellPattern)
        evidence = Evidence.GUARDED if cells else Evidence.CLAIMED
        statuses = []
        longest = _SECONDS_AN_ENTRY * len(units[0]) * problem.shape[1] ** 2
        for unit, rows in enumerate(units):
            share = clock.part(1 / (len(units) - unit))
            if clock.remaining <= longest:  # about what the next one takes, whatever its limit
                statuses.append("user_limit")
                continue
            part, mask = on_cpu.rows(rows), standing.mask[rows].cpu()
            status, relaxed, total = self._relax(part, polytope, mask, share)
            statuses.append(status)
            longest = max(longest, share.seconds)
            standing.offer(rows, part.pattern.round(1 - relaxed).to(problem.device))
            standing.raise_bound(unit, total, evidence)
            standing.note(rows[-1] + 1)
        limited = Status.TIME_LIMIT if "user_limit" in statuses else Status.FEASIBLE
        return standing.outcome(limited, {"program_status": statuses})

    def _check(self, problem: MaskProblem) -> None:
        """Refuse what is known before any program is solved."""
        import cvxpy as cp

        if self.relaxation == "sdp" and problem.pattern.coupled and problem.shape[0] > 1:
            raise InvalidInput(
                f"The relaxation 'sdp' cannot do {problem.pattern} over {problem.shape[0]} rows; "
                "take relaxation 'qp', or the solver 'scip' or 'semidefinite'."
            )
        installed = cp.installed_solvers()
        if self.cvxpy_solver is not None and self.cvxpy_solver not in installed:
            raise InvalidInput(
                f"CVXPY has no solver '{self.cvxpy_solver}' here, only {', '.join(installed)}."
            )

    def _relax(
        self, part: MaskProblem, polytope: _Polytope, mask: Tensor, clock: Clock
    ) -> tuple[str, Tensor, float]:
        """Solve one program.

        Returns
        -------
        status
            CVXPY's.
        relaxed
            Float64 ``[rows, d]``: what it prunes; ``1 - mask`` if there is no answer.
        bound
            On the summed loss of the rows.
        """
        import cvxpy as cp

        plain, unit = _quadratics(part)
        x = cp.Variable(part.shape[0] * part.shape[1])
        pruned = (~mask).double().flatten().numpy()
        # A single weight has no products, of which the matrix Y would be made.
        if self.relaxation == "qp" or part.weight.numel() == 1:
            status = self._run(_quadratic_program(x, plain, polytope), clock, "qp")
            choices = [plain]
        else:
            program, multipliers = _semidefinite_program(x, plain[0], polytope, self.cuts)
            status = self._run(program, clock, "sdp")
            choices = [plain, [multipliers.minorant(plain[0])]]
        if x.value is not None and np.isfinite(x.value).all():
            pruned = x.value.clip(0, 1)
        bounds = [_bound(part, minorants, polytope, pruned) for minorants in choices]
        return status, torch.from_numpy(pruned).view(part.shape), max(bounds) * unit

    def _run(self, program: Any, clock: Clock, relaxation: str) -> str:
        """Solve a program of CVXPY's; its status, "user_limit" where the time was up."""
        import cvxpy as cp

        name = self.cvxpy_solver or _SOLVER[relaxation]
        settings = dict(_SETTINGS.get(name, {}))
        if clock.remaining <= 0:
            return str(cp.settings.USER_LIMIT)
        if math.isfinite(clock.remaining) and name in _TIME_LIMIT:
            settings[_TIME_LIMIT[name]] = clock.remaining
        try:
            # That an answer may be inaccurate is in its status.
            with quiet_warnings("Solution may be inaccurate"):
                program.solve(solver=name, **settings)
        except cp.error.SolverError as error:
            if self.cvxpy_solver is None:
                return str(cp.settings.SOLVER_ERROR)
            raise InvalidInput(
                f"CVXPY's solver {name} cannot do relaxation '{relaxation}' ({error}); "
                "take another."
            ) from error
        if program.status != cp.settings.OPTIMAL and clock.remaining <= 0:
            return str(cp.settings.USER_LIMIT)
        return str(program.status)


@dataclass(frozen=True)
class _Minorant:
    """``x^T matrix x + linear^T x + constant``: at most the loss, for every allowed mask."""

    matrix: Floats
    linear: Floats
    constant: float = 0.0

    def convex(self, basis: Floats | None) -> _Minorant:
        """Equal for binary ``x``, and convex along ``basis`` (None: everywhere).

        Since ``x_i^2 = x_i``, any multiple of ``sum x_i - x_i^2`` may be added.
        """
        inner = self.matrix if basis is None else basis.T @ self.matrix @ basis
        if not inner.any():
            return self
        # What restricting to an orthonormal basis may have changed.
        error = 16 * gamma(len(self.matrix) + 8) * float(np.linalg.norm(self.matrix))
        eye = np.eye(len(inner))
        shift = least_shift(
            lambda s: proves_semidefinite(torch.from_numpy(inner + s * eye), error),
            max(0.0, error - float(np.linalg.eigvalsh(inner)[0])),
            error,
        )
        return replace(
            self,
            matrix=self.matrix + shift * np.eye(len(self.matrix)),
            linear=self.linear - shift,
        )

    def tangent(self, x: Floats) -> tuple[Floats, float]:
        """Gradient and constant of the linear function that touches it at ``x``."""
        product = self.matrix @ x
        return 2 * product + self.linear, self.constant - float(x @ product)

    @property
    def magnitude(self) -> float:
        """No partial sum of a value, or of a tangent's, exceeds a few times this."""
        total = np.abs(self.matrix).sum() + np.abs(self.linear).sum() + abs(self.constant)
        return float(total)


@dataclass(frozen=True)
class _Polytope:
    """``equal @ x = total`` and ``above @ x >= least``: a pattern in terms of ``x = 1 - m``.

    Every constraint has a largest coefficient of 1.
    """

    equal: csr_array
    total: Floats
    above: csr_array
    least: Floats

    @classmethod
    def of(cls, constraints: Constraints) -> _Polytope:
        """The polytope of a pattern's constraints."""
        size = abs(constraints.matrix).max(axis=1).toarray().ravel()
        rows = size > 0
        size = size[rows]
        matrix = csr_array(diags_array(1 / size) @ constraints.matrix[rows])
        everything = matrix.sum(axis=1)
        # m <= upper means x >= everything - upper, and m >= lower the same for -x.
        least = everything - constraints.upper[rows] / size
        most = everything - constraints.lower[rows] / size
        equal = least == most
        low, high = ~equal & np.isfinite(least), ~equal & np.isfinite(most)
        return cls(
            equal=matrix[equal],
            total=least[equal],
            above=csr_array(vstack([matrix[low], -matrix[high]])),
            least=np.concatenate([least[low], -most[high]]),
        )

    @cached_property
    def basis(self) -> Floats:
        """Orthonormal columns that span the directions in which all equations keep holding."""
        basis: Floats = null_space(self.equal.toarray())
        return basis

    def project(self, x: Floats) -> Floats:
        """Nearest point on which the equations hold."""
        dense = self.equal.toarray()
        step: Floats = np.linalg.lstsq(dense, self.total - dense @ x, rcond=None)[0]
        return x + step

    def restrict(self, x: Any) -> list[Any]:
        """The polytope as CVXPY's constraints on ``x``."""
        constraints = [x >= 0, x <= 1]
        if len(self.total):
            constraints.append(self.equal @ x == self.total)
        if len(self.least):
            constraints.append(self.above @ x >= self.least)
        return constraints


@dataclass(frozen=True)
class _Multipliers:
    """CVXPY's constraints ``diag(Y) = x``, and the cuts on ``Y[i, j]`` at ``above_diagonal``.

    The cuts are ``Y_ij >= 0``, ``Y_ij <= x_i``, ``Y_ij <= x_j`` and ``Y_ij >= x_i + x_j - 1``.
    """

    diagonal: Any
    above_diagonal: tuple[Any, Any]
    cuts: tuple[Any, ...]

    def minorant(self, loss: _Minorant) -> _Minorant:
        """The Lagrangian for ``Y = x x^T``: below ``loss`` where ``x`` is binary.

        Any multipliers do for the equations, and any that are non-negative for the cuts.
        """
        multiplier = _value(self.diagonal)
        matrix, linear = loss.matrix + np.diag(multiplier), loss.linear - multiplier
        constant = loss.constant
        if self.cuts:
            i, j = self.above_diagonal
            positive, below_i, below_j, both = (_value(cut).clip(0) for cut in self.cuts)
            half = (below_i + below_j - positive - both) / 2
            matrix[i, j] += half
            matrix[j, i] += half
            np.add.at(linear, i, both - below_i)
            np.add.at(linear, j, both - below_j)
            constant -= float(both.sum())
        return _Minorant(matrix, linear, constant)


def _value(constraint: Any) -> Floats:
    """A constraint's multiplier; zeros if CVXPY has none."""
    value = constraint.dual_value
    if value is None or not np.isfinite(value).all():
        return np.zeros(constraint.shape)
    return np.array(value, dtype=np.float64)


def _quadratics(problem: MaskProblem) -> tuple[list[_Minorant], float]:
    """Losses of the rows divided by ``trace(Q) + sum |linear|`` of all, and that number."""
    weight, gram = problem.weight.double().numpy(), problem.gram.double().numpy()
    linear = np.zeros(problem.shape) if problem.linear is None else problem.linear.numpy()
    unit = float((weight**2 * gram.diagonal()).sum() + np.abs(linear).sum()) or 1.0
    pairs = zip(weight, linear, strict=True)
    return [_Minorant(w[:, None] * gram * w / unit, cost / unit) for w, cost in pairs], unit


def _quadratic_program(x: Any, losses: list[_Minorant], polytope: _Polytope) -> Any:
    """Least summed loss in the polytope; ``x`` has the rows after one another."""
    import cvxpy as cp

    d = len(losses[0].linear)
    terms = []
    for r, loss in enumerate(losses):
        row = x[r * d : (r + 1) * d]
        terms.append(cp.quad_form(row, cp.psd_wrap(loss.matrix)) + loss.linear @ row)
    return cp.Problem(cp.Minimize(cp.sum(terms)), polytope.restrict(x))


def _semidefinite_program(
    x: Any, loss: _Minorant, polytope: _Polytope, cuts: bool
) -> tuple[Any, _Multipliers]:
    """The semidefinite relaxation of one row, and where its multipliers will be."""
    import cvxpy as cp

    d = len(loss.linear)
    lifted = cp.Variable((d + 1, d + 1), PSD=True)
    Y = lifted[1:, 1:]
    diagonal = cp.diag(Y) == x
    constraints = [*polytope.restrict(x), lifted[0, 0] == 1, lifted[0, 1:] == x, diagonal]
    if len(polytope.total):
        product = cp.reshape(x, (d, 1), order="C") @ polytope.total[None]
        constraints.append(product == Y @ polytope.equal.toarray().T)
    i, j = np.triu_indices(d, 1)
    cut_constraints: tuple[Any, ...] = ()
    if cuts:
        pair = Y[i, j]
        cut_constraints = (pair >= 0, pair <= x[i], pair <= x[j], pair >= x[i] + x[j] - 1)
    objective = cp.sum(cp.multiply(loss.matrix, Y)) + loss.linear @ x
    program = cp.Problem(cp.Minimize(objective), [*constraints, *cut_constraints])
    return program, _Multipliers(diagonal, (i, j), cut_constraints)


def _bound(
    problem: MaskProblem, minorants: list[_Minorant], polytope: _Polytope, pruned: Floats
) -> float:
    """Least value over the pattern of the tangents at a point, which lie below the loss.

    Parameters
    ----------
    problem
        The rows.
    minorants
        Of every row.
    polytope
        Of the pattern.
    pruned
        The point, ``[rows * d]``: any will do, a minimiser does best.
    """
    # Where rows are coupled, the equations say nothing about one row alone; and only those of
    # cells are surely well-conditioned.
    cells = isinstance(problem.pattern, CellPattern)
    basis = polytope.basis if cells and len(minorants) == 1 else None
    points = polytope.project(pruned).reshape(problem.shape)
    convex = [minorant.convex(basis) for minorant in minorants]
    pairs = [minorant.tangent(x) for minorant, x in zip(convex, points, strict=True)]
    gradient = np.stack([gradient for gradient, _ in pairs])
    constant = sum(constant for _, constant in pairs)
    vertex = problem.pattern.lmo(torch.from_numpy(-gradient)).numpy()
    # Sums of some d products each, of rows scaled once, at points that are off by rounding.
    rounding = 8 * gamma(problem.weight.numel() + 16) * sum(one.magnitude for one in convex)
    return float(gradient[~vertex].sum()) + constant - rounding
