"""NumPy results are float32, whatever dtype travelled: an exact widening, made when a layer is first read."""

import io
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from steer_service.core.capture import CapturedRows
from steer_service.core.errors import InvalidRequest
from steer_service.runtime.handle import fetch_all
from steer_service.runtime.results import Output
from tests.runtime.held_rows import LABELS, here

NARROW = ["float16", "bfloat16"]


def narrow_rows(dtype: str, rows: int = 6) -> CapturedRows:
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    before, after = (np.random.default_rng(seed).normal(size=(rows, 4)).astype(kind) for seed in (0, 1))
    return CapturedRows(before={1: before}, after={1: after}, spans=((0, rows),))


@pytest.mark.parametrize("dtype", NARROW)
async def test_rows_are_float32_and_exact(dtype: str) -> None:
    travelled = narrow_rows(dtype)

    [entry] = (await here(travelled, labels=LABELS).fetch())[1]

    assert (entry["hidden"].dtype, entry["before"].dtype) == (np.float32, np.float32)
    assert entry["hidden"] is entry["after"]
    assert entry["meta"] is LABELS
    assert np.array_equal(entry["after"].astype(np.float64), travelled.after[1].astype(np.float64))
    assert np.array_equal(entry["before"].astype(np.float64), travelled.before[1].astype(np.float64))


async def test_the_mean_of_many_rows_is_right() -> None:
    rows = np.random.default_rng(0).normal(1.0, 1.0, size=(4000, 8)).astype(ml_dtypes.bfloat16)
    one = here(CapturedRows(after={1: rows}, spans=((0, 4000),)))

    hidden = (await one.fetch())[1][0]["hidden"]

    np.testing.assert_allclose(hidden.mean(0), rows.astype(np.float64).mean(0), rtol=1e-5)
    file = io.BytesIO()
    np.save(file, hidden)
    file.seek(0)
    assert np.array_equal(np.load(file), hidden)


async def test_torch_takes_the_arrays() -> None:
    torch = pytest.importorskip("torch")
    hidden = (await here(narrow_rows("bfloat16")).fetch())[1][0]["hidden"]
    assert torch.from_numpy(hidden).dtype == torch.float32


@pytest.mark.parametrize("dtype", NARROW)
async def test_scikit_learn_fits_the_rows_of_one_output_and_of_several(dtype: str) -> None:
    labels = np.arange(40) % 2
    rows = np.random.default_rng(0).normal(size=(40, 4)) + 3.0 * labels[:, None]
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    outputs = [here(CapturedRows(after={1: part.astype(kind)}, spans=((0, 20),))) for part in np.split(rows, 2)]
    first, _ = await fetch_all(outputs)

    of_one = LogisticRegression().fit(outputs[0].matrix(1), labels[:20])
    stacked = np.concatenate([output.matrix(1) for output in outputs])
    of_all = LogisticRegression().fit(stacked, labels)

    assert of_one.score(first[1][0]["hidden"], labels[:20]) >= 0.9
    assert of_all.score(stacked, labels) >= 0.9
    assert stacked.dtype == of_all.coef_.dtype == np.float32  # scikit-learn computes in the dtype that it is given


async def test_a_layer_is_converted_once_and_when_it_is_first_read() -> None:
    rows = narrow_rows("bfloat16").after[1]
    captures = await here(CapturedRows(after={1: rows, 3: rows.copy()}, spans=((0, 6),))).fetch()
    rows[0, 0] = 7.0

    assert captures[1][0]["hidden"][0, 0] == 7.0
    assert captures[1] is captures[1]
    assert (list(captures), len(captures), 3 in captures, 2 in captures) == ([1, 3], 2, True, False)
    with pytest.raises(KeyError):
        captures[2]


async def test_native_arrays_are_views_of_what_travelled() -> None:
    travelled = narrow_rows("bfloat16")
    one = here(travelled)

    captures = await one.fetch(framework="native")

    assert captures[1][0]["hidden"].dtype == ml_dtypes.bfloat16
    assert np.shares_memory(captures[1][0]["hidden"], travelled.after[1])
    [again] = await fetch_all([one], framework="native")
    assert again is captures


async def test_chosen_rows_are_float32_too() -> None:
    one = here(narrow_rows("bfloat16"))

    rows = await one.fetch_rows(positions=[range(1, 3)])
    native = await one.fetch_rows(positions=[range(1, 3)], framework="native")

    assert (rows.after[1].dtype, rows.before[1].dtype) == (np.float32, np.float32)
    assert native.after[1].dtype == ml_dtypes.bfloat16
    assert rows == native
    with pytest.raises(InvalidRequest, match="'torch' is neither 'numpy' nor 'native'") as raised:
        await one.fetch_rows(framework="torch")  # type: ignore[call-overload]
    assert raised.value.field == "framework"


async def test_a_matrix_is_float32_whatever_the_framework() -> None:
    pytest.importorskip("torch")
    travelled = narrow_rows("bfloat16")
    one = here(travelled)
    with pytest.raises(RuntimeError, match="Captures not fetched yet"):
        one.matrix(1)

    await one.fetch(framework="torch")

    assert one.matrix(1).dtype == np.float32
    assert one.matrix(1).flags.c_contiguous
    assert one.matrix(1) is (await one.fetch())[1][0]["hidden"]
    with pytest.raises(InvalidRequest, match=r"layer 2 was not captured; \[1\] were") as raised:
        one.matrix(2)
    assert raised.value.reason == "NOT_CAPTURED"


def test_rows_of_a_raw_output_are_float32_and_kept() -> None:
    travelled = narrow_rows("bfloat16")
    output = Output(captured=travelled)

    assert output.captures[1].dtype == np.float32
    assert output.captures[1] is output.captures[1]
    assert output.captured is travelled


async def test_captures_survive_pickle() -> None:
    captures = await here(narrow_rows("bfloat16")).fetch()
    copied: Any = pickle.loads(pickle.dumps(captures))
    assert np.array_equal(copied[1][0]["hidden"], captures[1][0]["hidden"])
