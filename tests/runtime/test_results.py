"""What the calls return of captures: rows that came inline, and rows that are held."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CaptureDelivery, CapturedRows, CaptureSpec, RowLabels, SharedMemoryFallback
from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded
from steer_service.core.events import CaptureBlock, CaptureHeld, CaptureLabels, Event, Started
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.runtime.results import collect
from tests.runtime.scripted import DONE, LIMIT_S, Scripted, capturing, finished, rows, said, started, until


async def test_blocks_of_a_layer_are_joined_by_position() -> None:
    script = [
        capturing(),
        said("a"),
        said("b"),
        rows(3, 0, 2),
        rows(1, 0, 2),
        rows(3, 2, 1),
        rows(1, 2, 1),
        finished(0, (3, 1), 3),
        DONE,
    ]

    live = CaptureSpec(layers=(3, 1), is_live=True)
    _, handles = await Scripted(script).generate("p", capture=live)

    [handle] = handles or []
    captures = await handle.fetch()
    assert handle.layer_indices == (3, 1)
    assert captures[3][0]["hidden"].tolist() == [[3, 0], [3, 1], [3, 2]]
    assert captures[1][0]["hidden"].tolist() == [[1, 0], [1, 1], [1, 2]]


async def test_rows_are_copied_before_the_next_event() -> None:
    block = rows(1, 0, 2)

    async def reused() -> AsyncGenerator[Event, None]:
        yield started()
        yield block
        block.hidden[:] = -1.0
        yield finished(0, (1,), 2)
        yield DONE

    assert (await collect(reused())).outputs[0].captures[1].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "blocks",
    [
        [rows(1, 0, 2), rows(1, 3, 1)],
        [rows(1, 0, 2), rows(1, 1, 2)],
        [rows(1, 1, 2), rows(1, 0, 1)],
        [rows(1, 0, 2)],
        [],
    ],
    ids=["a gap", "an overlap", "out of order", "too few", "none"],
)
async def test_captured_rows_that_did_not_come_are_an_error(blocks: list[CaptureBlock]) -> None:
    end = finished(0, (1,), 3)
    came = sum(block.hidden.nbytes for block in blocks)
    for end_ in (end, replace(end, receipt=replace(end.receipt, bytes_captured=came))):
        backend = Scripted([capturing(), said("a"), said("b"), *blocks, end_, DONE])
        with pytest.raises(EngineFailed, match="rows|bytes" if end_ is end else "rows") as raised:
            await backend.generate("p", capture=CaptureSpec(layers=(1,), is_live=True))
        assert raised.value.reason == "INCOMPLETE"


async def test_duplicate_layers_are_captured_once() -> None:
    backend = Scripted()

    await backend.generate("p", capture_layers=[2, 0, 2])
    await backend.generate("p", capture_layers=np.int64(2))

    assert [request.capture for request in backend.requests] == [CaptureSpec(layers=(2, 0)), CaptureSpec(layers=(2,))]


async def test_capturing_no_layers_gives_handles_without_layers() -> None:
    _, handles = await Scripted().generate("p", capture_layers=[])

    [handle] = handles or []
    assert await handle.fetch() == {}


@pytest.mark.parametrize("layers", ["12", [-1], [1.5], 2.0], ids=repr)
async def test_a_bad_layer_is_refused_before_anything_starts(layers: Any) -> None:
    backend = Scripted()

    with pytest.raises(InvalidRequest) as raised:
        await backend.generate("p", capture_layers=layers)

    assert raised.value.field.startswith("capture.layers")
    assert backend.requests == []


HELD = CaptureSpec(layers=(1,), delivery=CaptureDelivery.HELD)
LABELS = RowLabels(positions=[0, 1], token_ids=[7, 8], is_generated=[False, False], is_steered=[False, False])


def holding() -> Started:
    return started(delivery=CaptureDelivery.HELD)


class Region:
    """Memory that holds two rows of layer 1 and knows whether it was freed."""

    freed = 0

    def free(self) -> None:
        self.freed += 1

    def answer(self, *then: Any) -> list[Any]:
        captured = CapturedRows(after={1: rows(1, 0, 2).hidden}, spans=((0, 2),))
        held = LocalCapture(metadata_of(captured, (1,), prompt_tokens=2, sequence_rows=2), captured, release=self.free)
        return [
            holding(),
            said("a"),
            CaptureLabels(output_index=0, labels=LABELS),
            CaptureHeld(output_index=0, held=held),
            *(then or (finished(0, (1,), 2), DONE)),
        ]


async def test_what_is_held_stays_until_its_handle_is_closed() -> None:
    region = Region()
    [generation], handles = await Scripted(region.answer()).generate("p", capture=HELD, raw_output=True)

    [handle] = handles or []
    assert generation.capture_delivery is CaptureDelivery.HELD
    assert (generation.outputs[0].held is not None, generation.outputs[0].labels) == (True, LABELS)
    assert generation.outputs[0].captures == {}
    async with handle:
        [entry] = (await handle.fetch())[1]
        assert region.freed == 0
    assert (entry["hidden"].tolist(), entry["meta"]) == ([[1, 0], [1, 1]], LABELS)
    assert region.freed == 1


async def test_why_nothing_is_shared_is_told() -> None:
    spec = CaptureSpec(layers=(1,), delivery=CaptureDelivery.SHARED_MEMORY_PREFERRED)
    begin = started(delivery=CaptureDelivery.INLINE, fallback=SharedMemoryFallback.SWITCHED_OFF)

    [generation], _ = await Scripted([begin, said("a"), rows(1, 0, 2), finished(0, (1,), 2), DONE]).generate(
        "p", capture=spec, raw_output=True
    )

    assert generation.capture_delivery is CaptureDelivery.INLINE
    assert generation.shared_memory_fallback is SharedMemoryFallback.SWITCHED_OFF
    assert generation.outputs[0].captures[1].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "then",
    [[EngineFailed("broken")], [finished(0, (1,), 2)], [finished(0, (1,), 3), DONE]],
    ids=["fails", "ends", "lies"],
)
async def test_an_answer_that_breaks_frees_what_it_held(then: list[Any]) -> None:
    region = Region()
    with pytest.raises(EngineFailed):
        await Scripted(region.answer(*then)).generate("p", capture=HELD)
    assert region.freed == 1


async def test_a_failing_prompt_frees_what_the_others_hold() -> None:
    finished_first, late, never = Region(), asyncio.Event(), asyncio.Event()
    under_way = Region()
    backend = Scripted(finished_first.answer(), [holding(), late, Overloaded("full")], under_way.answer(never))
    call = asyncio.create_task(backend.generate(["a", "b", "c"], capture=HELD))
    await until(lambda: backend.closed == [0])
    assert finished_first.freed == 0

    late.set()

    with pytest.raises(Overloaded, match="full"):
        await asyncio.wait_for(call, LIMIT_S)
    assert (finished_first.freed, under_way.freed) == (1, 1)


async def test_cancelling_a_call_frees_what_it_holds() -> None:
    done, never = Region(), asyncio.Event()
    backend = Scripted(done.answer(), [holding(), never])
    call = asyncio.create_task(backend.generate(["a", "b"], capture=HELD))
    await until(lambda: backend.closed == [0])

    call.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, LIMIT_S)
    assert done.freed == 1


async def test_a_chat_hands_on_what_is_held() -> None:
    region = Region()
    responses, handles = await Scripted(region.answer()).chat([{"role": "user", "content": "Hi"}], capture=HELD)

    [handle] = handles or []
    assert [response.generated for response in responses] == ["a"]
    assert region.freed == 0
    await handle.close()
    assert region.freed == 1


async def test_the_dtype_of_captured_layers_may_be_chosen() -> None:
    backend = Scripted()

    await backend.generate("p", capture_layers=[2], capture_dtype="float32")
    await backend.chat([{"role": "user", "content": "p"}], capture_layers=[2], capture_dtype="float32")

    assert [request.capture for request in backend.requests] == [CaptureSpec(layers=(2,), dtype="float32")] * 2


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"capture_dtype": "float32"}, "capture_dtype"),
        ({"capture_dtype": "float32", "capture": CaptureSpec(layers=(1,))}, "capture_dtype"),
        ({"capture_dtype": "float64", "capture_layers": [1]}, "capture.dtype"),
    ],
    ids=["no layers", "a whole capture", "no dtype of captures"],
)
async def test_a_dtype_without_layers_or_of_another_kind_is_refused(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await Scripted().generate("p", **asked)
    assert raised.value.field == field
