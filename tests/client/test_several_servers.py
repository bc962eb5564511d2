"""One client and two servers, between which a balancer takes turns with every call."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, OtherInstance, SteeringSpec
from steer_client.aio import _CaptureRpcs
from steer_client.capture_handles import RemoteCapture
from steer_client.other_instances import ATTEMPTS
from steer_client.uploaded_vectors import FORGOTTEN_AFTER, UploadedVectors
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.arena import Arena
from tests.client.captures import HELD, PREFERRED, PROMPT, SHARED, captured, same
from tests.client.conftest import Serve, Server
from tests.client.test_broken_captures import NOTICE

ROUND_ROBIN = (("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),)
WIDE = replace(FAKE_MODEL, hidden_size=256)


@pytest.fixture
def servers(serve: Serve, arena: Arena) -> list[Server]:
    return [serve(FakeBackend(WIDE, place=arena), shm_dir=str(arena.folder), instance=name) for name in ("one", "two")]


@pytest.fixture
async def client(servers: list[Server], arena: Arena) -> AsyncIterator[AsyncSteerClient]:
    address = "ipv4:" + ",".join(server.address for server in servers)
    async with AsyncSteerClient(address, shm_dir=str(arena.folder), channel_options=ROUND_ROBIN) as client:
        for _ in range(20):  # both connections are made
            await client.load_info()
            client._info = None
        yield client


def steering(seed: int = 0) -> SteeringSpec:
    return SteeringSpec.simple_add(1, np.random.default_rng(seed).standard_normal(256).astype(np.float32))


def refusals(servers: list[Server], reason: str) -> float:
    """Calls of this process that were refused for `reason`."""
    labels = {"code": "NOT_FOUND", "reason": reason}
    return servers[0].metrics.registry.get_sample_value("steerllm_errors_total", labels) or 0.0


async def test_calls_reach_both_servers(client: AsyncSteerClient, servers: list[Server]) -> None:
    for _ in range(4):
        await client.generate(PROMPT, max_tokens=1)
    assert [len(server.backend.requests) for server in servers] == [2, 2]


async def test_every_held_capture_is_fetched_and_released(client: AsyncSteerClient, servers: list[Server]) -> None:
    handles = [await captured(client, HELD) for _ in range(6)]
    fetched = [await handle.fetch() for handle in handles]
    assert all(same(fetched[0], one) for one in fetched)
    for handle in handles:
        await handle.close()
    assert [server.backend.holding for server in servers] == [0, 0]


@pytest.mark.parametrize("spec", [SHARED, PREFERRED], ids=["required", "preferred"])
async def test_shared_memory_is_used_with_the_server_that_has_the_session(client: AsyncSteerClient, spec) -> None:
    for _ in range(4):
        [generation], [handle] = await client.generate(PROMPT, max_tokens=4, capture=spec, raw_output=True)
        async with handle:
            assert (await handle.fetch())[0]
        if spec is SHARED:
            assert generation.capture_delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED


async def test_both_servers_learn_the_vectors_and_few_requests_are_sent_twice(
    client: AsyncSteerClient, servers: list[Server]
) -> None:
    before = refusals(servers, "UNKNOWN_VECTOR")
    for _ in range(12):
        await client.generate(PROMPT, max_tokens=1, steering_spec=steering())
    assert refusals(servers, "UNKNOWN_VECTOR") - before <= 2
    assert sum(len(server.backend.requests) for server in servers) == 12
    last, stored = client._uploaded_vectors.expected()
    assert last in ("one", "two")
    assert steering().vector_digests()[0] in stored


async def test_a_server_that_is_never_reached_is_named(servers: list[Server]) -> None:
    before = refusals(servers, "OTHER_INSTANCE")
    async with AsyncSteerClient(servers[1].address) as client:
        elsewhere = RemoteCapture(replace(NOTICE, capture_id="one/secret", instance="one"), _CaptureRpcs(client))
        for call in (elsewhere.rows(), elsewhere.release()):
            with pytest.raises(OtherInstance, match="it is on the server one, and this is two") as raised:
                await call
            assert raised.value.instance == "one"
    assert refusals(servers, "OTHER_INSTANCE") - before == 2 * ATTEMPTS


def test_vectors_are_named_only_where_every_server_has_them_and_a_server_that_has_gone_is_forgotten() -> None:
    vectors, spec = UploadedVectors(), steering()
    [digest] = spec.vector_digests()
    vectors.add(spec, "one")
    assert digest in vectors.expected()[1]
    vectors._note_answer("two")
    assert vectors.expected()[0] == "two"
    assert digest not in vectors.expected()[1]
    for _ in range(FORGOTTEN_AFTER):
        vectors._note_answer("one")
        vectors.expected()
    assert digest in vectors.expected()[1]
