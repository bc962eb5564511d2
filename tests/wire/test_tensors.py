"""Arrays as messages: what fits comes back, what does not is refused."""

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.arrays import DTYPES
from steer_service.core.errors import InvalidRequest
from steer_service.wire.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, Tensor
from steer_service.wire.tensors import (
    dtype_from_proto,
    dtype_to_proto,
    rows_from_proto,
    tensor_from_proto,
    tensor_to_proto,
)


@given(
    npst.arrays(np.float32, npst.array_shapes(max_dims=4), elements=st.floats(width=32)),
    st.sampled_from(sorted(DTYPES)),
)
def test_an_array_comes_back_bit_for_bit(array, name):
    with np.errstate(all="ignore"):
        array = array.astype(DTYPES[name])
    back = tensor_from_proto(Tensor.FromString(tensor_to_proto(array).SerializeToString()))
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_a_transposed_array_travels_in_row_major_order():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(tensor_from_proto(tensor_to_proto(array)), array)


def test_bytes_are_little_endian_and_names_are_those_of_the_contract():
    assert tensor_to_proto(np.array([1.0], dtype=np.float32)).data == bytes.fromhex("0000803f")
    assert tensor_to_proto(np.array([1.0], dtype=DTYPES["bfloat16"])).data == bytes.fromhex("803f")
    assert [dtype_to_proto(name) for name in ("float32", "float16", "bfloat16")] == [DTYPE_F32, DTYPE_F16, DTYPE_BF16]
    assert dtype_from_proto(DTYPE_BF16) == "bfloat16"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Tensor(dtype=DTYPE_F32, shape=[2], data=b"\0" * 7), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[2], data=b"\0" * 9), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F16, shape=[2], data=b"\0" * 8), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[0]), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[-1], data=b"\0" * 4), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[-1, -1], data=b"\0" * 4), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[2**62, 4], data=b""), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[2**40], data=b"\0" * 4), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[], data=b"\0" * 4), "BAD_SHAPE"),
        (Tensor(dtype=DTYPE_F32, shape=[1] * 65, data=b"\0" * 4), "BAD_SHAPE"),
        (Tensor(shape=[1], data=b"\0" * 4), "UNKNOWN_DTYPE"),
        (Tensor(dtype=99, shape=[1], data=b"\0" * 4), "UNKNOWN_DTYPE"),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(message, reason):
    with pytest.raises(InvalidRequest) as caught:
        tensor_from_proto(message)
    assert caught.value.reason == reason


@given(st.binary(max_size=64), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), st.integers(0, 5))
def test_any_tensor_is_read_or_refused_by_name(data, shape, dtype):
    try:
        assert tensor_from_proto(Tensor(dtype=dtype, shape=shape, data=data)).nbytes == len(data)
    except InvalidRequest:
        return  # any other error fails the test


@given(npst.arrays(np.float32, npst.array_shapes(min_dims=2, max_dims=2), elements=st.floats(width=32)))
def test_vectors_of_one_width_come_back_as_rows(array):
    rows = rows_from_proto([tensor_to_proto(row) for row in array])
    assert rows is not None
    assert (rows.shape, rows.tobytes(), rows.flags.writeable) == (array.shape, array.tobytes(), False)


ROW = np.ones(4, np.float32)


@pytest.mark.parametrize(
    "other",
    [
        np.ones(3, np.float32),
        np.ones((2, 2), np.float32),
        np.ones(8, np.float16),
        Tensor(dtype=DTYPE_F32, shape=[5], data=ROW.tobytes()),
        Tensor(),
    ],
)
def test_vectors_that_differ_in_width_or_dtype_do_not_come_as_rows(other):
    message = other if isinstance(other, Tensor) else tensor_to_proto(other)
    assert rows_from_proto([tensor_to_proto(ROW), message]) is None
    assert rows_from_proto([message, tensor_to_proto(ROW)]) is None


def test_no_vectors_are_no_rows():
    assert rows_from_proto([]) is None
