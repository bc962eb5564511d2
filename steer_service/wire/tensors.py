"""Arrays <-> Tensor messages: raw little-endian bytes with a dtype and a shape."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, Float32Array, dtype_from_name, name_of_dtype
from steer_service.core.errors import InvalidRequest
from steer_service.wire import tensor_pb2

assert sys.byteorder == "little", "arrays are sent as they are in memory, and the contract requires little-endian"

MAX_DIMENSIONS = 8

_DTYPE_OF_NAME: dict[str, tensor_pb2.Dtype] = {
    "float32": tensor_pb2.DTYPE_F32,
    "float16": tensor_pb2.DTYPE_F16,
    "bfloat16": tensor_pb2.DTYPE_BF16,
}
_NAME_OF_DTYPE: dict[int, str] = {number: name for name, number in _DTYPE_OF_NAME.items()}
assert _DTYPE_OF_NAME.keys() == DTYPES.keys()


def dtype_to_proto(name: str) -> tensor_pb2.Dtype:
    """The enum number of the dtype called `name`, such as `bfloat16`; raises InvalidRequest if it is not known."""
    return _DTYPE_OF_NAME[name_of_dtype(dtype_from_name(name))]


def dtype_from_proto(number: int) -> str:
    """The name of a dtype; raises InvalidRequest (UNKNOWN_DTYPE) for a number that is not set or not known."""
    try:
        return _NAME_OF_DTYPE[number]
    except KeyError:
        raise InvalidRequest(
            f"dtype {number} is not one of {', '.join(tensor_pb2.Dtype.keys()[1:])}", reason="UNKNOWN_DTYPE"
        ) from None


def tensor_to_proto(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """`array` as a message; its dtype must be float32, float16 or bfloat16."""
    return tensor_pb2.Tensor(
        dtype=_DTYPE_OF_NAME[name_of_dtype(array.dtype)], shape=array.shape, data=np.ascontiguousarray(array).tobytes()
    )


def tensor_from_proto(message: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """The array in a message, a read-only view of its bytes; raises InvalidRequest if dtype, shape and size differ."""
    dtype = DTYPES[dtype_from_proto(message.dtype)]
    shape = checked_shape(message.shape)
    expected = math.prod(shape) * dtype.itemsize
    if len(message.data) != expected:
        raise InvalidRequest(
            f"{len(message.data)} bytes, expected {expected} for shape {list(shape)} of {name_of_dtype(dtype)}",
            reason="BAD_SHAPE",
        )
    return np.frombuffer(message.data, dtype=dtype).reshape(shape)


def rows_from_proto(messages: Sequence[tensor_pb2.Tensor]) -> Float32Array | None:
    """Float32 vectors of one size as one read-only array, shape [vectors, size]; None if any differs."""
    parts = [message.data for message in messages]
    size = len(parts[0]) if parts else 0
    shape = [size // 4]
    if not size or not all(
        len(part) == size and message.dtype == tensor_pb2.DTYPE_F32 and message.shape == shape
        for part, message in zip(parts, messages, strict=True)
    ):
        return None
    return np.frombuffer(b"".join(parts), dtype=np.float32).reshape(len(parts), -1)


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as a tuple; raises InvalidRequest (BAD_SHAPE) unless it has 1..8 dimensions, each at least 1."""
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise InvalidRequest(f"{len(shape)} dimensions, expected 1..{MAX_DIMENSIONS}", reason="BAD_SHAPE")
    for size in shape:
        if size < 1:
            raise InvalidRequest(f"a dimension of size {size} in shape {list(shape)}", reason="BAD_SHAPE")
    return tuple(shape)
