"""Plans of faults follow from a seed, and the clients of the soak write down what happened."""

import random
from collections.abc import AsyncIterator

import pytest

from bench.soak.clients import Client, Log, compute_references
from bench.soak.faults import FAULTS, World, damaged_calls, damaged_messages, duplicate_id, plan, refused_program
from bench.soak.history import violations
from bench.soak.random_faults import asks_of
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend

MISSING = frozenset({"NOT_FOUND"})


@pytest.fixture
async def world() -> AsyncIterator[World]:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    address = await server.listen()
    await server.open(FakeBackend())
    asks = asks_of(4, 8, 50)
    yield World(address=address, log=Log(), asks=asks, too_large=asks["wide"], hold_s=600.0, send_timeout_s=30.0)
    server.stop_now()
    await server.drain()


def test_a_seed_gives_the_same_plan_each_time_and_another_seed_another():
    assert plan(7, FAULTS, 60.0, 1.0) == plan(7, FAULTS, 60.0, 1.0)
    assert plan(7, FAULTS, 60.0, 1.0) != plan(8, FAULTS, 60.0, 1.0)


def test_each_kind_of_fault_comes_before_any_comes_again():
    planned = plan(1, FAULTS, 120.0, 1.0)
    assert {one.kind for one in planned[: len(FAULTS)]} == set(FAULTS)
    times = [one.at_s for one in planned]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 120.0


async def test_a_capture_is_right_until_it_is_released_and_only_for_its_owner(world: World):
    chance = random.Random(1)
    async with world.client(chance) as client, world.client(chance) as stranger:
        await compute_references(client)
        assert {name for name, reference in world.log.references.items() if not reference.rows} == {"plain", "steered"}
        held = (await client.generate("held")).held
        assert held is not None
        await stranger.fetch(held, allowed=MISSING)
        await stranger.release(held)
        await client.fetch(held)
        await client.release(held)
        await client.fetch(held, allowed=MISSING)
    assert violations(world.log.operations, world.log.references) == []


async def test_rows_of_another_request_are_noticed(world: World):
    async with Client(world.log, "c", world.address, world.asks) as client:
        await compute_references(client)
        held = (await client.generate("held")).held
        assert held is not None
        held.asked = "held_steered"
        await client.fetch(held)
    assert [one.split(": ")[0] for one in violations(world.log.operations, world.log.references)] == ["wrong rows"]


@pytest.mark.parametrize("fault", [damaged_calls, damaged_messages, duplicate_id, refused_program])
async def test_faults_are_written_into_the_history(world: World, fault):
    async with world.client(random.Random(1)) as client:
        await compute_references(client)
    await fault(world, random.Random(2))
    assert any(one.fault for one in world.log.operations)
    assert violations(world.log.operations, world.log.references, least_done=0) == []
