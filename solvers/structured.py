"""Structured pruning: whole inputs, neurons or heads, as a problem with one row.

Removing group ``k`` removes its inputs from every output at once. With
``E = G * (W^T W)`` (entrywise) and ``P [groups, d]`` summing the inputs of each group, the
layer's output changes by

    sum_r (w_r * P^T x)^T G (w_r * P^T x) = x^T (P E P^T) x,    x = 1 - m per group

which is a `MaskProblem` with one row, weight 1 and Gram matrix ``P E P^T``. A mask of that
problem has one entry per group; `expand` gives the layer's.

That problem is for weights that stay as they are. Where the kept ones are fitted anew afterwards
(`refitted`), `eliminate` chooses the groups by what is lost after the fit. `wanda_sp` and `flap`
are the published saliencies of groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .arrays import ArrayLike, numbers, truths
from .errors import InvalidInput
from .linear import Linear
from .options import finite_number, whole_number
from .pattern import Pattern, PerRow
from .problem import MaskProblem


def input_groups(
    weight: ArrayLike, gram: ArrayLike, groups: int | ArrayLike, pattern: Pattern
) -> MaskProblem:
    """Which groups of a layer's inputs to keep.

    Parameters
    ----------
    weight
        ``[rows, d]``, as for `MaskProblem`.
    gram
        ``[d, d]`` of the layer's inputs.
    groups
        Group of each input, integers ``[d]`` in 0..K-1 without a gap; or the size of groups of
        consecutive inputs.
    pattern
        The allowed masks, of shape ``(1, K)``.

    Returns
    -------
    MaskProblem
        One row of K groups, float64, whose objective is the squared change of the layer's
        outputs per token.

    Raises
    ------
    InvalidInput
        If the layer is not a valid one, or a group is empty, or the pattern does not fit.
    """
    layer = MaskProblem(weight, gram, PerRow(keep=0), copy=False)
    group = group_of_each(groups, layer.shape[1]).to(layer.device)
    count = int(group.max()) + 1

    dense = layer.weight.double()
    inputs = layer.gram.double() * (dense.T @ dense)
    by_row = inputs.new_zeros(count, len(group)).index_add_(0, group, inputs)
    summed = by_row.new_zeros(count, count).index_add_(1, group, by_row)

    # sum_ij |E_ij| in a group, at most; a diagonal below its rounding errors is zero.
    size = inputs.new_zeros(count).index_add_(0, group, inputs.diagonal().sqrt()).square()
    dead = summed.diagonal() <= 64 * torch.finfo(layer.gram.dtype).eps * size
    summed[dead] = 0.0
    summed[:, dead] = 0.0
    return MaskProblem(summed.new_ones(1, count), (summed + summed.T) / 2, pattern, copy=False)


def input_channels(weight: ArrayLike, gram: ArrayLike, pattern: Pattern) -> MaskProblem:
    """Which single inputs of a layer to keep; see `input_groups`."""
    return input_groups(weight, gram, 1, pattern)


def neurons(down_weight: ArrayLike, gram: ArrayLike, pattern: Pattern) -> MaskProblem:
    """Which neurons of an MLP to keep: the inputs of its down projection ``[hidden, neurons]``."""
    return input_channels(down_weight, gram, pattern)


def attention_heads(
    out_weight: ArrayLike, gram: ArrayLike, head_dim: int, pattern: Pattern
) -> MaskProblem:
    """Which heads to keep: groups of ``head_dim`` inputs of the output projection.

    Parameters
    ----------
    out_weight
        ``[hidden, heads * head_dim]``.
    gram
        ``[heads * head_dim, heads * head_dim]`` of the concatenated heads.
    head_dim
        Inputs per head.
    pattern
        The allowed masks, of shape ``(1, heads)``.
    """
    return input_groups(out_weight, gram, head_dim, pattern)


def expand(mask: ArrayLike, groups: int | ArrayLike, rows: int = 1) -> Tensor:
    """The layer's mask, bool ``[rows, d]``, from one over groups, bool ``[1, K]``.

    ``groups`` as for `input_groups`.
    """
    mask = truths(mask, "A mask over groups")
    if mask.ndim != 2 or len(mask) != 1:
        raise InvalidInput(
            f"A mask over groups must be boolean [1, groups], not of shape {tuple(mask.shape)}."
        )
    rows = whole_number(rows, "rows", least=1)
    count = mask.shape[1]
    d = int(groups) * count if isinstance(groups, (int, np.integer)) else len(groups)
    group = group_of_each(groups, d).to(mask.device)
    if int(group.max()) + 1 != count:
        raise InvalidInput(f"The mask has {count} groups where {int(group.max()) + 1} are named.")
    return mask[:, group].repeat(rows, 1)


def wanda_sp(weight: ArrayLike, gram: ArrayLike, groups: int | ArrayLike = 1) -> Tensor:
    """Wanda-sp's saliency of every group: ``sum |W_ij| ||X_j||`` over its inputs, float64 ``[K]``.

    The structured form of Wanda that FLAP (An et al., AAAI 2024, arXiv:2312.11983) compares with.
    Its published code takes the mean over rows, which orders groups in the same way.
    """
    layer = MaskProblem(weight, gram, PerRow(keep=0), copy=False)
    score = layer.weight.double().abs().sum(dim=0) * layer.gram.double().diagonal().sqrt()
    return _summed_over(score, groups)


def flap(
    weight: ArrayLike, gram: ArrayLike, mean: ArrayLike, groups: int | ArrayLike = 1
) -> Tensor:
    """FLAP's saliency of every group: fluctuation times squared weight norm, float64 ``[K]``.

    ``Var(X_j) ||W_:j||^2`` for single inputs (arXiv:2312.11983). For groups of several
    inputs the published code sums the *squares* of that number over the group, and so does this.

    Parameters
    ----------
    weight, gram, groups
        As for `input_groups`.
    mean
        ``[d]``, of the inputs that ``gram`` was taken of.
    """
    layer = MaskProblem(weight, gram, PerRow(keep=0), copy=False)
    middle = numbers(mean, "mean", layer.device).double()
    if tuple(middle.shape) != layer.shape[1:] or not bool(torch.isfinite(middle).all()):
        raise InvalidInput(f"The mean must be {layer.shape[1]} finite numbers, one per input.")
    variance = (layer.gram.double().diagonal() - middle.square()).clamp(min=0.0)
    score = variance * layer.weight.double().square().sum(dim=0)
    group = group_of_each(groups, layer.shape[1])
    return _summed_over(score if len(group) == int(group.max()) + 1 else score.square(), group)


def _summed_over(score: Tensor, groups: int | ArrayLike) -> Tensor:
    group = group_of_each(groups, len(score)).to(score.device)
    return score.new_zeros(int(group.max()) + 1).index_add_(0, group, score)


def most_salient(scores: Tensor, keep: int) -> Tensor:
    """The mask that keeps the ``keep`` groups of the largest scores, bool ``[1, K]``."""
    pattern = PerRow(keep=keep)
    pattern.check((1, len(scores)))
    return pattern.round(scores.double()[None])


def refitted(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    damping: float = 1e-2,
    cross: Tensor | None = None,
) -> Tensor:
    """Exact least squares on inputs that all rows keep, float64 ``[rows, d]``, zero elsewhere.

    Minimises ``tr (V - W)(G + lambda I)(V - W)^T`` over ``V`` on the kept inputs: all rows share
    one system, ``V_K (G_KK + lambda I) = (W G + lambda W)_K``. `solvers.update.LeastSquares` is the
    same for rows with masks of their own.

    Parameters
    ----------
    weight, gram
        ``[rows, d]`` and ``[d, d]``.
    kept
        Bool ``[d]``.
    damping
        ``lambda`` in units of the mean diagonal of ``G``.
    cross
        ``E y x^T [rows, d]`` of the outputs aimed at, where they are not ``W x``.

    Raises
    ------
    InvalidInput
        If the damping is negative, or the system is singular for lack of it.
    """
    damping = finite_number(damping, "damping", least=0)
    w, g = weight.double(), gram.double()
    index = kept.nonzero()[:, 0]
    ridge = damping * float(g.diagonal().mean())
    system = g[index][:, index]
    system.diagonal().add_(ridge)
    target = (w @ g if cross is None else cross.double()) + ridge * w
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise InvalidInput(
            f"The least squares system is singular with damping {damping:g}; give more damping, "
            "such as 0.01."
        )
    out = torch.zeros_like(w)
    out[:, index] = torch.cholesky_solve(target[:, index].T, factor).T
    return out


def eliminate(
    weight: ArrayLike,
    gram: ArrayLike,
    groups: int | ArrayLike,
    keep: int,
    damping: float = 1e-2,
    exchanges: int | None = None,
) -> Tensor:
    """Groups to keep when the kept weights are fitted anew, bool ``[1, K]``.

    Starting from all, the group ``g`` goes whose loss after the fit is least,
    ``tr W_g [(H^-1)_gg]^-1 W_g^T`` with ``H = G + lambda I`` (optimal brain surgeon on structures,
    as in ZipLM, Kurtic et al. 2023, arXiv:2302.04089), and the rest is fitted at once. Then the
    best group outside is exchanged for the worst one inside while the loss after the fit falls.

    Parameters
    ----------
    weight, gram, groups
        As for `input_groups`; all groups of one size.
    keep
        How many groups.
    damping
        As for `refitted`.
    exchanges
        Most exchanges; None for as many as there are groups.

    Raises
    ------
    InvalidInput
        If the layer or the groups are not valid ones, groups differ in size, or the damping is
        too little for the rank of the Gram matrix.
    """
    fit = _Fit(weight, gram, groups, damping)
    count = len(fit.kept)
    keep = whole_number(keep, "keep", least=0)
    if exchanges is not None:
        exchanges = whole_number(exchanges, "exchanges", least=0)
    PerRow(keep=keep).check((1, count))
    for _ in range(count - keep):
        fit.remove(int(fit.losses().argmin()))
    if 0 < keep < count:
        for _ in range(count if exchanges is None else exchanges):
            gains = fit.gains()
            best = int(gains.argmax())
            fit.add(best)
            losses = fit.losses()
            worst = int(losses.argmin())
            fit.remove(worst)
            if worst == best or not float(losses[worst]) < float(gains[best]) * (1 - 1e-9):
                break
    return fit.kept[None].clone()


def elimination_curve(
    weight: ArrayLike, gram: ArrayLike, groups: int | ArrayLike, damping: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """What `eliminate` without exchanges loses at every number of groups, in one pass.

    Parameters
    ----------
    weight, gram, groups, damping
        As for `eliminate`.

    Returns
    -------
    losses : Tensor
        Float64 ``[K + 1]``: with k groups left, after the fit, the damping's share included.
    order : Tensor
        Long ``[K]``: the groups as they go.
    """
    fit = _Fit(weight, gram, groups, damping)
    count = len(fit.kept)
    losses = torch.zeros(count + 1, dtype=torch.float64)
    order = torch.empty(count, dtype=torch.long)
    for left in range(count, 0, -1):
        rise = fit.losses()
        order[count - left] = rise.argmin()
        losses[left - 1] = losses[left] + rise.min().cpu()
        fit.remove(int(order[count - left]))
    return losses, order


class _Fit:
    """Least squares of a layer's outputs on the kept groups, as groups come and go.

    ``inverse`` is ``(H_KK)^-1`` in the rows and columns of kept inputs and zero elsewhere,
    ``fitted`` the weights on them.
    """

    def __init__(
        self, weight: ArrayLike, gram: ArrayLike, groups: int | ArrayLike, damping: float
    ) -> None:
        layer = MaskProblem(weight, gram, PerRow(keep=0), copy=False)
        group = group_of_each(groups, layer.shape[1]).to(layer.device)
        count = int(group.max()) + 1
        members = group.argsort(stable=True).view(count, -1) if len(group) % count == 0 else None
        if members is None or not bool((group[members] == group[members[:, :1]]).all()):
            raise InvalidInput("Groups to eliminate must be of one size.")
        damping = finite_number(damping, "damping", least=0)
        self._members = members
        self._weight = layer.weight.double()
        self._gram = layer.gram.double().clone()
        self._gram.diagonal().add_(damping * float(self._gram.diagonal().mean()))
        self._target = self._weight @ self._gram
        factor, info = torch.linalg.cholesky_ex(self._gram)
        if int(info):
            raise InvalidInput(
                f"The Gram matrix is singular with damping {damping:g}; give more, such as 0.01."
            )
        self._inverse = torch.cholesky_inverse(factor)
        self._fitted = self._weight.clone()
        self.kept = torch.ones(len(members), dtype=torch.bool, device=layer.device)

    def losses(self) -> Tensor:
        """What the loss after the fit rises by without each kept group; infinite for others."""
        kept = self._members[self.kept]
        blocks = self._inverse[kept[:, :, None], kept[:, None, :]]
        fitted = self._fitted[:, kept].permute(1, 2, 0)  # [K, size, rows]
        out = torch.full((len(self._members),), torch.inf, dtype=torch.float64)
        out = out.to(self._weight.device)
        out[self.kept] = _quadratic(blocks, fitted)
        return out

    def gains(self) -> Tensor:
        """What the loss after the fit falls by with each removed group; -inf for the others."""
        gone = self._members[~self.kept]
        inside = self._members[self.kept].flatten()
        between = self._gram[inside][:, gone.flatten()]
        explained = self._inverse[inside][:, inside] @ between
        rest = self._gram[gone[:, :, None], gone[:, None, :]] - torch.einsum(
            "ikg,ikh->kgh", between.view(-1, *gone.shape), explained.view(-1, *gone.shape)
        )
        missing = self._target[:, gone.flatten()] - self._fitted[:, inside] @ between
        out = torch.full((len(self._members),), -torch.inf, dtype=torch.float64)
        out = out.to(self._weight.device)
        out[~self.kept] = _quadratic(rest, missing.view(-1, *gone.shape).permute(1, 2, 0))
        return out

    def remove(self, group: int) -> None:
        """Fit without a kept group."""
        index = self._members[group]
        columns = self._inverse[:, index]
        factor = torch.linalg.cholesky(columns[index])
        step = torch.cholesky_solve(columns.T, factor)  # [size, d]
        self._fitted -= self._fitted[:, index] @ step
        self._inverse -= columns @ step
        self._fitted[:, index] = 0.0
        self._inverse[index], self._inverse[:, index] = 0.0, 0.0
        self.kept[group] = False

    def add(self, group: int) -> None:
        """Fit with a removed group."""
        index = self._members[group]
        between = self._gram[:, index] * self.kept[self._of_inputs()][:, None]
        explained = self._inverse @ between
        rest = self._gram[index][:, index] - between.T @ explained
        missing = self._target[:, index] - self._fitted @ between
        direction = -explained
        direction[index] = torch.eye(len(index), dtype=direction.dtype, device=direction.device)
        step = torch.cholesky_solve(direction.T, torch.linalg.cholesky(rest))
        self._fitted += missing @ step
        self._inverse += direction @ step
        self.kept[group] = True

    def _of_inputs(self) -> Tensor:
        """Group of each input."""
        of = torch.empty(self._members.numel(), dtype=torch.long, device=self._members.device)
        of[self._members] = torch.arange(len(self._members), device=of.device)[:, None]
        return of


def _quadratic(blocks: Tensor, values: Tensor) -> Tensor:
    """``tr v^T B^-1 v`` of each block ``[K, size, size]`` and its values ``[K, size, rows]``."""
    if blocks.shape[1] == 1:
        return values.square().sum(dim=(1, 2)) / blocks[:, 0, 0]
    factor = torch.linalg.cholesky(blocks)
    half: Tensor = torch.linalg.solve_triangular(factor, values, upper=False)
    return half.square().sum(dim=(1, 2))


def parameter_budget(
    costs: ArrayLike,
    budget: float,
    *,
    at_least: Mapping[str, tuple[Sequence[int], int]] | None = None,
) -> Linear:
    """Keep groups whose costs sum to at most ``budget``.

    Parameters
    ----------
    costs
        ``[K]``, non-negative: parameters (or bytes, or operations) of each group.
    budget
        In the same unit.
    at_least
        Lower bounds on counts, by a name for messages: ``{"block 0": ([0, 1, 2], 1)}`` keeps at
        least one of the groups 0, 1 and 2.

    Raises
    ------
    InvalidInput
        If a cost is negative, an index is out of range or no mask satisfies everything.

    Examples
    --------
    >>> import torch
    >>> from solvers.structured import parameter_budget
    >>> heads = parameter_budget([4.0, 3.0, 2.0], 5.0, at_least={"block 0": ([0, 1], 1)})
    >>> heads.lmo(torch.tensor([[-3.0, -2.0, -2.0]]))
    tensor([[False,  True,  True]])
    """
    cost = numbers(costs, "costs").cpu().double().numpy()
    budget = finite_number(budget, "budget")
    if cost.ndim != 1 or len(cost) == 0 or not (cost >= 0).all():
        raise InvalidInput("The costs must be non-negative numbers, one per group.")
    matrix, lower, upper, names = [cost], [-np.inf], [budget], ["the budget"]
    for name, (index, minimum) in (at_least or {}).items():
        chosen = np.asarray(index, dtype=np.int64)
        if chosen.ndim != 1 or not ((chosen >= 0) & (chosen < len(cost))).all():
            raise InvalidInput(f"{name} names groups outside 0..{len(cost) - 1}.")
        counted = np.zeros(len(cost))
        counted[chosen] = 1.0
        matrix.append(counted)
        lower.append(float(minimum))
        upper.append(np.inf)
        names.append(name)
    return Linear(np.stack(matrix), lower, upper, names=names)


def group_of_each(groups: int | ArrayLike, d: int) -> Tensor:
    """Group of each of ``d`` inputs, long ``[d]``, or `InvalidInput`."""
    if isinstance(groups, (int, np.integer)):
        groups = whole_number(groups, "groups")
        if groups < 1 or d % groups:
            raise InvalidInput(
                f"Groups of {groups} inputs do not divide a layer of {d} inputs evenly."
            )
        return torch.arange(d) // groups
    try:
        group = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"Groups are one whole number for each of {d} inputs.") from None
    if group.shape != (d,) or group.is_floating_point() or group.dtype == torch.bool:
        raise InvalidInput(
            f"The groups have shape {tuple(group.shape)} and type {group.dtype}; "
            f"give one integer for each of {d} inputs."
        )
    group = group.long()
    if int(group.min()) < 0:
        raise InvalidInput(f"Group {int(group.min())} is negative; number groups from 0.")
    present = set(group.tolist())
    missing = next((k for k in range(len(present)) if k not in present), None)
    if missing is not None:
        raise InvalidInput(f"Group {missing} has no input; number groups from 0 without a gap.")
    return group
