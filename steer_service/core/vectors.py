"""Vectors and numbers of operations, checked."""

import math
from typing import Any

import numpy as np

from steer_service.core.arrays import CheckedVector, Float32Array, as_vector, norm_of
from steer_service.core.errors import InvalidRequest, within

SMALLEST_NORM = float(np.finfo(np.float32).tiny)
"""A vector with a smaller norm, below float32's smallest normal number, has no reliable direction: it is zero."""


def checked_vector(value: Any, what: str) -> Float32Array:
    """`value` as a vector, read-only; raises InvalidRequest about `vector` if it is not finite or has no direction."""
    if isinstance(value, CheckedVector):
        return value.values
    return _vector_and_norm(value, what, f"{what} has zero norm (cannot be normalized)")[0]


def unit_and_norm(value: Any, what: str) -> tuple[Float32Array, float]:
    """`value` divided by its norm, and that norm; raises InvalidRequest where `checked_vector` does."""
    vector, norm = _vector_and_norm(value, what, "Cannot normalize zero vector")
    return (vector.astype(np.float64) / norm).astype(np.float32), norm


def finite(value: Any, name: str) -> float:
    """`value` as a float; raises InvalidRequest about `name` if it is not a finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise InvalidRequest(f"{name} {value!r} is not a number", reason="BAD_NUMBER", field=name)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name} is not a number: {error}", reason="BAD_NUMBER", field=name) from error
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} is {number}, expected a finite number", reason="NON_FINITE", field=name)
    return number


def _vector_and_norm(value: Any, what: str, if_zero: str) -> tuple[Float32Array, float]:
    with within("vector"):
        vector = as_vector(value)
        norm = norm_of(vector)
        if not math.isfinite(norm):
            raise InvalidRequest(f"{what} contains NaN or Inf values", reason="NON_FINITE")
        if norm < SMALLEST_NORM:
            raise InvalidRequest(if_zero, reason="ZERO_NORM")
        return vector, norm
