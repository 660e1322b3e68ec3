"""How a layer's masks are judged: from a weight and statistics of its inputs to a `MaskProblem`.

The plain layer loss takes the Gram matrix ``G = E x x^T`` of the calibration text as it is. Each
function here states a variant; all of them are again a Gram matrix and a linear term, so that
every solver takes them as they are. `Surrogate` puts the chosen ones together.

Masks: True = keep. ``q = w * (1 - m)`` is what a mask removes from a row ``w``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from solvers import InvalidInput, MaskProblem, Pattern

Targets = Literal["own", "dense", "stream"]
"""What a layer is to give: its own output, the dense model's, or what makes the stream that."""

Tokens = Literal["equal", "fisher", "inverse_norm"]


@dataclass(frozen=True)
class TokenWeighted:
    """Statistics of a layer's inputs in which tokens count by their weights ``f``.

    Attributes
    ----------
    gram
        ``sum_t f_t x_t x_t^T / sum_t f_t``, float64 ``[groups, d, d]``, by group of rows.
    mean
        ``sum_t f_t x_t / sum_t f_t``, float64 ``[groups, d]``.
    """

    gram: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Inputs:
    """Statistics of what a layer sees on calibration text, per token.

    Attributes
    ----------
    gram
        ``E x x^T``, float64 ``[d, d]``.
    mean
        ``E x``, float64 ``[d]``; None if it was not collected.
    cross
        ``E x_dense x^T``, float64 ``[d, d]``, where ``x`` comes from the pruned model and
        ``x_dense`` from the unpruned one; None if both are the same.
    cross_mean
        ``E x_dense``, float64 ``[d]``; None without ``cross``, or if it was not collected.
    weighted
        The same with token weights; None if all tokens count the same.
    gap
        ``E (r_dense - r) x^T``, float64 ``[rows, d]``, where the layer's output is added to the
        stream ``r`` of hidden states; None if it is not, or this was not collected.
    gap_mean
        ``E (r_dense - r)``, float64 ``[rows]``; None without ``gap``.
    """

    gram: Tensor
    mean: Tensor | None = None
    cross: Tensor | None = None
    cross_mean: Tensor | None = None
    weighted: TokenWeighted | None = None
    gap: Tensor | None = None
    gap_mean: Tensor | None = None


@dataclass(frozen=True)
class Surrogate:
    """Which variant of the layer loss masks are chosen by; the default is the plain one.

    Parameters
    ----------
    shrink
        Share ``s`` of the diagonal in ``(1 - s) G + s diag(G)``: 0 is the plain loss, 1 makes the
        weights independent and the best mask Wanda's.
    centre
        Share ``c`` of the mean that is taken out, ``G - c E[x] E[x]^T``: 1 is the loss that a layer
        with a bias has once the bias makes up for the mean of what was removed
        (`bias_correction`).
    damping
        Added to the diagonal, in units of its mean.
    dense_targets
        Share ``t`` of the *unpruned* model's output in what the layer is to give from its inputs
        ``x`` in the pruned one, ``w^T ((1 - t) x + t x_dense)`` (needs `Inputs.cross`).
    stream
        With dense targets, whether a layer whose output is added to the stream ``r`` of hidden
        states is also to make up for the same share of ``r_dense - r`` (`Inputs.gap`).
    tokens
        What a token counts. "equal"; "fisher": the sum over a group's rows of the squared
        gradients of the dense model's next-token loss with respect to its output, so that the loss
        becomes the diagonal Fisher's estimate of what the layer's error does to the model's loss;
        "inverse_norm": ``1 / |h|^2`` of the residual stream at the block's input, of which an error
        is then a share.
    row_groups
        Contiguous groups of a layer's rows (at most one a row), each with its own Fisher weights
        and so with its own Gram matrix; see `row_slices`.

    Notes
    -----
    Token weights come first, then centring (by the weighted mean), then damping, then shrinkage.
    The linear term of dense targets is taken with the plain statistics.
    """

    shrink: float = 0.0
    centre: float = 0.0
    damping: float = 0.0
    dense_targets: float = 0.0
    stream: bool = False
    tokens: Tokens = "equal"
    row_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("shrink", "centre", "dense_targets"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(
                    f"{name}={getattr(self, name)} is outside [0, 1]; it is a share."
                )
        if not self.damping >= 0:
            raise InvalidInput(f"damping={self.damping} is negative; give 0 or more.")
        if self.tokens not in get_args(Tokens):
            raise InvalidInput(
                f"Tokens weighted '{self.tokens}' is none of {', '.join(get_args(Tokens))}."
            )
        if self.row_groups < 1:
            raise InvalidInput(f"row_groups={self.row_groups} is below 1; it is a number.")
        if self.row_groups > 1 and self.tokens != "fisher":
            raise InvalidInput(
                "Only Fisher weights differ between groups of rows; give --tokens fisher too."
            )
        if self.dense_targets and self.tokens != "equal":
            raise InvalidInput("Dense targets are for tokens that count the same; leave one out.")

    @property
    def plain(self) -> bool:
        """Whether this is the layer loss as it is."""
        return self == Surrogate()

    @property
    def targets(self) -> Targets:
        """What statistics of the dense model it needs."""
        if self.dense_targets == 0:
            return "own"
        return "stream" if self.stream else "dense"

    def gram(self, inputs: Inputs) -> Tensor:
        """The Gram matrix that masks are chosen by, float64 ``[d, d]``, where all rows have one."""
        (one,) = self.by_group(inputs, 1)
        return self._gram(one)

    def problem(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> MaskProblem:
        """The problem to solve for a layer with this weight, where its rows have one Gram matrix.

        It may look at the memory of its arguments, which must not change while it is in use.

        Raises
        ------
        InvalidInput
            If a statistic that this surrogate needs is missing.
        """
        (one,) = self.problems(weight, inputs, pattern)
        return one

    def problems(self, weight: Tensor, inputs: Inputs, pattern: Pattern) -> list[MaskProblem]:
        """The same for each group of the layer's rows, in the order of `row_slices`.

        Raises
        ------
        InvalidInput
            Also if the pattern has a budget that groups would share.
        """
        self.check(pattern)
        rows = row_slices(len(weight), self.row_groups)
        linear = None
        if self.dense_targets:
            if inputs.cross is None:
                raise InvalidInput(
                    "Dense targets need the products of the dense and the pruned model's inputs."
                )
            linear = 2 * weight.double() * missing(weight, inputs, self.dense_targets)
        return [
            MaskProblem(
                weight[part],
                self._gram(one),
                pattern,
                None if linear is None else linear[part],
                copy=False,
            )
            for part, one in zip(rows, self.by_group(inputs, len(rows)), strict=True)
        ]

    def check(self, pattern: Pattern) -> None:
        """Raise `InvalidInput` if groups of rows cannot be solved apart."""
        if self.row_groups > 1 and pattern.coupled:
            raise InvalidInput(
                f"Rows that share the budget {pattern} cannot be solved in {self.row_groups} "
                "groups; give --row-groups 1, or a sparsity per row."
            )

    def by_group(self, inputs: Inputs, groups: int) -> list[Inputs]:
        """The statistics that masks are judged by, of each group of rows."""
        # A layer that saw no token has no weighted statistics either: all are zero.
        if self.tokens == "equal" or (inputs.weighted is None and not bool(inputs.gram.any())):
            return [inputs] * groups
        if inputs.weighted is None:
            raise InvalidInput(f"Tokens weighted '{self.tokens}' need statistics with weights.")
        weighted = inputs.weighted
        return [Inputs(gram, mean) for gram, mean in zip(weighted.gram, weighted.mean, strict=True)]

    def _gram(self, inputs: Inputs) -> Tensor:
        gram = inputs.gram
        if self.centre:
            if inputs.mean is None:
                raise InvalidInput("A centred Gram matrix needs the mean of the inputs.")
            gram = centred(gram, inputs.mean, self.centre)
        return shrunk(damped(gram, self.damping), self.shrink)


def row_slices(rows: int, groups: int) -> list[slice]:
    """Contiguous groups of rows whose sizes differ by at most one, larger ones first.

    Where there are more groups than rows, each row is one.
    """
    groups = min(groups, rows)
    size, larger = divmod(rows, groups)
    begins = [size * group + min(group, larger) for group in range(groups + 1)]
    return [slice(begin, end) for begin, end in pairwise(begins)]


def shrunk(gram: Tensor, share: float) -> Tensor:
    """``(1 - s) G + s diag(G)``: correlations between inputs are trusted less than their sizes.

    As Ledoit and Wolf shrink a covariance estimate, but as a choice of objective: errors of
    different inputs that cancel in one layer, on the calibration text, are not relied on in full.
    """
    if share == 0:
        return gram
    out = gram * (1 - share)
    out.diagonal().copy_(gram.diagonal())
    return out


def damped(gram: Tensor, share: float) -> Tensor:
    """``G + share * mean(diag G) * I``."""
    if share == 0:
        return gram
    out = gram.clone()
    out.diagonal().add_(share * gram.diagonal().mean())
    return out


def centred(gram: Tensor, mean: Tensor, share: float = 1.0) -> Tensor:
    """``G - share * mean mean^T``: with share 1 the covariance of the inputs."""
    mean = mean.to(gram.dtype)
    out = gram - share * mean[:, None] * mean
    # Rounding must not leave a diagonal below zero, nor entries beside a zero diagonal.
    tiny = 64 * torch.finfo(torch.float32).eps * gram.diagonal()
    constant = out.diagonal() <= tiny
    out[constant] = 0.0
    out[:, constant] = 0.0
    return out


def centred_inputs(inputs: Inputs) -> Inputs:
    """Statistics of the inputs less their means, those of ``x_dense`` likewise.

    With token weights, too, the plain mean is what is taken out.
    """
    assert inputs.mean is not None, "there is a mean to take out"
    gram, cross = centred(inputs.gram, inputs.mean), inputs.cross
    if cross is not None:
        assert inputs.cross_mean is not None, "collected with the products"
        cross = cross - inputs.cross_mean[:, None] * inputs.mean
        cross[:, gram.diagonal() == 0] = 0.0
    weighted = inputs.weighted
    if weighted is not None:
        apart = weighted.mean - inputs.mean
        grams = [
            centred(own, mean) + shift[:, None] * shift
            for own, mean, shift in zip(weighted.gram, weighted.mean, apart, strict=True)
        ]
        weighted = TokenWeighted(torch.stack(grams), apart)
    gap = inputs.gap
    if gap is not None:
        assert inputs.gap_mean is not None, "collected with the products"
        gap = gap - inputs.gap_mean[:, None] * inputs.mean
        gap[:, gram.diagonal() == 0] = 0.0
    return Inputs(gram, torch.zeros_like(inputs.mean), cross, None, weighted, gap)


def bias_correction(weight: Tensor, updated: Tensor, mean: Tensor) -> Tensor:
    """What to add to a layer's bias so that its mean output stays, ``[rows]`` float64."""
    return (weight.double() - updated.double()) @ mean.double()


def output_change(
    weight: Tensor, updated: Tensor, gram: Tensor, mean: Tensor, shift: Tensor | None = None
) -> float:
    """``E |(V - W) x + s|^2`` for a layer's new weight ``V`` and a shift ``s`` of its bias."""
    change = updated.double() - weight.double()
    loss = ((change @ gram.double()) * change).sum()
    if shift is not None:
        loss = loss + 2 * shift.double() @ (change @ mean.double()) + shift.double().square().sum()
    return max(float(loss), 0.0)


def missing(weight: Tensor, inputs: Inputs, share: float = 1.0) -> Tensor:
    """``E (t - W x) x^T`` of the dense targets ``t``, float64 ``[rows, d]``.

    ``t = W ((1 - share) x + share x_dense) + share (r_dense - r)``, the last term where there is an
    `Inputs.gap`. With ``e = t - w^T x`` the error that comes in and ``q`` what a mask removes, a
    row loses ``E (e + q^T x)^2``, which but for the constant ``E e^2`` is
    ``q^T G q + 2 q^T E[x e]``: twice this, times ``w``, is the masks' linear term.
    """
    assert inputs.cross is not None, "dense inputs were collected"
    found = weight.double() @ (inputs.cross.double() - inputs.gram.double())
    if inputs.gap is not None:
        found = found + inputs.gap
    return share * found


def retargeted(weight: Tensor, inputs: Inputs, share: float, damping: float = 1e-2) -> Tensor:
    """The weight with which a layer comes nearest to dense targets, float64 ``[rows, d]``.

    ``W* = W + E[(t - W x) x^T] (G + lambda I)^-1`` (see `missing`) is the least squares fit of all
    weights, held near the old ones by ``lambda``, the damping in units of the mean diagonal of
    ``G``. Without damping, ``E |V x - t|^2 = |V - W*|_G^2 + const`` for every ``V``: masks and
    weight updates of the plain loss, taken with ``W*`` for the weight, are those for the targets.

    Raises
    ------
    InvalidInput
        If there is too little damping for a singular ``G``.
    """
    system = inputs.gram.double().clone()
    system.diagonal().add_(damping * system.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        raise InvalidInput(
            f"The Gram matrix is singular with damping {damping:g}, so that it gives no weight for "
            "dense targets; give more damping, such as 0.01."
        )
    change = torch.cholesky_solve(missing(weight, inputs, share).T, factor)
    return weight.double() + change.T
