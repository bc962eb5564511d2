"""A request that asks for fewer messages gets the same tokens, text and rows in larger pieces."""

from collections import Counter
from dataclasses import replace

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.events import CaptureLabels, TokenDelta
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.calls import checked_events
from steer_service.testing.fake_backend import FakeBackend

REQUEST = GenerateRequest(
    prompt=TextPrompt(text="a b"), sampling=SamplingOptions(max_tokens=10, n=2, logprobs=1, prompt_logprobs=0)
)


async def events_of(request: GenerateRequest) -> list[object]:
    return [event async for event in checked_events(FakeBackend(), request)]


@pytest.mark.parametrize("interval", [0, 1, 3, 4, 100])
async def test_deltas_hold_so_many_tokens_but_the_first_and_the_last(interval: int) -> None:
    plain = await events_of(REQUEST)
    spaced = await events_of(replace(REQUEST, stream_interval=interval))

    for index in range(2):
        before, after = (
            [event for event in events if isinstance(event, TokenDelta) and event.output_index == index]
            for events in (plain, spaced)
        )
        sizes = [len(delta.token_ids) for delta in after]
        assert sizes[0] == 1 or sizes == [10]
        assert (sizes == [10]) == (interval == 0)
        assert all(size == interval for size in sizes[1:-1])
        assert "".join(delta.text for delta in after) == "".join(delta.text for delta in before)
        for part in ("token_ids", "logprobs"):
            mine, theirs = ([one for delta in some for one in getattr(delta, part)] for some in (after, before))
            assert mine == theirs
    others = [[type(event) for event in events if not isinstance(event, TokenDelta)] for events in (plain, spaced)]
    assert others[0] == others[1]


async def test_live_rows_keep_their_place_among_the_tokens() -> None:
    live = replace(REQUEST, capture=CaptureSpec(layers=(1,), is_live=True), stream_interval=8)

    events = await events_of(live)

    assert sum(isinstance(event, CaptureLabels) for event in events) == 20  # and the response was valid


async def test_tokens_that_wait_come_before_the_error_of_their_request() -> None:
    backend = FakeBackend(failure=EngineFailed("it failed"), fail_at=7)
    tokens: Counter[int] = Counter()

    async def count() -> None:
        async for event in checked_events(backend, replace(REQUEST, stream_interval=100)):
            if isinstance(event, TokenDelta):
                tokens[event.output_index] += len(event.token_ids)

    with pytest.raises(EngineFailed, match="it failed"):
        await count()
    assert tokens == {0: 7, 1: 7}


@pytest.mark.parametrize("value", [-1, 2**31, 1.5, True])
def test_an_interval_that_is_no_number_of_tokens_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        replace(REQUEST, stream_interval=value)  # type: ignore[arg-type]
    assert refused.value.field == "stream_interval"
