"""Arrays of users as tensors of the kinds that solvers work with, or a sentence that says why not.

Taken are NumPy arrays of any stride, byte order and kind of real number, torch tensors, sequences
of numbers, and whatever NumPy makes an array of. Half precision, 8-bit floats and bfloat16 become
float32 in torch, float16 and long doubles float64 in NumPy, whole numbers float64.
"""

from __future__ import annotations

import numbers as number_types
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array, issparse
from torch import Tensor

from .errors import InvalidInput

ArrayLike: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[Any]

_HELD = (torch.float32, torch.float64)


def numbers(
    values: Any, name: str, device: torch.device | None = None, *, copy: bool = True
) -> Tensor:
    """Float32 or float64, with the values of an array.

    Parameters
    ----------
    values
        The array.
    name
        What to call it in messages.
    device
        Where the tensor is to be; by default where ``values`` are.
    copy
        Whether it must not share memory with ``values``.

    Raises
    ------
    InvalidInput
        If ``values`` are no array of real numbers that are there.
    """
    given = isinstance(values, Tensor)
    tensor = _dense(values if given else _from_numpy(values, name, copy=copy), name)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise InvalidInput(f"{name} has type {short(tensor.dtype)}; give real numbers.")
    if tensor.dtype not in _HELD:
        try:
            tensor = tensor.to(torch.float32 if tensor.is_floating_point() else torch.float64)
        except (RuntimeError, TypeError):
            raise InvalidInput(
                f"{name} has type {short(tensor.dtype)}, which torch cannot convert; "
                "give float32 or float64."
            ) from None
    if device is not None:
        tensor = tensor.to(device)
    if copy and given and _shares(tensor, values):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def matrix(
    values: Any, name: str, device: torch.device | None = None, *, copy: bool = True
) -> Tensor:
    """As `numbers`; `InvalidInput` also where it is no matrix, is empty or not finite."""
    tensor = numbers(values, name, device, copy=copy)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InvalidInput(
            f"{name} has shape {tuple(tensor.shape)}; it must be a non-empty matrix."
        )
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).any(dim=1).nonzero()[0])
        raise InvalidInput(f"{name} has NaN or infinite values, first in row {row}; mend it first.")
    return tensor


def truths(values: Any, name: str, device: torch.device | None = None) -> Tensor:
    """A bool tensor; `InvalidInput` if ``values`` are no array of True and False."""
    given = isinstance(values, Tensor)
    tensor = _dense(values if given else _from_numpy(values, name, truths=True), name)
    if tensor.dtype != torch.bool:
        raise InvalidInput(f"{name} must be boolean (True = keep), not {short(tensor.dtype)}.")
    return tensor if device is None else tensor.to(device)


def floats(values: Any, name: str, *, copy: bool = True) -> npt.NDArray[np.float64]:
    """Float64 in NumPy, of any number of dimensions, with the values of an array.

    Parameters
    ----------
    values
        The array: dense or sparse, of NumPy, SciPy or torch, sequences, or one number.
    name
        What to call it in messages.
    copy
        Whether it must not share memory with ``values``.

    Raises
    ------
    InvalidInput
        If ``values`` are no real numbers that are there.
    """
    if isinstance(values, Tensor):
        tensor = _dense(values, name)
        if tensor.is_complex():
            raise InvalidInput(f"{name} has type {short(tensor.dtype)}; give real numbers.")
        values = tensor.cpu().double().numpy()
    array = _asarray(values.toarray() if issparse(values) else values, name)
    if array.dtype.kind == "O" and all(isinstance(one, number_types.Real) for one in array.flat):
        try:
            array = array.astype(np.float64)
        except (OverflowError, ValueError, TypeError):
            raise InvalidInput(f"{name} has numbers too large for float64; scale them.") from None
    if array.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} has type {array.dtype}; give real numbers.")
    with np.errstate(over="ignore"):
        held = array.astype(np.float64, copy=False)
    return held.copy() if copy and np.may_share_memory(held, array) else held


def number(value: Any, name: str) -> float:
    """A real number as a float, perhaps infinite or NaN; `InvalidInput` if it is none.

    Taken are also arrays and tensors without dimensions.
    """
    if isinstance(value, float):
        return float(value)
    held = floats(value, name, copy=False)
    truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if held.ndim or truth:
        raise InvalidInput(f"{name} is {short(value)}; give one real number.")
    return float(held)


def sparse_rows(values: Any, name: str) -> csr_array:
    """A float64 copy of a matrix, dense or sparse; `InvalidInput` where it is none."""
    if issparse(values):
        if values.dtype.kind not in "fiub":
            raise InvalidInput(f"{name} has type {values.dtype}; give real numbers.")
    else:
        values = floats(values, name)
    if values.ndim != 2 or values.shape[1] == 0:
        raise InvalidInput(
            f"{name} have shape {tuple(values.shape)}; give a non-empty matrix [constraints, "
            "variables]."
        )
    return csr_array(values, dtype=np.float64, copy=True)


def _dense(tensor: Tensor, name: str) -> Tensor:
    """Detached and dense."""
    if tensor.is_meta:
        raise InvalidInput(f"{name} is on the meta device, without values; load them first.")
    if tensor.is_quantized:
        raise InvalidInput(f"{name} is quantised; give what dequantize() makes of it.")
    if tensor.is_nested:
        raise InvalidInput(f"{name} is a nested tensor; give one of even rows.")
    tensor = tensor.detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _from_numpy(values: Any, name: str, *, truths: bool = False, copy: bool = False) -> Tensor:
    """Of an array, or of what NumPy makes one of; may share its memory unless it is to copy."""
    array = _asarray(values, name)
    if array.ndim == 0:
        raise InvalidInput(f"{name} is {short(values)}, not an array; give a matrix.")
    if truths and array.dtype.kind != "b":
        raise InvalidInput(f"{name} must be boolean (True = keep), not {array.dtype}.")
    if not truths and array.dtype.kind not in "fiu":
        raise InvalidInput(f"{name} has type {array.dtype}; give real numbers.")
    kind = array.dtype.newbyteorder("=")
    if not truths and kind not in (np.float32, np.float64):
        kind = np.dtype(np.float64)
    with np.errstate(over="ignore"):  # a long double may become infinite, which is refused
        held = np.ascontiguousarray(array, dtype=kind)
    # torch warns of memory that may not be written to.
    if not held.flags.writeable or (copy and np.may_share_memory(held, array)):
        held = held.copy()
    return torch.from_numpy(held)


def _asarray(values: Any, name: str) -> npt.NDArray[Any]:
    """What NumPy makes an array of, with all values there."""
    if isinstance(values, np.ma.MaskedArray):
        if np.ma.is_masked(values):
            raise InvalidInput(f"{name} is a masked array with values left out; fill them in.")
        values = values.data
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise InvalidInput(
            f"{name} is no array of numbers ({''.join(reason).rstrip('.')}); give rows of one "
            "length."
        ) from None


def _shares(tensor: Tensor, values: Tensor) -> bool:
    """Whether a tensor looks at the memory of the one it was made from."""
    if values.layout != torch.strided or values.device != tensor.device:
        return False
    return tensor.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


def short(value: Any) -> str:
    """How a value is shown in messages."""
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # Python does not write whole numbers of thousands of digits
        shown = f"a huge {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
