"""Which groups of one block go, and what the weights that read the rest become."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from solvers import Evidence, InvalidInput, PerRow, get_solver, solve
from solvers.structured import (
    eliminate,
    expand,
    flap,
    input_groups,
    most_salient,
    refitted,
    wanda_sp,
)

from ..surrogate import Inputs, bias_correction, centred, output_change
from .coupling import Coupling, Kind

Update = Literal["least_squares", "none"]
Bias = Literal["existing", "add", "none"]

SALIENCIES = ("wanda_sp", "flap")
"""Published saliencies of groups."""

ELIMINATION = "eliminate"
"""Chooses by the loss after least squares, see `solvers.structured.eliminate`."""


@dataclass(frozen=True)
class Method:
    """How groups are chosen and what is done about the loss.

    Parameters
    ----------
    solver
        `ELIMINATION`, one of `SALIENCIES`, or any out of `solvers.available` for the problem with
        one row of `solvers.structured.input_groups`.
    update
        "least_squares": the reader's kept weights are fitted anew (`refitted`); "none": they stay.
    bias
        Whether the reader's bias makes up for the mean of what was removed: "existing" where there
        is one, "add" gives the reader one where the configuration can say so, "none" leaves biases
        alone.
    damping
        Of the least squares, in units of the mean diagonal of the Gram matrix.
    solver_options
        The solver's own options.
    time_limit
        Seconds for the solver, per block and kind; None for no limit.
    """

    solver: str = ELIMINATION
    update: Update = "least_squares"
    bias: Bias = "existing"
    damping: float = 1e-2
    solver_options: dict[str, Any] = field(default_factory=dict)
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.solver in SALIENCIES or self.solver == ELIMINATION:
            allowed = {"exchanges"} if self.solver == ELIMINATION else set()
            unknown = sorted(self.solver_options.keys() - allowed)
            if unknown:
                raise InvalidInput(
                    f"Solver '{self.solver}' has no option '{unknown[0]}'; its options are: "
                    f"{', '.join(allowed) or 'none'}."
                )
            if self.time_limit is not None:
                raise InvalidInput(f"Solver '{self.solver}' takes no time limit; leave it out.")
        else:
            try:
                chosen = get_solver(self.solver, **self.solver_options)
            except InvalidInput as error:
                if self.solver_options:
                    raise
                raise InvalidInput(
                    f"{str(error).removesuffix('.')}; and for groups {ELIMINATION}, "
                    f"{', '.join(SALIENCIES)}."
                ) from None
            reason = chosen.unable(PerRow(keep=1))
            if reason is not None:
                raise InvalidInput(reason)
        for name, value, known in (
            ("Weight update", self.update, get_args(Update)),
            ("Bias", self.bias, get_args(Bias)),
        ):
            if value not in known:
                raise InvalidInput(f"{name} '{value}' is none of {', '.join(known)}.")
        if not self.damping >= 0:
            raise InvalidInput(f"damping={self.damping} is negative; give 0 or more.")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class GroupResult:
    """What was done to the groups of one block. Losses as in `mipprune.LayerResult`, of the reader.

    Attributes
    ----------
    name, kind
        The layer that reads the groups, and what they are.
    groups, kept
        How many there were, and how many are left.
    tokens
        Calibration tokens.
    loss
        Of the groups removed, with weights and bias as they were.
    updated_loss
        With weights and bias as they were written.
    loss_wanda_sp
        Of as many groups chosen by Wanda-sp, with weights and bias as they were.
    relative_error
        ``updated_loss`` as a share of the mean square of the dense output.
    bound
        No choice of so many groups loses less, by what the solver judged them by; None if the
        solver proves nothing.
    gap
        ``(loss - bound) / |loss|`` of that.
    evidence
        What the bound rests on: "certified", "guarded" or "claimed"; None without a bound.
    status
        Why the solver stopped.
    seconds
        Of choosing and fitting.
    """

    name: str
    kind: Kind
    groups: int
    kept: int
    tokens: int
    loss: float
    updated_loss: float
    loss_wanda_sp: float
    relative_error: float
    bound: float | None
    gap: float | None
    evidence: str | None
    status: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without times."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}


def weakest(results: Sequence[GroupResult]) -> str | None:
    """What the bounds of several blocks rest on together; None where there are none."""
    found = {one.evidence for one in results}
    return next((kind.label for kind in reversed(Evidence) if kind.label in found), None)


@dataclass(frozen=True)
class Chosen:
    """A block's choice.

    Attributes
    ----------
    result
        What it costs.
    kept
        Bool ``[K]``, True = keep.
    weight
        The reader's new weight ``[rows, d]``, zero for removed inputs, in its dtype.
    shift
        To add to the reader's bias, float64 ``[rows]``; None if there is nothing to add.
    """

    result: GroupResult
    kept: Tensor
    weight: Tensor
    shift: Tensor | None


def choose(
    coupling: Coupling, inputs: Inputs, tokens: int, keep: int, method: Method, seed: int = 0
) -> Chosen:
    """Choose the groups of one block to keep, and fit the weights that read them.

    Where the reader's bias may change, groups are chosen and weights fitted by the inputs'
    covariance in place of their Gram matrix, since the bias makes up for the means.

    Parameters
    ----------
    coupling
        The groups.
    inputs
        Statistics of the reader's inputs, with the mean.
    tokens
        That they were taken of.
    keep
        Groups to keep.
    method
        How.
    seed
        Of the solver.

    Raises
    ------
    InvalidInput
        If the solver cannot do it, or there is too little damping.
    """
    began = time.perf_counter()
    weight, gram, mean = coupling.reader.weight, inputs.gram, inputs.mean
    assert mean is not None, "Gram matrices are collected with means"
    with_bias = method.bias != "none" and (
        method.bias == "add" or getattr(coupling.reader.module, "bias", None) is not None
    )
    judged = centred(gram, mean) if with_bias else gram
    groups = coupling.of_inputs()
    bound = gap = evidence = None
    status = "FEASIBLE"
    if method.solver == "wanda_sp":
        mask = most_salient(wanda_sp(weight, gram, groups), keep)
    elif method.solver == "flap":
        mask = most_salient(flap(weight, gram, mean, groups), keep)
    elif method.solver == ELIMINATION:
        mask = eliminate(weight, judged, groups, keep, method.damping, **method.solver_options)
        status = "LOCAL_OPTIMUM"
    else:
        solution = solve(
            input_groups(weight, judged, groups, PerRow(keep=keep)),
            method.solver,
            seed=seed,
            time_limit=method.time_limit,
            **method.solver_options,
        )
        mask, status = solution.mask, solution.status.name
        if solution.bound is not None:
            assert solution.gap is not None
            assert solution.evidence is not None
            bound, gap = float(solution.bound), float(solution.gap)  # of the one row
            evidence = solution.evidence.label
    kept = expand(mask, groups).to(weight.device)[0]
    new = weight.double().masked_fill(~kept, 0.0)
    if method.update == "least_squares":
        new = refitted(weight, judged, kept, method.damping)
    new = new.to(weight.dtype)
    shift = bias_correction(weight, new, mean) if with_bias else None

    plain = input_groups(weight, gram, groups, PerRow(keep=keep))
    reference = most_salient(wanda_sp(weight, gram, groups), keep)
    dense = weight.double()
    energy = float(((dense @ gram) * dense).sum())
    updated = output_change(dense, new, gram, mean, shift)
    result = GroupResult(
        name=coupling.reader.name,
        kind=coupling.kind,
        groups=coupling.count,
        kept=keep,
        tokens=tokens,
        loss=float(plain.objective(mask)),
        updated_loss=updated,
        loss_wanda_sp=float(plain.objective(reference)),
        relative_error=updated / energy if energy > 0 else 0.0,
        bound=bound,
        gap=gap,
        evidence=evidence,
        status=status,
        seconds=time.perf_counter() - began,
    )
    return Chosen(result, mask[0], new, shift)
