"""The life of a handle: what it fetches, in which form, and when it releases."""

import asyncio
import gc
import sys
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from steer_service.core.capture import CapturedRows
from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound, Unsupported
from steer_service.runtime.handle import FETCHES_AT_ONCE, fetch_all
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from tests.runtime.held_rows import LABELS, LIMIT_S, ROWS, SIX, Source, handle, here, until


async def test_rows_are_where_users_know_them() -> None:
    one = here()

    captures = await one.fetch()

    assert captures is one.captures
    assert list(captures) == [2, 0]
    [entry] = captures[2]
    assert list(entry) == ["hidden", "after"]
    assert entry["hidden"] is entry["after"]
    assert (entry["hidden"].tolist(), entry["hidden"].dtype) == (ROWS[2].tolist(), ROWS[2].dtype)


async def test_rows_that_came_with_the_answer_are_not_copied() -> None:
    assert np.shares_memory((await here().fetch())[2][0]["hidden"], ROWS[2])


async def test_reading_before_fetching_is_an_error_that_says_what_to_call() -> None:
    one = here()

    with pytest.raises(RuntimeError, match=r"Captures not fetched yet for request r1\. Call: await handle\.fetch\(\)"):
        _ = one.captures
    with pytest.raises(RuntimeError, match="Captures not fetched yet"):
        one.get_message_activations(0, 2)


async def test_data_is_fetched_once() -> None:
    source = Source(holds_memory=False)
    one = handle(source)

    assert await one.fetch() is await one.fetch()
    assert source.fetched == 1


async def test_fetches_at_the_same_time_share_one_transfer() -> None:
    source = Source(holds_memory=False)
    source.go.clear()
    one = handle(source)
    both = asyncio.gather(one.fetch(), one.fetch())
    await until(lambda: source.fetched)

    source.go.set()

    first, second = await asyncio.wait_for(both, LIMIT_S)
    assert first is second
    assert source.fetched == 1


async def test_a_fetch_that_failed_can_be_tried_again() -> None:
    source = Source(EngineFailed("gone"), holds_memory=False)
    one = handle(source)

    with pytest.raises(EngineFailed, match="gone"):
        await one.fetch()

    assert list(await one.fetch()) == [2, 0]


async def test_a_fetch_says_how_far_it_is() -> None:
    said: list[tuple[int, int]] = []
    one = handle(Source(holds_memory=False))

    await one.fetch(progress=lambda *numbers: said.append(numbers))

    assert one.total_bytes == 96
    assert said == [(0, 96), (48, 96), (96, 96)]


async def test_rows_that_are_here_are_all_there_at_once() -> None:
    said: list[tuple[int, int]] = []

    await here().fetch(progress=lambda *numbers: said.append(numbers))
    await here().fetch_rows(layers=[2], positions=[0], progress=lambda *numbers: said.append(numbers))

    assert said == [(96, 96), (8, 8)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda kind: np.dtype(kind).name)
async def test_tensors_lie_in_the_memory_of_the_arrays(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    rows = np.arange(12).reshape(6, 2).astype(dtype)
    one = here(CapturedRows(after={1: rows}, spans=((0, 6),)), labels=LABELS)

    [entry] = (await one.fetch(framework="torch"))[1]

    assert (entry["hidden"].dtype, tuple(entry["hidden"].shape)) == (getattr(torch, np.dtype(dtype).name), (6, 2))
    assert entry["hidden"].data_ptr() == rows.ctypes.data
    assert entry["hidden"].float().tolist() == rows.astype(np.float32).tolist()
    assert entry["meta"] is LABELS
    entry["hidden"][0, 0] = 7.0
    assert float(rows[0, 0]) == 7.0


async def test_tensors_may_have_no_rows() -> None:
    pytest.importorskip("torch")
    nothing = CapturedRows(after={1: np.empty((0, 4), ml_dtypes.bfloat16)})

    assert tuple((await here(nothing).fetch(framework="torch"))[1][0]["hidden"].shape) == (0, 4)


async def test_the_framework_can_be_chosen_again_without_a_second_transfer() -> None:
    torch = pytest.importorskip("torch")
    source = Source(holds_memory=False)
    one = handle(source)

    arrays = await one.fetch()
    tensors = await one.fetch(framework="torch")

    assert one.captures is tensors
    assert await one.fetch(framework="torch") is tensors
    assert isinstance(one.get_message_activations(0, 2), torch.Tensor)
    assert tensors[2][0]["hidden"].data_ptr() == arrays[2][0]["hidden"].ctypes.data
    assert isinstance((await one.fetch())[2][0]["hidden"], np.ndarray)
    assert source.fetched == 1


async def test_an_unknown_framework_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="'jax' is not 'numpy', 'native' or 'torch'") as raised:
        await here().fetch(framework="jax")
    assert raised.value.field == "framework"


async def test_without_torch_only_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    one = here()

    with pytest.raises(Unsupported, match="torch is not installed") as raised:
        await one.fetch(framework="torch")

    assert (raised.value.reason, raised.value.field) == ("NO_TORCH", "framework")
    assert list(await one.fetch()) == [2, 0]


async def test_a_few_are_fetched_at_a_time_and_their_order_is_kept() -> None:
    sources = [
        Source(captured=CapturedRows(after={number: ROWS[2]}, spans=((0, 6),)), holds_memory=False)
        for number in range(FETCHES_AT_ONCE + 3)
    ]
    for source in sources:
        source.go.clear()
    call = asyncio.create_task(fetch_all([handle(source) for source in sources]))
    await until(lambda: sum(source.fetched for source in sources) == FETCHES_AT_ONCE)
    for _ in range(50):
        await asyncio.sleep(0)
    assert sum(source.fetched for source in sources) == FETCHES_AT_ONCE

    for source in sources:
        source.go.set()

    captures = await asyncio.wait_for(call, LIMIT_S)
    assert [list(one) for one in captures] == [[number] for number in range(len(sources))]


async def test_the_progress_of_several_is_that_of_all_their_bytes() -> None:
    said: list[tuple[int, int]] = []
    handles = [handle(Source(holds_memory=False)) for _ in range(3)]

    await fetch_all(handles, progress=lambda *numbers: said.append(numbers))

    assert {total for _, total in said} == {3 * 96}
    assert [done for done, _ in said] == sorted(done for done, _ in said)
    assert said[-1] == (288, 288)


async def test_one_that_fails_ends_the_others() -> None:
    waiting, failing = Source(holds_memory=False), Source(NotFound("gone"), holds_memory=False)
    waiting.go.clear()

    with pytest.raises(NotFound, match="gone"):
        await asyncio.wait_for(fetch_all([handle(waiting), handle(failing)]), LIMIT_S)

    assert waiting.cancelled == 1


async def test_none_are_fetched_of_none() -> None:
    assert await fetch_all([]) == []


async def test_several_are_fetched_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    [captures] = await fetch_all([here()], framework="torch")
    assert isinstance(captures[0][0]["hidden"], torch.Tensor)


async def test_leaving_the_block_releases_once_and_keeps_the_data() -> None:
    source = Source()
    async with handle(source) as one:
        await one.fetch()
    await one.close()

    assert source.released == 1
    assert np.shares_memory(one.captures[0][0]["hidden"], ROWS[0])


async def test_entering_the_block_does_not_fetch() -> None:
    source = Source()
    async with handle(source):
        pass

    assert (source.fetched, source.released) == (0, 1)


async def test_an_error_inside_the_block_still_releases() -> None:
    source = Source()
    with pytest.raises(KeyError):
        async with handle(source):
            raise KeyError

    assert source.released == 1


async def test_a_release_that_failed_can_be_tried_again() -> None:
    source = Source(EngineFailed("gone"))
    one = handle(source)

    with pytest.raises(EngineFailed, match="gone"):
        await one.close()
    await one.close()

    assert source.released == 2


async def test_a_handle_that_holds_memory_warns_when_it_is_lost_and_lets_go() -> None:
    source = Source()
    lost = [handle(source)]

    with pytest.warns(ResourceWarning, match="captures of request r1 were never closed"):
        lost.clear()

    assert (source.released, source.abandoned) == (0, 1)


async def test_a_handle_that_was_closed_or_holds_nothing_is_lost_in_silence() -> None:
    closed, empty = Source(), Source(holds_memory=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await handle(closed).close()
        handle(empty)
        gc.collect()

    assert (closed.abandoned, empty.abandoned) == (0, 0)


async def test_what_was_released_cannot_be_fetched_but_what_was_fetched_stays() -> None:
    freed: list[None] = []
    metadata = metadata_of(SIX, (2, 0), prompt_tokens=5, sequence_rows=6)
    read, unread = (
        handle(LocalCapture(metadata, SIX, release=lambda: freed.append(None)), labels=LABELS) for _ in range(2)
    )
    async with read, unread:
        await read.fetch()

    assert len(freed) == 2
    assert list(await read.fetch()) == [2, 0]
    for call in (unread.fetch(), unread.fetch_rows(), read.fetch_rows()):
        with pytest.raises(NotFound) as raised:
            await call
        assert raised.value.reason == "UNKNOWN_CAPTURE"
