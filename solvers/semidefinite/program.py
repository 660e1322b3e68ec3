"""A quadratic program in binaries whose cells have fixed sums: a row, or a small layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput
from ..pattern import CellPattern
from ..problem import MaskProblem

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BinaryProgram:
    """``min x^T Q x + l^T x + c`` over binary ``x`` (1 = pruned) with ``s_g`` ones in cell g.

    Without cells, all binary ``x`` are allowed.

    Attributes
    ----------
    quadratic
        ``Q = Diag(w) G Diag(w)``, float64 ``[d, d]``.
    linear
        ``l``, float64 ``[d]``.
    cell
        Cell of each input, int ``[d]``; empty if there are none.
    pruned
        ``s``, the number of ones in each cell, int ``[cells]``.
    constant
        ``c``, the loss of what is fixed outside the program.
    """

    quadratic: Array
    linear: Array
    cell: Array
    pruned: Array
    constant: float = 0.0

    @classmethod
    def of(cls, problem: MaskProblem) -> BinaryProgram:
        """A single row, or all rows of a layer that share a budget, after one another.

        Raises
        ------
        InvalidInput
            If the pattern has no cells of fixed count, or the problem falls into rows.
        """
        pattern, (rows, d) = problem.pattern, problem.shape
        if not isinstance(pattern, CellPattern):
            raise InvalidInput(f"The pattern {pattern} has no cells of fixed count.")
        if rows > 1 and not pattern.coupled:
            raise InvalidInput("Rows without a shared budget are separate programs; take one.")
        quadratic, linear = problem.quadratic_form()
        size = pattern.cell_size((rows, d))
        return cls(
            quadratic=quadratic,
            linear=linear,
            cell=np.arange(rows * d) // size,
            pruned=np.full(rows * d // size, size - pattern.kept_per_cell((rows, d))),
        )

    @classmethod
    def priced(cls, problem: MaskProblem, row: int, price: float) -> BinaryProgram:
        """One row that may prune any number of weights, each for ``price``."""
        weight, gram = problem.weight[row].double().cpu().numpy(), problem.gram.double()
        linear = np.zeros(len(weight))
        if problem.linear is not None:
            linear = problem.linear[row].cpu().numpy()
        none = np.zeros(0, np.int64)
        return cls(weight[:, None] * gram.cpu().numpy() * weight, linear - price, none, none)

    @property
    def inputs(self) -> int:
        """``d``."""
        return len(self.linear)

    @property
    def ones(self) -> int:
        """Most ones in an allowed ``x``; where there are cells, each has as many."""
        return int(self.pruned.sum()) if len(self.pruned) else self.inputs

    @property
    def size(self) -> float:
        """Trace of Q plus the linear costs' magnitude: what losses are measured against."""
        return float(np.trace(self.quadratic) + np.abs(self.linear).sum())

    @property
    def magnitude(self) -> float:
        """``sum |Q_ij| + sum |l_i| + |c|``: no partial sum of an objective exceeds it."""
        total = np.abs(self.quadratic).sum() + np.abs(self.linear).sum() + abs(self.constant)
        return float(total)

    def scaled(self, factor: float) -> BinaryProgram:
        """The same program with all losses multiplied."""
        return BinaryProgram(
            self.quadratic * factor,
            self.linear * factor,
            self.cell,
            self.pruned,
            self.constant * factor,
        )

    def restricted(self, free: Array, ones: Array) -> BinaryProgram:
        """The program over the ``free`` inputs, the others fixed at one where ``ones``.

        Parameters
        ----------
        free, ones
            Bool ``[d]``, nowhere both. The ones must fit into their cells.
        """
        cells, cell = np.unique(self.cell[free], return_inverse=True)
        fixed = np.bincount(self.cell[ones], minlength=len(self.pruned))
        return BinaryProgram(
            quadratic=self.quadratic[np.ix_(free, free)],
            linear=self.linear[free] + 2 * self.quadratic[np.ix_(free, ones)].sum(axis=1),
            cell=cell,
            pruned=(self.pruned - fixed)[cells],
            constant=self.objective(ones.astype(np.float64)),
        )

    def objective(self, x: Array) -> float:
        """Loss of one ``x``."""
        return float(x @ self.quadratic @ x + self.linear @ x + self.constant)

    def lifted(self) -> Array:
        """``[0 l^T/2; l/2 Q]``, so that the loss is ``y^T C y + c`` with ``y = (1, x)``."""
        lifted = np.zeros((self.inputs + 1, self.inputs + 1))
        lifted[1:, 1:] = self.quadratic
        lifted[0, 1:] = lifted[1:, 0] = self.linear / 2
        return lifted

    def normals(self) -> Array:
        """Orthonormal ``[d + 1, cells]`` that span what is orthogonal to every ``(1, x)``."""
        cells = len(self.pruned)
        equalities = np.zeros((self.inputs + 1, cells))
        if cells:
            equalities[0] = -self.pruned
            equalities[1 + np.arange(self.inputs), self.cell] = 1.0
        basis: Array = np.linalg.qr(equalities)[0]
        return basis

    def centre(self) -> Array:
        """The mean of all allowed ``x``, ``[d]``."""
        if len(self.pruned) == 0:
            return np.full(self.inputs, 0.5)
        found: Array = self.pruned[self.cell] / np.bincount(self.cell)[self.cell]
        return found

    def cell_normals(self) -> Array:
        """Orthonormal ``[d, cells]`` that span what is orthogonal to every difference of two x."""
        cells = len(self.pruned)
        indicator = np.zeros((self.inputs, cells))
        if cells:
            indicator[np.arange(self.inputs), self.cell] = 1.0
            indicator /= np.linalg.norm(indicator, axis=0)
        return indicator
