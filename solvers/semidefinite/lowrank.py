"""Low-rank solution of many rows' semidefinite relaxations at once.

With ``z = 2 x - 1`` and ``z_0 = 1`` the relaxation is ``min <M, Z Z^T>`` over vectors ``z_i`` of
length 1 (``z_0`` the first unit vector), ``sum_{i in g} z_i = t_g z_0`` for every cell g, and the
cuts. Rank ``~ sqrt(2 d)`` loses nothing (Burer and Monteiro 2003; Boumal, Voroninski and Bandeira
2016). Counts and cuts go into an augmented Lagrangian, minimised by L-BFGS on the product of
spheres; the multipliers of the lengths follow from stationarity in closed form:
``D_i = z_i^T (M Z)_i``. A step needs ``w * (G (w * Z))``, one product with the Gram matrix for all
rows together, and sparse products for the cuts in use.

Nothing here is trusted: `witness` proves whatever multipliers come out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clock import Clock
from ..pattern import CellPattern
from ..problem import MaskProblem
from ..threads import quiet_warnings
from .cuts import FAMILIES, Array, Cuts

_MEMORY = 8
_BACKTRACKS = 8
_SUFFICIENT = 1e-4
_PLAIN = 3
"""Families of pairs alone; the others are triangles."""

_SLOTS = torch.tensor(
    [[0, 1, 3], [0, 1, 3], [0, 1, 3], [3, 4, 5], [3, 4, 5]],
)
_ENDS = torch.tensor(
    [[[3, 0], [3, 1], [0, 1]]] * 3 + [[[0, 1], [0, 2], [1, 2]]] * 2,
)
"""Which of (i, j, k, 0) each slot of a cut multiplies."""
_SIGNS = torch.tensor(
    [[1, 1, 1], [1, -1, -1], [-1, -1, 1], [-1, -1, 1], [1, 1, 1]],
    dtype=torch.float32,
)
"""Each cut is ``(1 + sum of signs * slots) / 4 >= 0``, slots among z_i, z_j, z_k and the products
z_ij, z_ik, z_jk (numbered 0 to 5)."""


@dataclass(frozen=True)
class Rows:
    """Rows of a problem with losses scaled to trace 1, in the variables ``z``.

    Attributes
    ----------
    size
        What each row's losses were divided by, float64 ``[rows]``.
    weight, linear, gram
        Scaled, float64.
    width, total
        Inputs per cell, and ``t``, the sum of z in every cell.
    """

    size: Tensor
    weight: Tensor
    linear: Tensor
    gram: Tensor
    width: int
    total: int

    @classmethod
    def of(cls, problem: MaskProblem) -> Rows:
        """All rows; a row without any cost stays as it is."""
        pattern = problem.pattern
        assert isinstance(pattern, CellPattern)
        assert not pattern.coupled
        weight, gram = problem.weight.double(), problem.gram.double()
        linear = torch.zeros_like(weight) if problem.linear is None else problem.linear
        size = weight.square() @ gram.diagonal() + linear.abs().sum(dim=1)
        size = torch.where(size > 0, size, 1.0)
        width = pattern.cell_size((1, weight.shape[1]))
        kept = pattern.kept_per_cell((1, weight.shape[1]))
        return cls(
            size=size,
            weight=weight / size.sqrt()[:, None],
            linear=linear / size[:, None],
            gram=gram,
            width=width,
            total=width - 2 * kept,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, d)``."""
        rows, d = self.weight.shape
        return rows, d

    def form(self, row: int) -> tuple[Tensor, float]:
        """``M`` (``[d + 1, d + 1]``) and a constant: ``loss = z^T M z + constant``."""
        weight, linear = self.weight[row], self.linear[row]
        d = len(weight)
        quadratic = weight[:, None] * self.gram * weight
        summed = quadratic.sum(dim=1)
        form = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=weight.device)
        form[1:, 1:] = quadratic / 4
        form[0, 1:] = form[1:, 0] = (summed + linear) / 4
        return form, float(summed.sum() / 4 + linear.sum() / 2)

    def normals(self) -> Tensor:
        """Orthonormal ``[d + 1, cells]``, orthogonal to every ``(1, z)``."""
        d = self.shape[1]
        counts = torch.zeros(d + 1, d // self.width, dtype=torch.float64, device=self.size.device)
        counts[0] = -self.total
        index = torch.arange(d, device=counts.device)
        counts[1 + index, index // self.width] = 1.0
        basis: Tensor = torch.linalg.qr(counts)[0]
        return basis


class ActiveCuts:
    """Cuts in use, of all rows, with multipliers, as sparse products.

    Parameters
    ----------
    shape
        ``(rows, d)``.
    row, family, index, multiplier
        Of every cut: int ``[cuts]``, int ``[cuts]``, int ``[cuts, 3]``, ``u >= 0`` float32.
    """

    def __init__(
        self, shape: tuple[int, int], row: Tensor, family: Tensor, index: Tensor, multiplier: Tensor
    ) -> None:
        rows, d = shape
        self.shape, self.row, self.family, self.index = shape, row, family, index
        self.multiplier = multiplier
        flat = row[:, None] * d + index
        i, j, k = flat.T
        pairs = torch.stack([i, j, i, k, j, k], dim=1).view(-1, 3, 2).sort(dim=2).values
        code = pairs[..., 0] * (rows * d) + pairs[..., 1]
        used = _SLOTS.to(row.device)[family]
        needed = torch.stack([torch.full_like(row, True), family >= _PLAIN, family >= _PLAIN], 1)
        distinct = torch.unique(code[needed.bool()])
        position = rows * d + torch.searchsorted(distinct, code)
        self._slot = torch.cat([flat, position], dim=1).gather(1, used)
        self._sign = _SIGNS.to(row.device)[family]
        first, second = distinct // (rows * d), distinct % (rows * d)
        self._upper = _Sparse.of(first, second, rows * d)
        both = torch.cat([first * (rows * d) + second, second * (rows * d) + first])
        order = both.argsort()
        self._order = order % max(1, len(distinct))
        self._full = _Sparse.of(both[order] // (rows * d), both[order] % (rows * d), rows * d)

    @classmethod
    def none(cls, shape: tuple[int, int], device: torch.device) -> ActiveCuts:
        """No cuts."""
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return cls(shape, empty, empty, empty.view(0, 1).expand(0, 3), empty.float())

    def __len__(self) -> int:
        return len(self.row)

    def keys(self) -> Tensor:
        """One integer per cut."""
        return _keys(self.shape[1], self.row, self.family, self.index)

    def penalised(self, z: Tensor, sigma: Tensor, slack: float) -> Tensor:
        """Multipliers after a step, ``[u - sigma (cut + slack)]_+``."""
        flat = z.view(-1, z.shape[2])
        entries = torch.cat([flat[:, 0], self._upper.products(flat)])
        value = (1 + (self._sign * entries[self._slot]).sum(dim=1)) / 4
        stepped: Tensor = self.multiplier - sigma[self.row] * (value + slack)
        return stepped.clamp_(min=0)

    def add_gradient(self, multiplier: Tensor, z: Tensor, half: Tensor) -> None:
        """Subtract half the gradient of ``sum of multiplier * cut`` from ``half``."""
        flat = z.view(-1, z.shape[2])
        entries = torch.zeros(len(flat) + len(self._upper), device=z.device)
        entries.index_add_(
            0, self._slot.flatten(), (multiplier[:, None] * self._sign).flatten(), alpha=-0.125
        )
        out = half.view(flat.shape)
        out[:, 0] += entries[: len(flat)]
        if len(self._upper):
            out += self._full.times(entries[len(flat) :][self._order], flat)

    def of_row(self, row: int) -> tuple[Cuts, Array]:
        """Cuts and multipliers of one row that matter."""
        chosen = (self.row == row) & (self.multiplier > 0)
        cuts = Cuts(self.family[chosen].cpu().numpy(), self.index[chosen].cpu().numpy())
        return cuts, self.multiplier[chosen].double().cpu().numpy()


@dataclass(frozen=True)
class _Sparse:
    """A sparsity structure in compressed rows."""

    starts: Tensor
    columns: Tensor
    width: int

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, width: int) -> _Sparse:
        """From sorted entries."""
        bounds = torch.arange(width + 1, device=rows.device)
        return cls(torch.searchsorted(rows, bounds), columns, width)

    def __len__(self) -> int:
        return len(self.columns)

    def _with(self, values: Tensor) -> Tensor:
        with quiet_warnings("Sparse"):  # compressed rows are called a beta feature
            return torch.sparse_csr_tensor(
                self.starts,
                self.columns,
                values,
                (self.width, self.width),
                check_invariants=False,
            )

    def products(self, z: Tensor) -> Tensor:
        """``z_i . z_j`` at every entry."""
        if not len(self):
            return z.new_zeros(0)
        empty = self._with(z.new_zeros(len(self)))
        sampled: Tensor = torch.sparse.sampled_addmm(empty, z, z.T, beta=0.0)
        return sampled.values()

    def times(self, values: Tensor, z: Tensor) -> Tensor:
        """The matrix with these values, times ``z``."""
        return self._with(values) @ z


class LowRank:
    """The augmented Lagrangian method on a batch of rows.

    Parameters
    ----------
    rows
        The rows.
    pruned
        Bool ``[rows, d]``, a good ``x`` to begin near.
    loss
        Its scaled loss, float64 ``[rows]``: the unit of penalties.
    rank
        Length of the vectors.
    seed
        Of the random start.

    Attributes
    ----------
    rows
        As given.
    cuts
        Those in use.
    sigma, slack
        Penalty of a cut, float32 ``[rows]``, and by how much a cut may be violated: without it,
        the many cuts that nearly hold with equality anyway would all be active.
    value
        The augmented Lagrangian after the last round, float64 ``[rows]``: about the bound.
    evaluations
        Products with the Gram matrix so far.
    """

    def __init__(self, rows: Rows, pruned: Tensor, loss: Tensor, rank: int, seed: int) -> None:
        self.rows = rows
        count, d = rows.shape
        self._weight, self._gram = rows.weight.float(), rows.gram.float()
        summed = rows.weight * (rows.weight @ rows.gram)
        self._border = ((summed + rows.linear) / 4).float()
        self._diagonal = (rows.weight.square() * rows.gram.diagonal()).float()
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(count, d, rank, generator=generator).to(rows.size.device) / rank**0.5
        z[:, :, 0] += 0.7 * (2 * pruned.float() - 1)
        self._z = z / z.norm(dim=2, keepdim=True)
        self.unit = (loss.abs().clamp(min=1e-9) / d).float()
        self._rho = self.unit.clone()
        self._balance = torch.zeros(count, d // rows.width, rank, device=z.device)
        self.cuts = ActiveCuts.none(rows.shape, z.device)
        self.sigma = 8 * self.unit
        self.slack = 0.0
        self.evaluations = 0
        self._constant = summed.sum(dim=1) / 4 + rows.linear.sum(dim=1) / 2
        self.value = torch.zeros_like(loss)
        self._begun = False

    @property
    def relaxed(self) -> Tensor:
        """The relaxed x (1 = pruned), ``[rows, d]``, only nearly feasible."""
        relaxed: Tensor = (1 + self._z[:, :, 0]) / 2
        return relaxed

    def round(self, iterations: int, clock: Clock | None = None) -> None:
        """Minimise for fixed multipliers, then take the new ones.

        A round that the clock cuts short is taken back, but for the first: multipliers mean
        something only near a minimum.
        """
        before, value = self._z, self.value
        if not self._minimise(iterations, clock or Clock()) and self._begun:
            self._z, self.value = before, value
            return
        self._begun = True
        self._balance = self._balance + self._rho[:, None, None] * self._imbalance(self._z)
        if len(self.cuts):
            self.cuts.multiplier = self.cuts.penalised(self._z, self.sigma, self.slack)

    def separate(self, most: int) -> int:
        """Drop cuts without a multiplier, add the most violated; the number of new ones.

        Parameters
        ----------
        most
            New cuts per family and row.
        """
        old, d = self.cuts, self.cuts.shape[1]
        found = []
        for at_row, z in enumerate(self._z):
            products, first = z @ z.T, z[:, 0]
            total = first[:, None] + first
            violations = (
                -(1 + total + products),
                -(1 + first[:, None] - first - products),
                -(1 - total + products),
            )
            for kind, violation in enumerate(violations):
                if kind != 1:
                    violation = violation.triu(1)
                violation.fill_diagonal_(0.0)
                value, at = violation.view(-1).topk(min(most, d * d))
                at = at[value > 4 * self.slack + 1e-6]
                i, j = at // d, at % d
                found.append(_listed(at_row, kind, torch.stack([i, j, j], dim=1)))
        row, family, index = (torch.cat(parts) for parts in zip(*found, strict=True))
        live = old.multiplier > 0
        fresh = ~torch.isin(_keys(d, row, family, index), old.keys()[live])
        self.cuts = ActiveCuts(
            old.shape,
            torch.cat([old.row[live], row[fresh]]),
            torch.cat([old.family[live], family[fresh]]),
            torch.cat([old.index[live], index[fresh]]),
            torch.cat([old.multiplier[live], z.new_zeros(int(fresh.sum()))]),
        )
        return int(fresh.sum())

    def multipliers(self, row: int) -> tuple[Tensor, Tensor, float, Cuts, Array]:
        """What stationarity says about one row, in float64.

        Returns
        -------
        tuple
            ``M`` less the cuts; ``D`` of ``z_i^2 = 1`` for i = 0 to d; a constant, such that
            ``loss >= constant + sum(D) + z^T (M - Diag(D)) z``; the cuts and their multipliers.
        """
        form, constant = self.rows.form(row)
        cuts, multiplier = self.cuts.of_row(row)
        chosen = (self.cuts.row == row) & (self.cuts.multiplier > 0)
        u = self.cuts.multiplier[chosen].double()
        family = self.cuts.family[chosen]
        ends = _ENDS.to(form.device)[family]
        lifted = torch.cat([1 + self.cuts.index[chosen], u.new_zeros(len(u), 1).long()], dim=1)
        first, second = (lifted.gather(1, ends[:, :, end]) for end in (0, 1))
        share = -(u[:, None] * _SIGNS.to(form.device)[family]) / 8
        form.index_put_((first, second), share, accumulate=True)
        form.index_put_((second, first), share, accumulate=True)
        constant -= float(u.sum()) / 4
        z = torch.zeros(len(form), self._z.shape[2], dtype=torch.float64, device=form.device)
        z[0, 0] = 1.0
        z[1:] = self._z[row]
        force = self._balance[row].double() / 2
        product = form @ z
        product[1:] += force.repeat_interleave(self.rows.width, dim=0)
        product[0] -= self.rows.total * force.sum(dim=0)
        return form, (product * z).sum(dim=1), constant, cuts, multiplier

    def products(self, row: int) -> Tensor:
        """``X``: inner products of ``(1 + z_i) / 2``, and of ``z_0`` first, float64."""
        z = self._z[row].double()
        halves = torch.cat([torch.eye(1, z.shape[1], dtype=z.dtype, device=z.device), z / 2])
        halves[1:, 0] += 0.5
        return halves @ halves.T

    def _imbalance(self, z: Tensor) -> Tensor:
        """``sum of z_i - t z_0`` in every cell, ``[rows, cells, rank]``."""
        count, _, rank = z.shape
        sums = z.view(count, -1, self.rows.width, rank).sum(dim=2)
        sums[:, :, 0] -= self.rows.total
        return sums

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented Lagrangian, ``[rows]``, and half its gradient."""
        self.evaluations += 1
        count, d, rank = z.shape
        imbalance = self._imbalance(z)
        force = self._balance + self._rho[:, None, None] * imbalance
        weighted = (self._weight[:, :, None] * z).permute(1, 0, 2).reshape(d, count * rank)
        product = (self._gram @ weighted).view(d, count, rank).permute(1, 0, 2).contiguous()
        half = product * (self._weight / 4)[:, :, None]
        value = (half * z).sum(dim=(1, 2)) + 2 * (self._border * z[:, :, 0]).sum(dim=1)
        value += ((self._balance + force) * imbalance).sum(dim=(1, 2)) / 2
        half[:, :, 0] += self._border
        half += (force / 2).repeat_interleave(self.rows.width, dim=1)
        if len(self.cuts):
            multiplier = self.cuts.penalised(z, self.sigma, self.slack)
            value.index_add_(
                0, self.cuts.row, multiplier.square() / (2 * self.sigma[self.cuts.row])
            )
            self.cuts.add_gradient(multiplier, z, half)
        return value, half

    def _minimise(self, iterations: int, clock: Clock) -> bool:
        """L-BFGS on the spheres, all rows in step, each with its own step length.

        False if the clock cut it short.
        """
        z = self._z
        value, half = self._evaluate(z)
        gradient = _tangent(z, 2 * half)
        moves: list[tuple[Tensor, Tensor, Tensor]] = []
        complete = True
        for _ in range(iterations):
            if clock.expired:
                complete = False
                break
            direction = -_tangent(z, self._preconditioned(gradient, half, z, moves))
            slope = _inner(direction, gradient)
            uphill = slope >= 0
            if bool(uphill.any()):
                steepest = -_tangent(z, self._preconditioned(gradient, half, z, []))
                direction = torch.where(uphill[:, None, None], steepest, direction)
                slope = _inner(direction, gradient)
            step = torch.ones_like(value) if moves else torch.full_like(value, 0.5)
            for _ in range(_BACKTRACKS):
                moved = z + step[:, None, None] * direction
                moved /= moved.norm(dim=2, keepdim=True)
                new_value, half = self._evaluate(moved)
                rounding = 1e-6 * value.abs()
                enough = new_value <= value + _SUFFICIENT * step * slope + rounding
                if bool(enough.all()):
                    break
                step = torch.where(enough, step, 0.3 * step)
            finite = new_value.isfinite()
            if not bool(finite.all()):  # a step that left float32 is not made
                moved = torch.where(finite[:, None, None], moved, z)
                new_value, half = self._evaluate(moved)
            new_gradient = _tangent(moved, 2 * half)
            change, bend = moved - z, new_gradient - gradient
            curvature = _inner(change, bend)
            flat = 1e-12 * (_inner(change, change) * _inner(bend, bend)).sqrt()
            inverse = torch.where(curvature > flat, 1 / curvature, 0.0)
            moves = [*moves[-_MEMORY + 1 :], (change, bend, inverse)]
            z, value, gradient = moved, new_value, new_gradient
        self._z, self.value = z, value.double() + self._constant
        return complete

    def _preconditioned(
        self, gradient: Tensor, half: Tensor, z: Tensor, moves: list[tuple[Tensor, Tensor, Tensor]]
    ) -> Tensor:
        """Two-loop L-BFGS around `_inverse` of the Hessian's diagonal."""
        pull = -(half * z).sum(dim=2)
        floor = 1e-3 * self._diagonal.mean(dim=1, keepdim=True) + 1e-3 * self.unit[:, None]
        scale = 2 * pull.clamp(min=0) + self._diagonal / 2 + floor
        q, shares = gradient, []
        for change, bend, inverse in reversed(moves):
            share = inverse * _inner(change, q)
            q = q - share[:, None, None] * bend
            shares.append(share)
        q = self._inverse(scale, q)
        if moves:
            change, bend, inverse = moves[-1]
            fit = _inner(change, bend) / _inner(bend, self._inverse(scale, bend)).clamp(min=1e-30)
            q = q * fit.clamp(1e-3, 1e3)[:, None, None]
        for (change, bend, inverse), share in zip(moves, reversed(shares), strict=True):
            q = q + (share - inverse * _inner(bend, q))[:, None, None] * change
        return q

    def _inverse(self, scale: Tensor, vector: Tensor) -> Tensor:
        """``(Diag(scale) + rho N N^T)^-1``: the counts' penalty is the stiffest part."""
        count, _, rank = vector.shape
        cells = (count, -1, self.rows.width)
        divided = vector / scale[:, :, None]
        freedom = (1 / scale).view(cells).sum(dim=2)
        factor = self._rho[:, None] / (1 + self._rho[:, None] * freedom)
        sums = divided.view(*cells, rank).sum(dim=2) * factor[:, :, None]
        return divided - sums.repeat_interleave(self.rows.width, dim=1) / scale[:, :, None]


def _inner(first: Tensor, second: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return products


def _tangent(z: Tensor, vector: Tensor) -> Tensor:
    """Without its part along each ``z_i``."""
    return vector - (vector * z).sum(dim=2, keepdim=True) * z


def _keys(d: int, row: Tensor, family: Tensor, index: Tensor) -> Tensor:
    """One integer per cut, equal only for equal cuts."""
    i, j, k = index.T
    keys: Tensor = (((row * len(FAMILIES) + family) * d + i) * d + j) * d + k
    return keys


def _listed(row: int, family: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, family and inputs of some cuts."""
    of_row = torch.full((len(index),), row, dtype=torch.long, device=index.device)
    return of_row, torch.full_like(of_row, family), index
