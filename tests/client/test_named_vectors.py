"""A client sends a vector once and then names it, and sends it again by itself where the server has lost it."""

import asyncio
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from steer_client import (
    AblationSpec,
    AddSpec,
    AsyncSteerClient,
    LayerSteeringSpec,
    MissingVectors,
    ProjectionCapSpec,
    SteerClient,
    SteeringSpec,
)
from steer_client.uploaded_vectors import UploadedVectors
from steer_service.server.vector_store import OVERHEAD_BYTES
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Gate, Relay, Serve, Server

WIDTH, LAYERS = 576, 30
MODEL = dataclasses.replace(
    FAKE_MODEL, hidden_size=WIDTH, layer_count=LAYERS, max_operations=3 * LAYERS, max_operations_per_layer=3
)
"""As wide and deep as the bundled model."""

CARRIED_BYTES = 3 * LAYERS * WIDTH * 4
"""Bytes of the vectors of a whole program."""


def program(seed: int = 0, layers: int = LAYERS) -> SteeringSpec:
    """An addition, a cap and an ablation at every layer, each with a vector of its own."""
    random = np.random.default_rng(seed)

    def operations() -> LayerSteeringSpec:
        one, two, three = random.standard_normal((3, WIDTH))
        return LayerSteeringSpec([AddSpec(one), ProjectionCapSpec(two, max=1.0), AblationSpec(three)])

    return SteeringSpec({layer: operations() for layer in range(layers)})


def vector_bytes(count: int) -> int:
    return count * (WIDTH * 4 + OVERHEAD_BYTES)


@pytest.fixture
def relays() -> Iterator[list[Relay]]:
    relays: list[Relay] = []
    yield relays
    for relay in relays:
        relay.close()


def relay_to(server: Server, relays: list[Relay]) -> Relay:
    relays.append(Relay(server.address))
    return relays[-1]


async def sent_for(client: AsyncSteerClient, relay: Relay, spec: SteeringSpec) -> int:
    """Bytes that the client sends for one request with `spec`, whose answer is right."""
    before = relay.taken
    [generation], _ = await client.generate("a b", max_tokens=2, steering_spec=spec, raw_output=True)
    assert generation.outputs[0].receipt.steering_digest == spec.digest()
    return relay.taken - before


async def test_the_second_request_with_a_program_sends_few_bytes(serve: Serve, relays: list[Relay]) -> None:
    server = serve(FakeBackend(MODEL))
    relay = relay_to(server, relays)
    async with AsyncSteerClient(relay.address) as client:
        first = await sent_for(client, relay, program())
        second = await sent_for(client, relay, program())

    assert first > CARRIED_BYTES
    assert second < CARRIED_BYTES / 30
    assert [request.steering for request in server.backend.requests] == [program()] * 2


async def test_only_vectors_that_are_new_are_sent(serve: Serve, relays: list[Relay]) -> None:
    server = serve(FakeBackend(MODEL))
    relay = relay_to(server, relays)
    spec = program()
    scaled = SteeringSpec({0: LayerSteeringSpec([AddSpec(spec.layers[0].operations[0].vector, scale=3.0)])})
    changed = SteeringSpec({**spec.layers, 0: LayerSteeringSpec([AddSpec(np.ones(WIDTH))])})
    async with AsyncSteerClient(relay.address) as client:
        await sent_for(client, relay, spec)
        of_scaled = await sent_for(client, relay, scaled)
        of_changed = await sent_for(client, relay, changed)

    assert of_scaled < WIDTH
    assert WIDTH * 4 < of_changed < WIDTH * 4 + CARRIED_BYTES / 30


async def test_a_client_sends_its_vectors_again_to_a_server_that_was_restarted(
    serve: Serve, relays: list[Relay]
) -> None:
    first = serve(FakeBackend(MODEL))
    async with AsyncSteerClient(first.address) as client:
        await client.generate("a b", max_tokens=2, steering_spec=program())
        first.stop()
        second = serve(FakeBackend(MODEL), address=first.address)

        [generation], _ = await client.generate("a b", max_tokens=2, steering_spec=program(), raw_output=True)

    assert generation.outputs[0].receipt.steering_digest == program().digest()
    assert [request.steering for request in second.backend.requests] == [program()]


async def test_vectors_that_were_forgotten_for_others_are_sent_again(serve: Serve, relays: list[Relay]) -> None:
    server = serve(FakeBackend(MODEL), client_vector_bytes=vector_bytes(3 * LAYERS))
    relay = relay_to(server, relays)
    async with AsyncSteerClient(relay.address) as client:
        await sent_for(client, relay, program(0))
        await sent_for(client, relay, program(1, layers=10))
        again = await sent_for(client, relay, program(0))
        named = await sent_for(client, relay, program(0))

    assert again > CARRIED_BYTES
    assert named < CARRIED_BYTES / 30


async def test_more_lost_vectors_than_can_be_listed_are_all_sent_again(serve: Serve) -> None:
    model = dataclasses.replace(MODEL, max_operations=300, max_operations_per_layer=300)
    first = serve(FakeBackend(model))
    spec = SteeringSpec({0: LayerSteeringSpec([AddSpec(np.full(WIDTH, 1.0 + one)) for one in range(300)])})
    async with AsyncSteerClient(first.address) as client:
        await client.generate("a b", max_tokens=2, steering_spec=spec)
        first.stop()
        second = serve(FakeBackend(model), address=first.address)

        await client.generate("a b", max_tokens=2, steering_spec=spec)

    assert [request.steering for request in second.backend.requests] == [spec]


@pytest.mark.parametrize("config", [{"vector_store_bytes": 0}, {"client_vector_bytes": vector_bytes(89)}], ids=str)
async def test_a_program_that_is_not_stored_is_sent_with_every_request(
    serve: Serve, relays: list[Relay], config: dict[str, int]
) -> None:
    relay = relay_to(serve(FakeBackend(MODEL), **config), relays)
    async with AsyncSteerClient(relay.address) as client:
        for _ in range(2):
            assert await sent_for(client, relay, program()) > CARRIED_BYTES


async def test_a_program_that_is_used_stays_while_others_come_and_go(serve: Serve, relays: list[Relay]) -> None:
    server = serve(FakeBackend(MODEL), client_vector_bytes=vector_bytes(3 * LAYERS))
    relay = relay_to(server, relays)
    async with AsyncSteerClient(relay.address) as client:
        await sent_for(client, relay, program(0))
        server.backend.step = gate = Gate(1)
        running = asyncio.create_task(client.generate("a b", max_tokens=2, steering_spec=program(0)))
        await asyncio.to_thread(server.wait_until, lambda: gate.is_reached)
        server.backend.step = None
        others = [await sent_for(client, relay, program(seed, layers=10)) for seed in (1, 1)]
        named = await sent_for(client, relay, program(0))
        running.cancel()
        await asyncio.wait([running])

    assert min(others) > CARRIED_BYTES / 3  # there was no room for them, twice
    assert named < CARRIED_BYTES / 30


def test_small_vectors_are_never_named() -> None:
    names, small, large = (
        UploadedVectors(),
        SteeringSpec.simple_add(1, np.ones(63)),
        SteeringSpec.simple_add(1, np.ones(64)),
    )
    names.add(small)
    names.add(large)
    _, stored = names.expected()
    assert small.vector_digests()[0] not in stored
    assert large.vector_digests()[0] in stored


async def test_a_request_that_was_answered_is_not_sent_again(serve: Serve) -> None:
    server = serve(FakeBackend(MODEL))
    async with AsyncSteerClient(server.address) as client:
        await client.generate("a b", max_tokens=2, steering_spec=program())
        server.backend.failure = MissingVectors("lost", digests=program().vector_digests())
        with pytest.raises(MissingVectors, match="lost"):
            await client.generate("a b", max_tokens=2, steering_spec=program())

    assert len(server.backend.requests) == 2


def test_the_client_for_threads_names_vectors_as_well(serve: Serve, relays: list[Relay]) -> None:
    server = serve(FakeBackend(MODEL))
    relay = relay_to(server, relays)
    with SteerClient(relay.address) as client:
        client.generate("a b", max_tokens=2, steering_spec=program())
        before = relay.taken
        client.generate("a b", max_tokens=2, steering_spec=program())
        assert relay.taken - before < CARRIED_BYTES / 30

    assert [request.steering for request in server.backend.requests] == [program()] * 2
