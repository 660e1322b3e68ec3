"""Convex functions: what a user gives, checked at every use, and quadratics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..arrays import floats, number, short
from ..errors import InvalidInput
from ..rounding import UNIT_ROUNDOFF, factorisation_error, gamma, proves_semidefinite
from ..solution import Evidence
from .domain import TINY, Floats

Function: TypeAlias = Callable[[Floats], float]
Gradient: TypeAlias = Callable[[Floats], Floats]

_EPSILON = float(np.finfo(np.float64).eps)

GUARD = 64 * _EPSILON
"""Share of the terms of a bound taken off for a function that states no rounding error."""

_LARGEST = float(np.finfo(np.float64).max) / 4

_TANGENT = 1e-7
"""How far below its tangent a function may seem to lie, relative to the terms compared."""


class Quadratic:
    """``x^T Q x / 2 + linear^T x + constant``, convex, with a bound on its rounding errors.

    Parameters
    ----------
    matrix
        Q, ``[n, n]``, dense or scipy.sparse, symmetric positive semi-definite up to rounding
        errors of 1e-9.
    linear
        ``[n]``; None for zero.
    constant
        Added to every value.

    Attributes
    ----------
    matrix
        Q as used, ``(Q + Q^T) / 2``.
    deficit
        ``p >= 0``, ``[n]``, with ``Q + diag(p)`` positive semi-definite: proven.

    Examples
    --------
    >>> Quadratic([[2.0]], [-1.0])(np.array([3.0]))
    6.0
    """

    def __init__(
        self,
        matrix: Any,
        linear: npt.ArrayLike | None = None,
        constant: float = 0.0,
    ) -> None:
        matrix = floats(matrix, "A quadratic's matrix")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInput(f"A quadratic's matrix has shape {matrix.shape}; it must be square.")
        self.n = len(matrix)
        self.linear = np.zeros(self.n) if linear is None else floats(linear, "linear")
        self.constant = number(constant, "constant")
        if self.linear.shape != (self.n,):
            raise InvalidInput(f"linear has shape {self.linear.shape}; it must be ({self.n},).")
        size = float(np.abs(matrix).max(initial=0.0))
        # Half of the largest number and more would overflow where entries are added.
        if not (
            size < _LARGEST and np.isfinite(self.linear).all() and math.isfinite(self.constant)
        ):
            raise InvalidInput("A quadratic has NaN or infinite coefficients.")
        if np.abs(matrix - matrix.T).max(initial=0.0) > 1e-9 * size:
            raise InvalidInput("A quadratic's matrix is not symmetric; pass (Q + Q^T) / 2.")
        self.matrix = (matrix + matrix.T) / 2
        self.deficit = _deficit(self.matrix, size)
        self._reach = np.sqrt(self.matrix.diagonal().clip(min=0.0) + self.deficit)

    def __call__(self, x: Floats) -> float:
        return float(x @ (self.matrix @ x) / 2 + self.linear @ x) + self.constant

    def grad(self, x: Floats) -> Floats:
        """``Q x + linear``."""
        return np.asarray(self.matrix @ x + self.linear)

    def curvature(self, direction: Floats) -> float:
        """``d^T Q d``: the second derivative along ``direction``, the same everywhere."""
        return float(direction @ (self.matrix @ direction))

    def error(self, x: Floats, lower: Floats | None = None, upper: Floats | None = None) -> float:
        """What rounding may have changed: of the value, and of the tangent over a box.

        Parameters
        ----------
        x
            Float64 ``[n]``.
        lower, upper
            Float64 ``[n]``; None for the value alone.

        Returns
        -------
        float
            ``e`` with ``|f(x) - F(x)| <= e``, F the quadratic with these float64 coefficients in
            exact arithmetic; with bounds also ``F(y) >= f(x) + <grad(x), y - x> - e`` for every
            ``y`` within them.

        Notes
        -----
        With ``h_j = sqrt(Q_jj + p_j)``, p the deficit, ``|Q_ij| <= h_i h_j`` (the 2 x 2 minors of
        ``Q + diag(p)``; for i = j by definition up to signs that p makes up for), so that
        ``|x|^T |Q| |x| <= (h^T |x|)^2`` and ``(|Q| |x|)_j <= h_j h^T |x|``. Then

        - the value is two sums of n products on top of each other: off by at most
          ``gamma_{2n+4} ((h^T |x|)^2 / 2 + |l|^T |x| + |c|)``;
        - an entry of the gradient is off by ``gamma_{n+2} (h_j h^T |x| + |l_j|)``, which counts
          ``w_j = max |y_j - x_j|`` times;
        - ``F(y) = F(x) + <F'(x), y - x> + (y - x)^T Q (y - x) / 2``, whose last term is at least
          ``- sum_j p_j w_j^2 / 2``.

        The factor 1.001 covers the roundings of this computation itself, `TINY` underflow.
        """
        size = np.abs(x)
        total = float(self._reach @ size)
        error = gamma(2 * self.n + 4) * (
            total * total / 2 + float(np.abs(self.linear) @ size) + abs(self.constant)
        )
        if lower is not None and upper is not None:
            width = np.maximum(np.abs(upper - x), np.abs(x - lower))
            slope = self._reach * total + np.abs(self.linear)
            error += gamma(self.n + 2) * float(slope @ width)
            error += float(self.deficit @ (width * width)) / 2
            size = size + width
        error = 1.001 * error + 8 * self.n * TINY * (1 + float(size.sum()))
        return math.inf if math.isnan(error) else error

    @cached_property
    def strong_convexity(self) -> float:
        """A proven lower bound on the smallest eigenvalue of Q, at least 0."""
        size = float(np.abs(self.matrix).max(initial=0.0))
        if size == 0:
            return 0.0
        unit = float(np.ldexp(1.0, np.frexp(size)[1]))
        matrix = self.matrix / unit  # exact but for underflow
        least = float(np.linalg.eigvalsh(matrix)[0])
        trace = float(np.abs(matrix.diagonal()).sum())
        step = 2 * factorisation_error(self.n, trace) + self.n * TINY
        while least - step > 0:
            shifted = torch.from_numpy(matrix.copy())
            shifted.diagonal().sub_(least - step)
            if proves_semidefinite(shifted, 2 * UNIT_ROUNDOFF + self.n * TINY):
                return (least - step) * unit
            step *= 2
        return 0.0


def _deficit(matrix: Floats, size: float) -> Floats:
    """``p >= 0`` with ``Q + diag(p)`` proven positive semi-definite, or `InvalidInput`.

    Of two forms the smaller sum: p a multiple of the diagonal of Q, whatever the scales of the
    variables, and the same p for all, for matrices whose diagonal has zeros.
    """
    n = len(matrix)
    live = matrix.any(axis=1)
    if not live.any():
        return np.zeros(n)
    part = matrix if live.all() else matrix[np.ix_(live, live)]
    found: list[Floats] = []
    diagonal = part.diagonal()
    scales = [np.full(len(part), (np.frexp(size)[1] + 1) // 2)]
    if (diagonal > 0).all():
        scales.insert(0, (np.frexp(diagonal)[1] + 1) // 2)
    for scale in scales:
        # Scaled by powers of two: exact but for underflow.
        with np.errstate(over="ignore"):
            scaled = np.ldexp(np.ldexp(part, -scale), -scale[:, None])
        shift = _least_shift(torch.from_numpy(scaled))
        if math.isfinite(shift):
            found.append(np.zeros(n))
            found[-1][live] = np.ldexp(shift, 2 * scale)
        if shift == 0:
            break
    if not found:
        least = float(np.linalg.eigvalsh(matrix)[0])
        raise InvalidInput(
            f"A quadratic's matrix has the eigenvalue {least:.3g}; f must be convex."
        )
    return min(found, key=lambda p: float(p.sum()))


def _least_shift(matrix: torch.Tensor) -> float:
    """A small ``s >= 0`` with ``C + s I`` proven positive semi-definite; infinite if none is.

    Tried are 0, what a factorisation may be off by, and twice as much again and again up to 1e-9
    of the size of C.
    """
    n = len(matrix)
    diagonal = matrix.diagonal().clone()
    if not bool(torch.isfinite(matrix).all()):
        return math.inf
    error = n * TINY
    step = 2 * (error + factorisation_error(n, float(diagonal.abs().sum())))
    most = 2 * step + 1e-9 * n * float(matrix.abs().max())
    # Adding the shift rounds the diagonal.
    error += 2 * UNIT_ROUNDOFF * (float(diagonal.abs().max()) + most)
    shift = 0.0
    while not proves_semidefinite(matrix, error if shift else n * TINY):
        if shift >= most:
            return math.inf
        shift = min(max(2 * shift, step), most)
        matrix.diagonal().copy_(diagonal + shift)
    return shift


class Objective:
    """A user's function and gradient, with their answers checked.

    Parameters
    ----------
    function
        ``f(x) -> float``. If it has a method ``curvature(direction)``, it must be quadratic, and
        steps are exact. If it has a method ``error(x) -> float``, that is a bound on rounding
        errors, see `minimize`.
    gradient
        ``grad(x) -> [n]``; None if ``function`` has a method ``grad``.
    n
        Variables.

    Attributes
    ----------
    evidence
        GUARDED if rounding errors are bounded, CLAIMED if they are guessed.
    """

    def __init__(self, function: Function, gradient: Gradient | None, n: int) -> None:
        own = gradient is None
        gradient = getattr(function, "grad", None) if gradient is None else gradient
        if not callable(function):
            raise InvalidInput(f"f is {short(function)}; it must be a function of a point.")
        if gradient is None or not callable(gradient):
            raise InvalidInput("The function has no gradient; pass grad.")
        if isinstance(function, Quadratic) and function.n != n:
            raise InvalidInput(f"f is on {function.n} variables, but the domain has {n}.")
        for name in ("curvature", "error"):
            method = getattr(function, name, None)
            if method is not None and not callable(method):
                raise InvalidInput(f"f's {name} is {short(method)}; it must be a method.")
        self._function, self._gradient, self._n = function, gradient, n
        self._curvature: Callable[[Floats], float] | None = getattr(function, "curvature", None)
        self._quadratic: Quadratic | None = None
        self._error: Callable[[Floats], float] | None = None
        if isinstance(function, Quadratic):
            self._quadratic = function if own else None
        else:
            self._error = getattr(function, "error", None)
        derived = self._quadratic is not None or self._error is not None
        self.evidence = Evidence.GUARDED if derived else Evidence.CLAIMED

    @property
    def quadratic(self) -> bool:
        """Whether the function says that it is quadratic."""
        return self._curvature is not None

    @property
    def everywhere(self) -> bool:
        """Whether the function is known to be convex and finite beyond the domain."""
        return self._quadratic is not None

    def proven_convexity(self) -> float:
        """``mu`` for which strong convexity is proven."""
        return 0.0 if self._quadratic is None else self._quadratic.strong_convexity

    def value_error(self, x: Floats, value: float) -> float:
        """How far ``value`` may be from ``f(x)`` in exact arithmetic."""
        if self._quadratic is not None:
            return self._quadratic.error(x)
        return GUARD * abs(value) if self._error is None else self._stated(x)

    def tangent_error(
        self, x: Floats, value: float, gradient: Floats, lower: Floats, upper: Floats
    ) -> float:
        """How far above ``f`` its computed tangent in ``x`` may be within bounds."""
        if self._quadratic is not None:
            return self._quadratic.error(x, lower, upper)
        if self._error is not None:
            return self._stated(x)
        reach = np.abs(x) + np.maximum(np.abs(lower), np.abs(upper))
        return GUARD * float(abs(value) + np.abs(gradient) @ reach)

    def _stated(self, x: Floats) -> float:
        assert self._error is not None
        error = number(self._error(x), "f's error")
        if not 0 <= error < math.inf:
            raise InvalidInput(f"f's error is {error}; it must be a finite number from 0 upwards.")
        return error

    def value(self, x: Floats) -> float:
        """``f(x)``, finite or `InvalidInput`."""
        value = number(self._function(x), "f's value")
        if not math.isfinite(value):
            raise InvalidInput(f"f is {value} inside the domain; it must be finite there.")
        return value

    def gradient(self, x: Floats) -> Floats:
        """Gradient at ``x``, float64 ``[n]``, finite or `InvalidInput`."""
        gradient = floats(self._gradient(x), "grad", copy=False)
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
            curvature = number(self._curvature(direction), "f's curvature")
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
        if self._quadratic is not None:
            return  # proven
        change = gradient * (y - x)
        size = abs(value) + abs(at) + float(np.abs(change).sum())
        if at - value - float(change.sum()) < -_TANGENT * size:
            raise InvalidInput(
                "f lies below one of its tangents: it is not convex, or grad is not its gradient."
            )
