"""Every error reaches the caller as the class, reason, field and message with which it was raised."""

import socket
import time

import pytest

from steer_client import (
    AblationSpec,
    AddSpec,
    AsyncSteerClient,
    CaptureSpec,
    DeadlineExceeded,
    EngineFailed,
    GenerateRequest,
    InvalidRequest,
    LayerSteeringSpec,
    NotFound,
    Overloaded,
    SamplingOptions,
    SteerClient,
    SteerError,
    SteeringSpec,
    TextPrompt,
    TokenPrompt,
    Unsupported,
)
from steer_service.runtime.results import collect
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import BOUND_S, Cable, Gate, Serve, Server

HELLO = TextPrompt(text="hello")
WIDE = SteeringSpec(layers={1: LayerSteeringSpec(operations=[AblationSpec(vector=[1.0] * 9)])})
LONG = SteeringSpec(layers={1: LayerSteeringSpec(operations=[AddSpec(vector=[1.0] * 8)] * 9)})

REFUSED = {
    "unknown layer": GenerateRequest(prompt=HELLO, steering=SteeringSpec.simple_add(9, [1.0] * 8)),
    "wrong width": GenerateRequest(prompt=HELLO, steering=WIDE),
    "too many operations": GenerateRequest(prompt=HELLO, steering=LONG),
    "capture of an unknown layer": GenerateRequest(prompt=HELLO, capture=CaptureSpec(layers=(0, 4))),
    "token outside the vocabulary": GenerateRequest(prompt=TokenPrompt(token_ids=(1, 32_000))),
    "unknown model": GenerateRequest(prompt=HELLO, model="other"),
    "prompt too long": GenerateRequest(prompt=TokenPrompt(token_ids=(1,) * 4096)),
    "prompt without a word": GenerateRequest(prompt=TextPrompt(text=" ")),
}


def facts(error: SteerError) -> tuple[object, ...]:
    return type(error), error.reason, error.field, error.message, error.retry_after_s


@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
async def test_a_refusal_is_the_same_through_the_network(client: AsyncSteerClient, request_: GenerateRequest) -> None:
    with pytest.raises(SteerError) as direct:
        await collect(FakeBackend().submit(request_))
    with pytest.raises(SteerError) as remote:
        await collect(client.submit(request_))

    assert facts(remote.value) == facts(direct.value)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("that is wrong", reason="SOME_RULE", field="sampling.n"),
        NotFound("no such thing", reason="UNKNOWN_VECTOR", field="steering.layers[1]"),
        Unsupported("not built", reason="NOT_BUILT"),
        Overloaded("full: 3 of 3", reason="FULL", retry_after_s=1.5),
        Overloaded("nothing was read for 30 s", reason="SLOW_READER"),
        DeadlineExceeded("too late"),
        EngineFailed("the engine died", reason="ENGINE_DIED"),
    ],
    ids=lambda error: error.reason,
)
async def test_a_failure_under_way_comes_after_what_was_generated(serve: Serve, error: SteerError) -> None:
    server = serve(FakeBackend(failure=error, fail_at=2))

    async with AsyncSteerClient(server.address) as client:
        stream = client.stream("hello", max_tokens=5)
        assert len([await anext(stream), await anext(stream)]) == 2
        with pytest.raises(type(error)) as raised:
            await anext(stream)

    assert facts(raised.value) == facts(error)


async def test_a_broken_rule_is_told_before_the_network_is_used(dead_address: str) -> None:
    client = AsyncSteerClient(dead_address)

    with pytest.raises(InvalidRequest, match="max_tokens: -1 is outside"):
        await client.generate("hello", max_tokens=-1)
    with pytest.raises(InvalidRequest, match="tmperature is not an option of this call"):
        await client.generate("hello", tmperature=1)
    with pytest.raises(InvalidRequest, match="the prompt is empty"):
        await client.generate("")


async def test_one_wrong_prompt_fails_the_call_and_ends_the_others(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))

    async with AsyncSteerClient(server.address) as client:
        with pytest.raises(InvalidRequest, match="token id 99999"):
            await client.generate(["hello", [99_999]], max_tokens=5)

    server.wait_idle()
    assert (server.backend.aborted, server.backend.finished) == (len(server.backend.requests), 0)


async def test_an_error_names_the_call_in_the_servers_log(serve: Serve) -> None:
    async with AsyncSteerClient(serve(FakeBackend()).address, metadata=(("x-request-id", "edge-1"),)) as client:
        with pytest.raises(SteerError) as raised:
            await client.generate(" ")
    assert raised.value.x_request_id == "edge-1"


async def test_no_server_is_said_plainly(dead_address: str) -> None:
    client = AsyncSteerClient(dead_address)

    for call in (client.generate("hello"), AsyncSteerClient.connect(dead_address)):
        with pytest.raises(EngineFailed, match=f"no server answers at {dead_address}") as raised:
            await call
        assert raised.value.reason == "UNREACHABLE"
    with pytest.raises(EngineFailed, match="no server answers at"):
        _ = client.hidden_size


def test_no_server_is_said_plainly_by_the_blocking_client(dead_address: str) -> None:
    with SteerClient(dead_address) as client:
        with pytest.raises(EngineFailed, match=f"no server answers at {dead_address}"):
            client.generate("hello")
        with pytest.raises(EngineFailed, match="no server answers at"):
            _ = client.layer_count


async def test_a_lost_connection_is_said_plainly(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))
    cable = Cable(server.address)
    stream = AsyncSteerClient(cable.address).stream("hello", max_tokens=5)
    await anext(stream)

    cable.cut()

    with pytest.raises(EngineFailed) as raised:
        await anext(stream)
    assert raised.value.reason == "CONNECTION_LOST"
    server.wait_idle()


async def test_a_server_that_stops_says_so(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))
    stream = AsyncSteerClient(server.address).stream("hello", max_tokens=5)
    await anext(stream)

    server.stop()

    with pytest.raises(EngineFailed, match="the server stopped") as raised:
        await anext(stream)
    assert raised.value.reason == "DRAINING"


async def test_a_message_over_the_server_s_limit_is_refused(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await client.generate("x" * (17 << 20))

    assert raised.value.reason == "MESSAGE_TOO_LARGE"


async def test_a_deadline_ends_the_request_on_both_sides(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))

    async with AsyncSteerClient(server.address, timeout_s=0.5) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate("hello", max_tokens=5)

    server.wait_idle()
    assert server.backend.aborted == 1


async def test_a_call_has_a_deadline_of_its_own_that_the_server_knows(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(1)))

    async with AsyncSteerClient(server.address, timeout_s=1000.0) as client:
        with pytest.raises(DeadlineExceeded):
            await client.generate(["hello", "there"], max_tokens=5, timeout_s=0.5)
        request = GenerateRequest(prompt=TextPrompt(text="hello"))
        with pytest.raises(DeadlineExceeded, match=r"took longer than 0\.5 s, the timeout_s of the call"):
            await collect(client.submit_within(request, 0.5))

    server.wait_idle()
    assert server.backend.aborted == 3


def test_a_silent_server_does_not_hold_a_property_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = AsyncSteerClient(f"127.0.0.1:{silent.getsockname()[1]}", unary_timeout_s=0.3)
        begun = time.monotonic()

        with pytest.raises((DeadlineExceeded, EngineFailed)):
            _ = client.hidden_size

    assert time.monotonic() - begun < BOUND_S


@pytest.mark.parametrize("address", ["http://127.0.0.1:50051", "127.0.0.1", "", "host:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        AsyncSteerClient(address)

    assert (raised.value.field, raised.value.reason) == ("address", "BAD_ADDRESS")


def test_a_time_limit_must_be_above_zero() -> None:
    with pytest.raises(InvalidRequest, match="timeout_s: 0 is not above 0"):
        SteerClient(timeout_s=0)


async def test_a_closed_client_says_so(server: Server) -> None:
    client = AsyncSteerClient(server.address)
    await client.generate("hello", max_tokens=1)
    await client.close()
    await client.close()

    with pytest.raises(EngineFailed) as raised:
        await client.generate("hello", max_tokens=1)
    assert raised.value.reason == "CLOSED"


async def test_the_options_are_checked_as_sampling_options_whole_or_single(client: AsyncSteerClient) -> None:
    with pytest.raises(InvalidRequest, match="not both"):
        await client.generate("hello", SamplingOptions(max_tokens=1), temperature=0.5)


@pytest.mark.parametrize("client_id", ["a b", "x" * 129, "ä", "a\n"])
def test_a_secret_that_does_not_travel_is_refused_and_not_repeated(client_id: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        AsyncSteerClient(client_id=client_id)

    assert raised.value.field == "client_id"
    assert client_id not in str(raised.value)


def test_every_client_has_a_secret_of_its_own() -> None:
    secrets = {AsyncSteerClient()._config.client_id for _ in range(20)}

    assert len(secrets) == 20
    assert min(map(len, secrets)) >= 32
    assert not any(secret in repr(AsyncSteerClient(client_id=secret)._config) for secret in secrets)


async def test_an_error_names_the_layer_and_not_its_entry(client: AsyncSteerClient, server: Server) -> None:
    wide = LayerSteeringSpec(operations=[AddSpec(vector=[1.0] * 9)])
    spec = SteeringSpec(layers={1: LayerSteeringSpec(operations=[AddSpec(vector=[1.0] * 8)]), 3: wide})

    with pytest.raises(InvalidRequest) as raised:
        await client.generate("hello", steering_spec=spec)

    assert raised.value.field == "steering.layers[3].operations[0].vector"
