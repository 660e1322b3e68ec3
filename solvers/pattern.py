"""Sparsity patterns: which masks are allowed, and the oracles over them.

Everything here speaks of masks ``m``: ``True`` (or 1) means *keep*. ``sparsity`` is the
fraction *removed*, and ``NM(keep=2, group=4)``, written "2:4", *keeps* 2 of every 4
consecutive inputs. How many weights a sparsity removes is what `removed_count` says, everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor

from .errors import InvalidInput, NoMask
from .options import whole_number

Shape = tuple[int, int]
"""``(rows, inputs)`` of a layer's weight."""

_NEARLY = 1e-9, 4e-16
"""How near to the next whole number a product counts as it: at least, and per unit of the size.

Covers the error of a share such as 1/3 that no float is, times the size."""


def removed_count(size: int, sparsity: float) -> int:
    """How many of ``size`` entries a sparsity removes: as many as the exact product allows.

    The product is that of the decimal number that the sparsity is written as, so that 0.29 of 100
    is 29 although the float 0.29 times 100 is below 29. A product within rounding of the next whole
    number, at most 1e-9 or 4e-16 of the size below it, counts as that number: 1/3 of 3 is 1.

    Parameters
    ----------
    size
        A count of entries.
    sparsity
        In [0, 1].

    Raises
    ------
    InvalidInput
        If it is not, or the size is no count.

    Examples
    --------
    >>> from solvers import removed_count
    >>> removed_count(100, 0.29), int(100 * 0.29), removed_count(3, 1 / 3), removed_count(10, 0.58)
    (29, 28, 1, 5)
    """
    share = _as_share(sparsity)
    if share is None or not 0 <= share <= 1:
        raise InvalidInput(f"Sparsity {sparsity!r} is no number in [0, 1].")
    return _removed_count(whole_number(size, "size", least=0), share)


@lru_cache(maxsize=4096)
def _removed_count(size: int, sparsity: float) -> int:
    exact = Fraction(repr(sparsity)) * size
    count = math.floor(exact)
    least, per_entry = _NEARLY
    return count + (count < size and count + 1 - exact <= max(least, per_entry * size))


def _as_share(value: Any) -> float | None:
    """The number that a share is written as; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return None
    if isinstance(value, np.floating) and value.dtype.itemsize < 8:
        return float(str(value))  # np.float32(0.6) is meant to be 0.6
    try:
        return float(value)
    except OverflowError:
        return None


@dataclass(frozen=True)
class Neighbourhood:
    """Which pairs (kept, pruned) a 1-swap may exchange.

    Attributes
    ----------
    width
        A swap inside a row stays inside one block of ``width`` consecutive inputs.
    across_rows
        Whether a weight of one row may also be exchanged for a weight of another.
    """

    width: int
    across_rows: bool


@dataclass(frozen=True)
class Constraints:
    """``lower <= matrix @ mask.flatten() <= upper``, rows of the mask after one another.

    Attributes
    ----------
    matrix
        Sparse, ``[constraints, rows * d]``.
    lower, upper
        Float64 ``[constraints]``; infinite where there is no bound.
    """

    matrix: csr_array
    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]


class Pattern(ABC):
    """A set of allowed masks, known through its oracles.

    Subclasses are immutable and independent of a layer's size; every question about a
    concrete layer takes its shape from the argument.
    """

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Raise `InvalidInput` if no mask of this shape can follow the pattern."""

    @abstractmethod
    def violation(self, mask: Tensor) -> str | None:
        """Say in a few words why ``mask`` (bool ``[rows, d]``) is not allowed, or None."""

    @abstractmethod
    def lmo(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        """Linear minimisation oracle, optionally under bounds.

        Parameters
        ----------
        direction
            Float ``[rows, d]``.
        lower, upper
            Bool ``[rows, d]``: entries with ``lower`` must be kept, entries without
            ``upper`` must be pruned. These are the bounds of a branch-and-bound node.

        Returns
        -------
        Tensor
            Bool ``[rows, d]``: an allowed mask that minimises ``<direction, mask>``.

        Raises
        ------
        InvalidInput
            If the bounds leave no allowed mask, or the direction has NaN.
        """

    def unchecked_lmo(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        """`lmo` without looking for mistakes in its arguments, which makes a GPU wait.

        For searches that call it every iteration, with directions without NaN and bounds that
        leave a mask.
        """
        return self.lmo(direction, lower, upper)

    @abstractmethod
    def neighbourhood(self, shape: Shape) -> Neighbourhood | None:
        """Pairs that a swap may exchange; None if swaps do not preserve the pattern."""

    @abstractmethod
    def constraints(self, shape: Shape) -> Constraints:
        """The pattern as linear constraints on binaries, for solvers that want them spelled out."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description."""

    @property
    def coupled(self) -> bool:
        """Whether the rows share a budget, so that they cannot be solved one by one."""
        return False

    def is_feasible(self, mask: Tensor) -> bool:
        """Whether ``mask`` (bool ``[rows, d]``) is allowed."""
        return self.violation(mask) is None

    def round(self, relaxed: Tensor) -> Tensor:
        """Nearest allowed mask to ``relaxed`` (float ``[rows, d]``), exact counts even with ties.

        ``|m - z|^2`` is linear in a binary ``m`` with fixed count, so this is the oracle at ``-z``.
        """
        return self.lmo(-relaxed)


class CellPattern(Pattern):
    """A pattern that keeps a fixed number of entries in every *cell* of equal size.

    A cell is a row, a group of consecutive inputs, or the whole layer. The polytope is a
    product of hypersimplices, hence integral, and its oracle one batched selection.
    """

    @abstractmethod
    def cell_size(self, shape: Shape) -> int:
        """Entries per cell."""

    @abstractmethod
    def kept_per_cell(self, shape: Shape) -> int:
        """Entries kept in each cell."""

    @abstractmethod
    def cell_name(self, shape: Shape, cell: int) -> str:
        """How to call a cell in a message."""

    def check(self, shape: Shape) -> None:
        size, kept = self.cell_size(shape), self.kept_per_cell(shape)
        if not 0 <= kept <= size:
            raise InvalidInput(
                f"{self} keeps {kept} of {size} weights; choose a count in 0..{size}."
            )

    def cells(self, values: Tensor) -> Tensor:
        """View ``[rows, d]`` as ``[cells, cell size]``."""
        return values.reshape(-1, self.cell_size(_shape(values)))

    def constraints(self, shape: Shape) -> Constraints:
        rows, d = shape
        index = self.cells(torch.arange(rows * d).view(rows, d)).numpy()
        cells, size = index.shape
        starts = np.arange(0, rows * d + 1, size)
        matrix = csr_array((np.ones(rows * d), index.ravel(), starts), shape=(cells, rows * d))
        kept = np.full(cells, float(self.kept_per_cell(shape)))
        return Constraints(matrix, kept, kept)

    def violation(self, mask: Tensor) -> str | None:
        shape = _shape(mask)
        kept = self.kept_per_cell(shape)
        counts = self.cells(mask).sum(dim=1)
        wrong = (counts != kept).nonzero()
        if len(wrong) == 0:
            return None
        cell = int(wrong[0])
        return (
            f"{self.cell_name(shape, cell)} keeps {int(counts[cell])} weights where "
            f"{self} keeps {kept}"
        )

    def lmo(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        if bool(torch.isnan(direction).any()):
            row = int(torch.isnan(direction).any(dim=1).nonzero()[0])
            raise InvalidInput(
                f"The direction has NaN, first in row {row}, and no mask is best; mend it first."
            )
        shape = _shape(direction)
        self._check_bounds(shape, self.kept_per_cell(shape), lower, upper)
        return self.unchecked_lmo(direction, lower, upper)

    def unchecked_lmo(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        shape = _shape(direction)
        if upper is not None:
            direction = direction.masked_fill(~upper, math.inf)
        if lower is not None:
            direction = direction.masked_fill(lower, -math.inf)
        kept = self.kept_per_cell(shape)
        cells = self.cells(direction)
        chosen = cells.topk(kept, dim=1, largest=False, sorted=False).indices
        mask = torch.zeros(cells.shape, dtype=torch.bool, device=cells.device)
        return mask.scatter_(1, chosen, True).reshape(shape)

    def _check_bounds(
        self, shape: Shape, kept: int, lower: Tensor | None, upper: Tensor | None
    ) -> None:
        if lower is not None and upper is not None and bool((lower & ~upper).any()):
            raise InvalidInput("A weight is fixed both as kept and as pruned; drop one of the two.")
        if lower is not None:
            fixed = self.cells(lower).sum(dim=1)
            self._refuse(shape, fixed > kept, fixed, f"keeps {kept} but {{}} are fixed as kept")
        if upper is not None:
            free = self.cells(upper).sum(dim=1)
            self._refuse(shape, free < kept, free, f"keeps {kept} but only {{}} may be kept")

    def _refuse(self, shape: Shape, wrong: Tensor, counts: Tensor, reason: str) -> None:
        if bool(wrong.any()):
            cell = int(wrong.nonzero()[0])
            raise NoMask(
                f"The fixed weights leave no mask: {self.cell_name(shape, cell)} "
                f"{reason.format(int(counts[cell]))}; free some of them."
            )


class _Budget(CellPattern):
    """A cell pattern whose count is given as a sparsity or as a number of kept weights."""

    sparsity: float | None
    keep: int | None
    _scope: str

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.keep is None):
            raise InvalidInput(f"{type(self).__name__} takes either sparsity or keep.")
        if self.keep is not None:
            object.__setattr__(self, "keep", whole_number(self.keep, "keep", least=0))
            return
        share = _as_share(self.sparsity)
        if share is None or not 0.0 < share < 1.0:
            wrong = "no number" if share is None else "outside (0, 1)"
            raise InvalidInput(
                f"Sparsity {self.sparsity!r} is {wrong}; it is the fraction of weights removed."
            )
        object.__setattr__(self, "sparsity", share)

    def kept_per_cell(self, shape: Shape) -> int:
        size = self.cell_size(shape)
        if self.keep is not None:
            return self.keep
        assert self.sparsity is not None
        return size - _removed_count(size, self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": f"per_{self._scope}", "sparsity": self.sparsity, "keep": self.keep}

    def __str__(self) -> str:
        amount = f"keep {self.keep}" if self.sparsity is None else f"{self.sparsity:.4g} sparsity"
        return f"{amount} per {self._scope}"


@dataclass(frozen=True)
class PerRow(_Budget):
    """Every row keeps ``d - removed_count(d, sparsity)`` weights (or exactly ``keep``).

    ``sparsity=0.29`` of 100 inputs removes 29, see `removed_count`.

    Raises
    ------
    InvalidInput
        If sparsity is outside (0, 1), ``keep`` is no count, or not exactly one of the two is given.
    """

    sparsity: float | None = None
    keep: int | None = None
    _scope = "row"

    def cell_size(self, shape: Shape) -> int:
        return shape[1]

    def cell_name(self, shape: Shape, cell: int) -> str:
        return f"row {cell}"

    def neighbourhood(self, shape: Shape) -> Neighbourhood:
        return Neighbourhood(width=shape[1], across_rows=False)


@dataclass(frozen=True)
class PerLayer(_Budget):
    """The layer as a whole keeps ``n - removed_count(n, sparsity)`` of its n weights (or ``keep``).

    Raises
    ------
    InvalidInput
        If sparsity is outside (0, 1), ``keep`` is no count, or not exactly one of the two is given.
    """

    sparsity: float | None = None
    keep: int | None = None
    _scope = "layer"

    @property
    def coupled(self) -> bool:
        return True

    def cell_size(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def cell_name(self, shape: Shape, cell: int) -> str:
        return "the layer"

    def neighbourhood(self, shape: Shape) -> Neighbourhood:
        return Neighbourhood(width=shape[1], across_rows=True)


@dataclass(frozen=True)
class NM(CellPattern):
    """Keep ``keep`` of every ``group`` consecutive inputs, written "keep:group" ("2:4").

    Raises
    ------
    InvalidInput
        If they are no whole numbers, or ``keep`` is not in 1..group-1.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        for name in ("keep", "group"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name))
        if not 0 < self.keep < self.group:
            raise InvalidInput(
                f"Pattern {self.keep}:{self.group} keeps {self.keep} of every {self.group} inputs; "
                f"the kept number must be in 1..{max(self.group - 1, 1)}."
            )

    @classmethod
    def parse(cls, text: str) -> NM:
        """Read "2:4"."""
        try:
            keep, group = (int(part) for part in text.split(":"))
        except (ValueError, AttributeError):
            raise InvalidInput(
                f"Pattern '{text}' is not of the form keep:group, such as 2:4."
            ) from None
        return cls(keep, group)

    def check(self, shape: Shape) -> None:
        if shape[1] % self.group:
            raise InvalidInput(
                f"Pattern {self} needs a number of inputs divisible by {self.group}, "
                f"but this layer has {shape[1]}."
            )

    def cell_size(self, shape: Shape) -> int:
        return self.group

    def kept_per_cell(self, shape: Shape) -> int:
        return self.keep

    def cell_name(self, shape: Shape, cell: int) -> str:
        row, group = divmod(cell, shape[1] // self.group)
        return f"row {row}, group {group}"

    def neighbourhood(self, shape: Shape) -> Neighbourhood:
        return Neighbourhood(width=self.group, across_rows=False)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "nm", "keep": self.keep, "group": self.group}

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


def pattern_from_dict(record: dict[str, Any]) -> Pattern:
    """The pattern that `Pattern.to_dict` described; `InvalidInput` if it describes none here."""
    kinds: dict[str, type[PerRow | PerLayer | NM]] = {
        "per_row": PerRow,
        "per_layer": PerLayer,
        "nm": NM,
    }
    try:
        fields = {name: value for name, value in record.items() if name != "kind"}
        return kinds[record["kind"]](**fields)
    except (AttributeError, KeyError, TypeError):
        raise InvalidInput(f"{record} describes no pattern known here.") from None


def _shape(values: Tensor) -> Shape:
    rows, inputs = values.shape
    return rows, inputs
