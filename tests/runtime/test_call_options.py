"""The options of `generate` and `chat`: one value for all prompts, or a list with one for each."""

import asyncio
import typing
from typing import Any

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import DeadlineExceeded, InvalidRequest
from steer_service.core.events import OutputFinished
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingKeywords, SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.call_options import SHARED, ChatKeywords, GenerateKeywords
from tests.runtime.scripted import LIMIT_S, Scripted, started

SPEC = SteeringSpec.simple_add(1, [1.0, 2.0])
OTHER = SteeringSpec.simple_add(2, [1.0, 2.0])
HELLO = [{"role": "user", "content": "Hello"}]
LISTS = {
    "sampling": [SamplingOptions(max_tokens=1), SamplingOptions(max_tokens=2)],
    "steering_spec": [SPEC, None],
    "capture": [None, CaptureSpec(layers=(1,))],
    "model": ["", "adapter"],
    "request_id": ["first", ""],
}
"""Keyword -> values for two prompts."""


def field_of(name: str) -> str:
    return {"steering_spec": "steering"}.get(name, name)


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_has_the_value_of_each_prompt(name: str) -> None:
    backend = Scripted()

    await backend.generate(["a", "b"], **{name: LISTS[name]})
    await backend.chat([HELLO, HELLO], **{name: LISTS[name]})

    assert [getattr(request, field_of(name)) for request in backend.requests] == LISTS[name] * 2


@pytest.mark.parametrize("name", LISTS)
async def test_one_value_holds_for_every_prompt(name: str) -> None:
    if name == "request_id":
        return  # ids are unique
    value = next(value for value in LISTS[name] if value)
    backend = Scripted()

    await backend.generate(["a", "b"], **{name: value})
    await backend.chat(HELLO, **{name: value})

    assert [getattr(request, field_of(name)) for request in backend.requests] == [value] * 3


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_of_another_length_is_refused_with_both_lengths(name: str) -> None:
    backend = Scripted()
    for call in (
        backend.generate(["a", "b", "c"], **{name: LISTS[name]}),
        backend.chat([HELLO], **{name: LISTS[name]}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: 2 values for [31] prompts") as refused:
            await call
        assert refused.value.field == name
    assert backend.requests == []


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_for_a_single_prompt_is_refused(name: str) -> None:
    backend = Scripted()
    for call in (backend.generate("a", **{name: LISTS[name][:1]}), backend.chat(HELLO, **{name: LISTS[name][:1]})):
        with pytest.raises(ValueError, match=f"^{name}: a list of 1 for a single prompt"):
            await call
    assert backend.requests == []


@pytest.mark.parametrize("name", LISTS)
async def test_an_entry_of_the_wrong_kind_is_refused_by_its_number(name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await Scripted().generate(["a", "b"], **{name: [LISTS[name][0], 5]})
    assert refused.value.field == f"{name}[1]"


async def test_a_single_prompt_takes_an_id_and_several_take_a_list_of_different_ones() -> None:
    backend = Scripted()

    await backend.generate("a", request_id="mine")
    await backend.generate(["a"], request_id="mine")
    assert [request.request_id for request in backend.requests] == ["mine", "mine"]

    with pytest.raises(InvalidRequest, match="one id for 2 prompts; expected a list with one for each"):
        await backend.generate(["a", "b"], request_id="mine")
    with pytest.raises(InvalidRequest) as refused:
        await backend.generate(["a", "b", "c"], request_id=["mine", "", "mine"])
    assert (refused.value.field, refused.value.reason) == ("request_id[2]", "DUPLICATE_REQUEST_ID")
    with pytest.raises(InvalidRequest, match=r"1\.\.128 characters"):
        await backend.generate("a", request_id="has spaces")


async def test_an_output_without_a_capture_has_a_handle_without_layers() -> None:
    texts, handles = await Scripted().generate(["a", "b"], capture=LISTS["capture"])

    assert len(texts) == len(handles) == 2
    assert [handle.layer_indices for handle in handles] == [(), (1,)]
    assert [dict(await handle.fetch()).keys() for handle in handles] == [set(), {1}]
    assert handles[0].total_bytes == 0
    assert (await Scripted().generate(["a", "b"], capture=[None, None])).handles is None


async def test_lists_for_no_prompts_are_empty() -> None:
    assert await Scripted().generate([], steering_spec=[], request_id=[], sampling=[]) == ([], None)


async def test_a_stream_takes_one_value() -> None:
    backend = Scripted()
    with pytest.raises(InvalidRequest, match=r"^steering_spec: a list of 2 for a single prompt"):
        await anext(backend.stream("a", steering_spec=[SPEC, OTHER]))
    async for _ in backend.stream("a", steering_spec=None, request_id="mine"):
        pass
    assert [request.request_id for request in backend.requests] == ["mine"]


async def test_a_call_ends_at_its_timeout_and_closes_its_requests() -> None:
    never = asyncio.Event()
    calls = {
        "generate": lambda backend: backend.generate(["a", "b"], timeout_s=0.01),
        "chat": lambda backend: backend.chat([HELLO, HELLO], timeout_s=0.01),
    }
    for call in calls.values():
        backend = Scripted([started(), never], [started(), never])
        with pytest.raises(DeadlineExceeded, match=r"took longer than 0\.01 s, the timeout_s of the call"):
            await asyncio.wait_for(call(backend), LIMIT_S)
        assert sorted(backend.closed) == [0, 1]


async def test_a_stream_ends_at_its_timeout() -> None:
    for name in ("stream", "stream_events"):
        backend = Scripted([started(), asyncio.Event()])
        with pytest.raises(DeadlineExceeded):
            async for _ in getattr(backend, name)("a", timeout_s=0.01):
                pass
        assert backend.closed == [0]


async def test_a_timeout_that_is_not_reached_changes_nothing() -> None:
    events = [event async for event in Scripted().stream_events("a", timeout_s=100)]

    assert isinstance(events[-2], OutputFinished)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e10, "5", True])
async def test_what_is_no_timeout_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"is not above 0 and at most 1000000000 seconds") as refused:
        await Scripted().generate("a", timeout_s=value)
    assert (refused.value.field, refused.value.reason) == ("timeout_s", "OUT_OF_RANGE")


def test_a_keyword_for_all_prompts_is_a_field_of_the_request() -> None:
    fields = typing.get_type_hints(GenerateRequest)

    assert {"time_budget_s", "cache_salt"} <= SHARED <= fields.keys()
    assert set(SamplingKeywords.__annotations__) == set(SamplingOptions.__dataclass_fields__)
    for keywords in (GenerateKeywords, ChatKeywords):
        assert typing.get_type_hints(keywords).keys() >= SHARED
