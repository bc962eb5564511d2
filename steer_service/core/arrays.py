"""The dtypes that travel, their names, and how user values become float32 arrays."""

import hashlib
import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from steer_service.core.errors import InvalidRequest, Unsupported

Float32Array = npt.NDArray[np.float32]

HiddenArray = npt.NDArray[Any]
"""Captured rows, shape [rows, hidden_size], of one of the `DTYPES`."""


class TensorLike(Protocol):
    """The part of a torch tensor that is used here; torch itself is not imported."""

    def detach(self) -> Self:
        """The same numbers without their gradient."""

    def cpu(self) -> Self:
        """The same numbers in memory of the host."""


if TYPE_CHECKING:
    from torch import Tensor as Tensor  # for type checkers: core and the client are installed without torch
else:
    Tensor = TensorLike

VectorLike = Sequence[float] | npt.NDArray[Any] | TensorLike
"""A vector as users write it, shape [hidden_size]: numbers, a NumPy array or a torch tensor on any device."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Names as torch and safetensors users write them -> numpy dtypes (bfloat16 through ml_dtypes)."""

OVERFLOWS_AT = {
    "float32": (2 - 2.0**-24) * 2.0**127,
    "float16": (2 - 2.0**-11) * 2.0**15,
    "bfloat16": (2 - 2.0**-8) * 2.0**127,
    "float64": float("inf"),  # of models of transformers only
}
"""The least magnitude that rounds to infinity: half a step beyond the largest finite number of the type."""

PLAIN_SQUARES = (1e-30, 1e30)
"""A squared norm between these is far from what float32 can hold on either side, however it was rounded."""


def dtype_from_name(name: str) -> np.dtype[Any]:
    """The numpy dtype called `name`, raising InvalidRequest for a name that does not travel."""
    try:
        return DTYPES[name.removeprefix("torch.")]
    except KeyError:
        raise InvalidRequest(
            f"dtype {name[:32]!r} is not one of {', '.join(DTYPES)}", reason="UNKNOWN_DTYPE", field="dtype"
        ) from None


def name_of_dtype(dtype: np.dtype[Any]) -> str:
    """The name under which `dtype` travels; raises InvalidRequest if it does not."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise InvalidRequest(f"dtype {dtype} is not one of {', '.join(DTYPES)}", reason="UNKNOWN_DTYPE", field="dtype")


def as_numpy(value: Any) -> npt.NDArray[Any]:
    """`value` (numpy array, torch tensor or nested sequence of numbers) as a numpy array; torch is not imported."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, on any device and with any gradient
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


def as_float32(array: HiddenArray) -> Float32Array:
    """`array`, of one of the `DTYPES`, as float32: exact, and not copied if it is float32 already."""
    return array.astype(np.float32, copy=False)


def as_torch(array: HiddenArray) -> Tensor:
    """`array` as a torch tensor of the same memory and dtype; raises Unsupported without torch."""
    try:
        torch = importlib.import_module("torch")  # by name: core and the client are installed without it
    except ImportError as error:
        raise Unsupported("torch is not installed", reason="NO_TORCH", field="framework") from error
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_vector(value: VectorLike) -> Float32Array:
    """`value` as a read-only float32 copy of shape [n]; raises InvalidRequest if it is not a vector of real numbers."""
    try:
        array = as_numpy(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that holds no data
        raise InvalidRequest(f"vector is not an array of numbers: {error}", reason="BAD_VECTOR") from error
    if array.dtype.kind not in "fiu" and array.dtype != DTYPES["bfloat16"]:
        raise InvalidRequest(f"vector has dtype {array.dtype}, expected real numbers", reason="BAD_VECTOR")
    if array.ndim != 1:
        raise InvalidRequest(f"vector must be 1-D, got shape {list(array.shape)}", reason="BAD_SHAPE")
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the caller refuses by name
        vector = np.array(array, dtype=np.float32)
    vector.setflags(write=False)
    return vector


def vector_digest(vector: Float32Array) -> bytes:
    """The name of a float32 `vector`, 32 bytes: SHA-256 of its elements, little-endian."""
    return hashlib.sha256(vector.astype("<f4", copy=False).tobytes()).digest()


class CheckedVector(NamedTuple):
    """A vector of which `checked_together` has made sure that any spec can be made of it."""

    values: Float32Array
    """Read-only, shape [n]."""


def checked_together(rows: Float32Array) -> list[CheckedVector] | None:
    """The rows of a read-only array, shape [vectors, n]; None unless all are plainly finite and plainly not zero.

    A quick check of many vectors at the cost of one. None means that the caller must check them one by one.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # in float32: no wider copy of a whole program is made
        squares = np.einsum("ij,ij->i", rows, rows)
    is_plain = (squares >= PLAIN_SQUARES[0]) & (squares <= PLAIN_SQUARES[1])  # False for NaN
    return [CheckedVector(row) for row in rows] if is_plain.all() else None


def norm_of(vector: Float32Array) -> float:
    """Euclidean norm of a float32 `vector`, computed in float64; not finite if and only if an element is not.

    The square of every float32, from 1e-45 to 3e38, is a normal float64: nothing under- or overflows on the way.
    """
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        wide = vector.astype(np.float64)
    return math.sqrt(np.dot(wide, wide))
