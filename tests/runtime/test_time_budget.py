"""The time that a request has, on the fake backend, in this process and through a server."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, GenerateRequest, SamplingOptions, TextPrompt
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.events import FinishReason
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.calls import SteeringCalls, checked_events
from steer_service.runtime.results import Generation, collect
from steer_service.runtime.time_budget import TimeBudget
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, decode_row
from tests.arena import Arena

BUDGET_S = 0.5
STEERING = SteeringSpec.simple_add(1, [1.0] * 8)
CAPTURE = CaptureSpec(layers=(0, 3), site=CaptureSite.BOTH)
REQUEST = GenerateRequest(
    prompt=TextPrompt(text="one two three"),
    sampling=SamplingOptions(max_tokens=9),
    steering=STEERING,
    capture=CAPTURE,
    time_budget_s=BUDGET_S,
)
ALL = {
    "inline": CAPTURE,
    "live": replace(CAPTURE, is_live=True),
    "held": replace(CAPTURE, delivery=CaptureDelivery.HELD),
    "shared": replace(CAPTURE, delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED),
}


async def held_before(number: int, at: int) -> None:
    """Holds a request before its token `at`, until its time is over."""
    if number == at:
        await asyncio.Event().wait()


@pytest.fixture
def arena(tmp_path) -> Arena:  # type: ignore[no-untyped-def]
    return Arena(tmp_path)


@pytest.fixture
def fake(arena: Arena) -> FakeBackend:
    return FakeBackend(place=arena)


@pytest.fixture(params=["in this process", "through a server"])
async def backend(request: pytest.FixtureRequest, fake: FakeBackend, arena: Arena) -> AsyncIterator[SteeringCalls]:
    if request.param == "in this process":
        yield fake
        return
    server = SteerServer(ServerConfig(address="127.0.0.1:0", shm_dir=str(arena.folder), grace_s=0.0))
    address = await server.listen()
    await server.open(fake)
    async with AsyncSteerClient(address, shm_dir=str(arena.folder)) as client:
        yield client
    await server.drain()


async def run(backend: SteeringCalls, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(backend, request)), 10)


@pytest.mark.parametrize("tokens", [0, 1, 4])
@pytest.mark.parametrize("capture", ALL.values(), ids=ALL)
async def test_tokens_and_rows_until_the_end_of_the_time_are_kept(
    backend: SteeringCalls, fake: FakeBackend, capture: CaptureSpec, tokens: int
) -> None:
    fake.step = lambda number: held_before(number, tokens)

    generation = await run(backend, replace(REQUEST, capture=capture))

    [output] = generation.outputs
    rows = 3 + tokens - 1 if tokens else 0
    assert (output.finish_reason, output.stop) == (FinishReason.TIME_BUDGET, None)
    assert len(output.token_ids) == tokens == generation.usage.completion_tokens
    assert (output.receipt.rows_total, output.receipt.rows_steered, output.receipt.rows_captured) == (rows,) * 3
    assert output.receipt.steering_digest == STEERING.digest()
    captured = output.captured
    if output.held is not None:
        captured = await output.held.rows()
        await output.held.release()
    for layer in (0, 3):
        for site in (captured.before, captured.after):
            assert [decode_row(row)[:2] for row in site[layer]] == [(layer, position) for position in range(rows)]
            assert site[layer].shape == (rows, FAKE_MODEL.hidden_size)
    assert (fake.running, fake.finished, fake.aborted) == (0, fake.finished, 0)


async def test_every_output_of_a_request_ends(backend: SteeringCalls, fake: FakeBackend) -> None:
    fake.step = lambda number: held_before(number, 2)

    generation = await run(backend, replace(REQUEST, sampling=SamplingOptions(max_tokens=9, n=3)))

    ends = [(output.finish_reason, len(output.token_ids)) for output in generation.outputs]
    assert ends == [(FinishReason.TIME_BUDGET, 2)] * 3


async def test_an_output_that_ended_before_keeps_its_reason(backend: SteeringCalls, fake: FakeBackend) -> None:
    [full] = (await run(backend, replace(REQUEST, sampling=SamplingOptions(max_tokens=2)))).outputs
    fake.step = lambda number: held_before(number, 3)
    sampling = SamplingOptions(max_tokens=9, n=2, stop_token_ids=full.token_ids[1:])

    first, second = (await run(backend, replace(REQUEST, sampling=sampling))).outputs

    assert (first.finish_reason, first.stop, len(first.token_ids)) == (FinishReason.STOP, full.token_ids[1], 2)
    assert (second.finish_reason, len(second.token_ids)) == (FinishReason.TIME_BUDGET, 3)


async def test_a_request_that_is_complete_in_time_is_as_without_a_budget(backend: SteeringCalls) -> None:
    [output] = (await run(backend, replace(REQUEST, time_budget_s=3600))).outputs
    [unlimited] = (await run(backend, replace(REQUEST, time_budget_s=None))).outputs

    assert output.finish_reason is FinishReason.LENGTH
    assert output.token_ids == unlimited.token_ids
    assert output.receipt == unlimited.receipt


async def test_the_calls_take_a_budget(backend: SteeringCalls, fake: FakeBackend) -> None:
    fake.step = lambda number: held_before(number, 2)

    texts, _ = await backend.generate(["one", "two"], max_tokens=5, time_budget_s=BUDGET_S)
    responses, _ = await backend.chat([{"role": "user", "content": "Hi"}], max_tokens=5, time_budget_s=BUDGET_S)
    pieces = [text async for text in backend.stream("one", max_tokens=5, time_budget_s=BUDGET_S)]

    assert [text.count(" t") for text in texts] == [2, 2]
    assert responses[0].generated.count(" t") == 2
    assert len(pieces) == 2


async def test_an_error_of_the_backend_is_not_taken_for_the_end_of_the_time(fake: FakeBackend) -> None:
    async def late(_: int) -> None:
        raise TimeoutError("of something else")

    fake.step = late
    with pytest.raises(TimeoutError, match="of something else"):
        await run(fake, replace(REQUEST, time_budget_s=3600))


def test_a_request_without_a_budget_is_never_over() -> None:
    unlimited = TimeBudget.of(None)

    assert not unlimited.is_limited
    assert not unlimited.is_over
    assert unlimited.left_s == float("inf")


def test_a_budget_is_over_after_its_seconds() -> None:
    over = TimeBudget(ends_at=0.0)

    assert over.is_over
    assert over.left_s == 0
    assert not TimeBudget.of(3600).is_over
