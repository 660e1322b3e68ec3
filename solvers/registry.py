"""The one front door: solvers by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .arrays import ArrayLike
from .clock import Clock
from .errors import InvalidInput
from .linear import Linear
from .pattern import NM, Pattern, PerLayer, PerRow
from .problem import MaskProblem
from .solution import MaskSolution
from .solver import Callback, Solver

_SOLVERS: dict[str, type[Solver]] = {}

_S = TypeVar("_S", bound=type[Solver])


def register(solver: _S) -> _S:
    """Class decorator: make a solver known by its name."""
    _SOLVERS[solver.name] = solver
    in_order = sorted(_SOLVERS.values(), key=_rank)
    _SOLVERS.clear()
    _SOLVERS.update({known.name: known for known in in_order})
    return solver


def _rank(solver: type[Solver]) -> tuple[bool, bool, bool, bool, str]:
    """Simple ones first: saliencies, searches, compositions, bounds, exact solvers."""
    return solver.exact, solver.gives_bound, solver.composite, solver.needs_start, solver.name


@dataclass(frozen=True)
class SolverInfo:
    """What a solver is, what it can do, and why it cannot run here (None if it can)."""

    name: str
    summary: str
    patterns: tuple[str, ...]
    exact: bool
    gives_bound: bool
    needs_start: bool
    options: tuple[str, ...]
    unavailable: str | None


def available() -> tuple[SolverInfo, ...]:
    """All solvers with their abilities, simple ones first."""
    return tuple(
        SolverInfo(
            name=s.name,
            summary=s.summary,
            patterns=tuple(
                kind.__name__
                for kind in (PerRow, NM, PerLayer, Linear)
                if issubclass(kind, s.patterns)
            ),
            exact=s.exact,
            gives_bound=s.gives_bound,
            needs_start=s.needs_start,
            options=s.options(),
            unavailable=s.unable(),
        )
        for s in _SOLVERS.values()
    )


def available_for(pattern: Pattern) -> tuple[str, ...]:
    """Names of the solvers that take a pattern and can run here."""
    return tuple(
        name
        for name, solver in _SOLVERS.items()
        if isinstance(pattern, solver.patterns) and solver.unable() is None
    )


def get_solver(name: str, **options: Any) -> Solver:
    """The solver of that name, with options.

    Raises
    ------
    InvalidInput
        If the name or an option is unknown; the sentence lists the known ones.
    """
    solver = _SOLVERS.get(name) if isinstance(name, str) else None
    if solver is None:
        raise InvalidInput(f"There is no solver '{name}'; the solvers are {', '.join(_SOLVERS)}.")
    unknown = options.keys() - set(solver.options())
    if unknown:
        known = ", ".join(solver.options()) or "none"
        raise InvalidInput(
            f"Solver '{name}' has no option '{sorted(unknown)[0]}'; its options are: {known}."
        )
    return solver(**options)


def prepare(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Import and compile ahead of any solve what every solver that can run here needs.

    Compiled kernels for the CPU are kept on disk (numba's cache, ``__pycache__`` beside the code or
    ``NUMBA_CACHE_DIR``), so that one call after installation serves all later processes.

    Parameters
    ----------
    device
        To prepare for.

    Returns
    -------
    tuple of str
        Names of the solvers that are ready.
    """
    ready = [name for name, solver in _SOLVERS.items() if solver.unable() is None]
    for name in ready:
        get_solver(name).prepare(torch.device(device))
    return tuple(ready)


DEFAULT_START = "wanda"
"""Where a solver that needs a start begins when none is given."""


def solve(
    problem: MaskProblem,
    solver: str,
    *,
    start: str | ArrayLike | MaskSolution | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    **options: Any,
) -> MaskSolution:
    """Choose masks for a problem.

    Parameters
    ----------
    problem
        Rows, Gram matrix and pattern.
    solver
        A name out of `available`.
    start
        Where to begin: a mask (bool ``[rows, d]``), a solution (its mask) or the name of another
        solver. None leaves it to the solver; one that needs a start then begins at
        `DEFAULT_START`.
    time_limit
        Seconds, for a start given by name and ``solver`` together. Imports and just-in-time
        compilation do not count.
    seed
        Of whatever is drawn at random: a whole number in 0..2^63-1.
    callback
        Called with `Progress`.
    **options
        The solver's own options.

    Returns
    -------
    MaskSolution
        With the objective recomputed in float64.

    Raises
    ------
    InvalidInput
        If a name, an option or the start is wrong, or the solver cannot do this pattern.

    Examples
    --------
    >>> import torch
    >>> from solvers import MaskProblem, PerRow, solve
    >>> x = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    >>> w = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    >>> problem = MaskProblem(w, x @ x.T / 200, PerRow(sparsity=0.5))
    >>> solve(problem, "swap", start="wanda").status.name
    'LOCAL_OPTIMUM'
    """
    chosen = get_solver(solver, **options)
    if start is None and chosen.needs_start:
        start = DEFAULT_START
    chosen.make_ready(problem)
    if isinstance(start, str):
        starter = get_solver(start)
        starter.prepare(problem.device)
        clock = Clock(time_limit)
        start = starter.solve(problem, time_limit=clock.limit, seed=seed)
        time_limit = clock.limit
    if isinstance(start, MaskSolution):
        start = start.mask
    mask = None if start is None else problem.as_mask(start)
    return chosen.solve(problem, start=mask, time_limit=time_limit, seed=seed, callback=callback)
