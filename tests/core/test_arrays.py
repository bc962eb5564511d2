"""User values become float32 vectors, and only numbers do; torch is never imported for it."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steer_service.core.arrays import (
    DTYPES,
    OVERFLOWS_AT,
    as_vector,
    checked_together,
    dtype_from_name,
    name_of_dtype,
    norm_of,
)
from steer_service.core.errors import InvalidRequest

SOME = [0.5, -2.0, 0.0, 3.0]  # exact in every type


@pytest.mark.parametrize(
    "value",
    [
        SOME,
        tuple(SOME),
        np.array(SOME, dtype=np.float64),
        np.array(SOME, dtype=np.float32),
        np.array(SOME, dtype=np.float16),
        np.array(SOME, dtype=ml_dtypes.bfloat16),
        np.array([*SOME, *SOME], dtype=np.float64)[:4],
        np.repeat(SOME, 2)[::2],
        torch.tensor(SOME, dtype=torch.float64),
        torch.tensor(SOME, dtype=torch.float32),
        torch.tensor(SOME, dtype=torch.float16),
        torch.tensor(SOME, dtype=torch.bfloat16),
        torch.tensor(SOME, requires_grad=True),
        torch.nn.Parameter(torch.tensor(SOME, dtype=torch.bfloat16)),
        torch.tensor(SOME).expand(2, 4)[1],
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_every_kind_of_float_vector_is_taken(value: object) -> None:
    vector = as_vector(value)

    assert vector.dtype == np.float32
    assert vector.tolist() == SOME


@pytest.mark.parametrize("value", [[1, -2], np.array([1, -2]), np.array([1, -2], dtype=np.int8), torch.tensor([1, -2])])
def test_integers_are_numbers(value: object) -> None:
    assert as_vector(value).tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "value",
    [
        "1, 2",
        ["1", "2"],
        [True, False],
        np.array([True]),
        torch.tensor([True]),
        [1 + 2j],
        [None],
        None,
        {"a": 1},
        object(),
        [10**400],
        [[1.0], [1.0, 2.0]],
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=repr,
)
def test_what_is_not_an_array_of_real_numbers_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="vector") as raised:
        as_vector(value)
    assert raised.value.reason in {"BAD_VECTOR", "BAD_SHAPE"}


@pytest.mark.parametrize(
    ("value", "shape"), [(3.0, r"\[\]"), ([[1.0, 2.0]], r"\[1, 2\]"), (np.ones((2, 1)), r"\[2, 1\]")]
)
def test_only_one_axis_makes_a_vector(value: object, shape: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"vector must be 1-D, got shape {shape}") as raised:
        as_vector(value)
    assert raised.value.reason == "BAD_SHAPE"


def test_a_vector_is_a_read_only_copy() -> None:
    mine = np.array(SOME, dtype=np.float32)
    vector = as_vector(mine)

    mine[0] = 99.0

    assert vector.tolist() == SOME
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 1.0


def test_a_vector_shares_no_memory_with_a_tensor() -> None:
    mine = torch.tensor(SOME)
    vector = as_vector(mine)

    mine.zero_()

    assert vector.tolist() == SOME


@given(hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_norm_is_right_from_the_smallest_to_the_largest_numbers(vector: np.ndarray) -> None:
    exact = np.sqrt(sum(int(x.as_integer_ratio()[0]) ** 2 / x.as_integer_ratio()[1] ** 2 for x in map(float, vector)))

    assert norm_of(vector) == pytest.approx(exact, rel=1e-12)


@given(
    hnp.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.sampled_from([np.nan, np.inf, -np.inf]),
    st.data(),
)
def test_the_norm_is_finite_only_without_nan_and_inf(vector: np.ndarray, bad: float, data: st.DataObject) -> None:
    assert np.isfinite(norm_of(vector))

    vector[data.draw(st.integers(0, len(vector) - 1))] = bad

    assert not np.isfinite(norm_of(vector))


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_names_go_both_ways(name: str) -> None:
    assert name_of_dtype(dtype_from_name(name)) == name
    assert dtype_from_name(f"torch.{name}") == dtype_from_name(name)


@pytest.mark.parametrize("name", ["float64", "int8", "", "x" * 10_000])
def test_an_unknown_dtype_is_refused_in_few_words(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not one of float32, float16, bfloat16") as raised:
        dtype_from_name(name)
    assert raised.value.reason == "UNKNOWN_DTYPE"
    assert len(str(raised.value)) < 200


def test_a_dtype_that_does_not_travel_has_no_name() -> None:
    with pytest.raises(InvalidRequest, match="dtype int64 is not one of"):
        name_of_dtype(np.dtype(np.int64))


@pytest.mark.parametrize("name", DTYPES)
def test_the_overflow_limit_is_where_rounding_gives_infinity(name: str) -> None:
    limit = np.float64(OVERFLOWS_AT[name])

    with np.errstate(over="ignore"):
        assert np.isinf(limit.astype(DTYPES[name]))
        assert np.isfinite((limit * (1 - 1e-7)).astype(DTYPES[name]))


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=st.floats(width=32)))
def test_vectors_that_pass_together_pass_one_by_one(rows: np.ndarray) -> None:
    checked = checked_together(rows)

    if checked is not None:
        assert [vector.values.tobytes() for vector in checked] == [row.tobytes() for row in rows]
        assert all(1e-16 < norm_of(row) < 1e16 for row in rows)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 0.0, 1e-40, 1e30])
def test_one_odd_vector_is_for_somebody_to_look_at(odd: float) -> None:
    rows = np.ones((3, 4), np.float32)
    assert checked_together(rows) is not None

    rows[1] = odd

    assert checked_together(rows) is None


def test_the_words_are_imported_without_torch_or_vllm() -> None:
    script = (
        "import pkgutil, importlib, sys, steer_service.core as core\n"
        "[importlib.import_module(f'steer_service.core.{m.name}') for m in pkgutil.iter_modules(core.__path__)]\n"
        "from steer_service.core.specs import SteeringSpec\n"
        "SteeringSpec.simple_add(0, [1.0, 2.0]).digest()\n"
        "print({'torch', 'vllm', 'transformers', 'grpc', 'google.protobuf'} & set(sys.modules))\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr
