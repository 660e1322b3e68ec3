"""Convex functions: what a user gives, checked at every use, and quadratics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput
from .domain import Floats

Function: TypeAlias = Callable[[Floats], float]
Gradient: TypeAlias = Callable[[Floats], Floats]

_EPSILON = float(np.finfo(np.float64).eps)

GUARD = 64 * _EPSILON
"""Share of the terms of a bound that rounding errors may have cost; it is taken off."""

_TANGENT = 1e-7
"""How far below its tangent a function may seem to lie, relative to the terms compared."""


class Quadratic:
    """``x^T Q x / 2 + linear^T x + constant``, convex.

    Parameters
    ----------
    matrix
        Q, ``[n, n]``, symmetric positive semi-definite.
    linear
        ``[n]``; None for zero.
    constant
        Added to every value.

    Examples
    --------
    >>> Quadratic([[2.0]], [-1.0])(np.array([3.0]))
    6.0
    """

    def __init__(
        self,
        matrix: npt.ArrayLike,
        linear: npt.ArrayLike | None = None,
        constant: float = 0.0,
    ) -> None:
        matrix = np.array(matrix, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInput(f"A quadratic's matrix has shape {matrix.shape}; it must be square.")
        self.n = len(matrix)
        self.linear = np.zeros(self.n) if linear is None else np.array(linear, dtype=np.float64)
        self.constant = float(constant)
        if self.linear.shape != (self.n,):
            raise InvalidInput(f"linear has shape {self.linear.shape}; it must be ({self.n},).")
        if not (np.isfinite(matrix).all() and np.isfinite(self.linear).all()):
            raise InvalidInput("A quadratic has NaN or infinite coefficients.")
        size = np.abs(matrix).max(initial=0.0)
        if np.abs(matrix - matrix.T).max(initial=0.0) > 1e-9 * size:
            raise InvalidInput("A quadratic's matrix is not symmetric; pass (Q + Q^T) / 2.")
        self.matrix = (matrix + matrix.T) / 2
        self._least = float(np.linalg.eigvalsh(self.matrix)[0])
        if self._least < -1e-9 * self.n * size:
            raise InvalidInput(
                f"A quadratic's matrix has the eigenvalue {self._least:.3g}; f must be convex."
            )

    def __call__(self, x: Floats) -> float:
        return float(x @ (self.matrix @ x) / 2 + self.linear @ x) + self.constant

    def grad(self, x: Floats) -> Floats:
        """``Q x + linear``."""
        return np.asarray(self.matrix @ x + self.linear)

    def curvature(self, direction: Floats) -> float:
        """``d^T Q d``: the second derivative along ``direction``, the same everywhere."""
        return float(direction @ (self.matrix @ direction))

    @property
    def strong_convexity(self) -> float:
        """A safe lower bound on the smallest eigenvalue of Q, at least 0."""
        size = float(np.abs(self.matrix).sum(axis=1).max(initial=0.0))
        return max(0.0, self._least - 8 * self.n * _EPSILON * size)


class Objective:
    """A user's function and gradient, with their answers checked.

    Parameters
    ----------
    function
        ``f(x) -> float``. If it has a method ``curvature(direction)``, it must be quadratic, and
        steps are exact.
    gradient
        ``grad(x) -> [n]``; None if ``function`` has a method ``grad``.
    n
        Variables.
    """

    def __init__(self, function: Function, gradient: Gradient | None, n: int) -> None:
        gradient = getattr(function, "grad", None) if gradient is None else gradient
        if gradient is None:
            raise InvalidInput("The function has no gradient; pass grad.")
        self._function, self._gradient, self._n = function, gradient, n
        self._curvature: Callable[[Floats], float] | None = getattr(function, "curvature", None)

    @property
    def quadratic(self) -> bool:
        """Whether the function says that it is quadratic."""
        return self._curvature is not None

    def value(self, x: Floats) -> float:
        """``f(x)``, finite or `InvalidInput`."""
        value = float(self._function(x))
        if not math.isfinite(value):
            raise InvalidInput(f"f is {value} inside the domain; it must be finite there.")
        return value

    def gradient(self, x: Floats) -> Floats:
        """Gradient at ``x``, float64 ``[n]``, finite or `InvalidInput`."""
        gradient = np.asarray(self._gradient(x), dtype=np.float64)
        if gradient.shape != (self._n,):
            raise InvalidInput(f"grad has shape {gradient.shape}; it must be ({self._n},).")
        if not np.isfinite(gradient).all():
            raise InvalidInput("grad has NaN or infinite values inside the domain.")
        return gradient

    def step(self, x: Floats, slope: float, direction: Floats, limit: float) -> float:
        """Length of the best step from ``x`` along a ``direction`` of descent.

        Parameters
        ----------
        x, direction
            Float64 ``[n]``.
        slope
            Derivative along ``direction``, negative.
        limit
            Longest step allowed.
        """
        if self._curvature is not None:
            curvature = float(self._curvature(direction))
            return limit if curvature * limit <= -slope else -slope / curvature
        end = float(self.gradient(x + limit * direction) @ direction)
        if end <= 0:
            return limit
        return self._secant(x, direction, (0.0, slope), (limit, end))

    def _secant(
        self,
        x: Floats,
        direction: Floats,
        left: tuple[float, float],
        right: tuple[float, float],
    ) -> float:
        """Zero of the derivative between two points where it has opposite signs (Illinois)."""
        first = left[1]
        step = side = 0.0
        for _ in range(50):
            step = left[0] - left[1] * (right[0] - left[0]) / (right[1] - left[1])
            slope = float(self.gradient(x + step * direction) @ direction)
            if abs(slope) <= 1e-6 * abs(first):
                break
            if slope < 0:
                left, right = (step, slope), (right[0], right[1] / (2 if side < 0 else 1))
            else:
                left, right = (left[0], left[1] / (2 if side > 0 else 1)), (step, slope)
            side = math.copysign(1.0, slope)
        return step

    def check_tangent(
        self, x: Floats, value: float, gradient: Floats, y: Floats, at: float
    ) -> None:
        """Raise `InvalidInput` if ``f(y) = at`` lies below the tangent in ``x``."""
        change = gradient * (y - x)
        size = abs(value) + abs(at) + float(np.abs(change).sum())
        if at - value - float(change.sum()) < -_TANGENT * size:
            raise InvalidInput(
                "f lies below one of its tangents: it is not convex, or grad is not its gradient."
            )
