"""The order of a layer's inputs under an N:M pattern, whose groups are consecutive inputs.

With saliencies ``S_ij = w_ij^2 G_jj``, what removing each weight alone costs, a mask that keeps
the N largest of every M loses the sum of the others. Which inputs share a group decides how much:
inputs that all rows need are best kept apart. Channel permutation of RIA (Zhang et al.,
"Plug-and-play", ICLR 2024): sorted inputs are dealt out to the groups, then one input of every
group is taken out and all are assigned anew, as a linear sum assignment.

A group whose other inputs have the saliencies ``r_1 <= ... <= r_(M-1)`` in a row and that is given
an input of saliency ``s`` loses ``r_1 + ... + r_(p-1) + min(r_p, s)`` there, with ``p = M - N``
weights removed. Only the last term depends on the assignment, and
``2 min(r, s) = r + s - |r - s|``: the assignment of least loss is that of the largest summed
distances ``|r_p - s|_1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arrays import ArrayLike, matrix
from .errors import InvalidInput
from .options import checked_seed, finite_number, whole_number
from .pattern import NM

_GROUPS_AT_ONCE = 512
"""Groups in one assignment, whose time grows with the cube of their number."""

_ROWS = 2048
"""Rows that distances are summed over, a random sample of more; a change is made if it lowers the
loss of all."""

_CHUNK = 1 << 24
"""Entries of a block of rows while a loss is summed (128 MiB)."""


@dataclass(frozen=True)
class InputOrder:
    """An order of inputs, and what it does.

    Attributes
    ----------
    order
        Long ``[d]``: the input that comes to each place.
    lost
        Saliency that an N:M mask loses in this order, summed over the rows.
    lost_as_given
        The same in the order in which the inputs were given.
    """

    order: Tensor
    lost: float
    lost_as_given: float


def order_inputs(
    saliency: ArrayLike,
    pattern: NM,
    *,
    rounds: int = 10,
    tolerance: float = 1e-3,
    rows: int = _ROWS,
    seed: int = 0,
) -> InputOrder:
    """Order inputs so that an N:M mask loses little saliency; never more than in the given order.

    Sorted inputs are dealt out. Then every round takes one input out of each group, and assigns
    them anew; so M times, for every input of the groups. Rounds after the first take them out in
    another (random) order, and where there are many groups, assign within random parts of these.

    Parameters
    ----------
    saliency
        ``[rows, d]``, not negative; of all rows that read the inputs.
    pattern
        N:M.
    rounds
        Most rounds.
    tolerance
        A round that lowers the loss by no more than this share of it is the last.
    rows
        Assignments look at so many rows, a random sample; losses at all.
    seed
        Of the samples.

    Raises
    ------
    InvalidInput
        If the pattern is no N:M or does not fit, a saliency is negative or not finite, or a number
        is out of range.
    """
    saliency = matrix(saliency, "saliency", copy=False)
    if not bool((saliency >= 0).all()):
        raise InvalidInput("Saliencies must be numbers that are not negative.")
    if not isinstance(pattern, NM):
        raise InvalidInput(f"The order of inputs matters to N:M alone, not to {pattern}.")
    rounds, rows = whole_number(rounds, "rounds", least=0), whole_number(rows, "rows", least=1)
    tolerance, seed = finite_number(tolerance, "tolerance", least=0), checked_seed(seed)
    d = saliency.shape[1]
    pattern.check((len(saliency), d))
    generator = torch.Generator().manual_seed(seed)
    inputs = saliency.T.cpu().double().contiguous()
    seen = inputs
    if len(saliency) > rows:
        seen = inputs[:, torch.randperm(len(saliency), generator=generator)[:rows]].contiguous()
    given = torch.arange(d).view(-1, pattern.group)
    lost_as_given = float(_lost(inputs, given, pattern).sum())
    groups = _dealt(inputs, pattern)
    losses = _lost(inputs, groups, pattern)
    if float(losses.sum()) > lost_as_given:
        groups, losses = given, _lost(inputs, given, pattern)
    for turn in range(rounds):
        before = float(losses.sum())
        if turn:
            groups = groups.gather(1, torch.rand(groups.shape, generator=generator).argsort(dim=1))
        for place in range(pattern.group):
            mixed = torch.randperm(len(groups), generator=generator)
            for part in torch.split(mixed, _GROUPS_AT_ONCE):
                changed = _reassigned(seen, groups[part], place, pattern)
                lost = _lost(inputs, changed, pattern)
                if float(lost.sum()) < float(losses[part].sum()):
                    groups[part], losses[part] = changed, lost
        if before - float(losses.sum()) <= tolerance * before:
            break
    return InputOrder(groups.flatten(), float(losses.sum()), lost_as_given)


def saliency_lost(saliency: Tensor, pattern: NM, order: Tensor | None = None) -> float:
    """Summed saliency (``[rows, d]``) outside an N:M mask of the largest, inputs in an order."""
    d = saliency.shape[1]
    order = torch.arange(d) if order is None else order.cpu().long()
    inputs = saliency.T.cpu().double()
    return float(_lost(inputs, order.view(-1, pattern.group), pattern).sum())


def _dealt(inputs: Tensor, pattern: NM) -> Tensor:
    """Groups ``[groups, M]``: each has one input of the largest, one of the next and so on."""
    return inputs.sum(dim=1).argsort(descending=True).view(pattern.group, -1).T.contiguous()


def _lost(inputs: Tensor, groups: Tensor, pattern: NM) -> Tensor:
    """What every group loses, float64 ``[groups]``; inputs are ``[d, rows]``."""
    removed = pattern.group - pattern.keep
    lost = torch.empty(len(groups), dtype=torch.float64)
    step = max(1, _CHUNK // (pattern.group * inputs.shape[1]))
    for at in range(0, len(groups), step):
        members = inputs[groups[at : at + step]]
        smallest = members.topk(removed, dim=1, largest=False, sorted=False).values
        lost[at : at + step] = smallest.sum(dim=(1, 2))
    return lost


def _reassigned(inputs: Tensor, groups: Tensor, place: int, pattern: NM) -> Tensor:
    """The groups when their inputs at one place are assigned anew at least loss."""
    from scipy.optimize import linear_sum_assignment

    removed = pattern.group - pattern.keep
    others = [at for at in range(pattern.group) if at != place]
    taken = groups[:, place]
    last = torch.empty(len(groups), inputs.shape[1], dtype=inputs.dtype)
    step = max(1, _CHUNK // (pattern.group * inputs.shape[1]))
    for at in range(0, len(groups), step):
        members = inputs[groups[at : at + step][:, others]]
        last[at : at + step] = members.kthvalue(removed, dim=1).values
    distances = torch.cdist(last, inputs[taken], p=1.0)
    _, assigned = linear_sum_assignment(distances.numpy(), maximize=True)
    changed = groups.clone()
    changed[:, place] = taken[torch.from_numpy(assigned)]
    return changed
