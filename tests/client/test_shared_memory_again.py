"""Shared memory after a server that was away, and one that never shares it."""

import asyncio
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, EngineFailed, Unsupported
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.conftest import BOUND_S, Serve, Server
from tests.oracles import FAKE
from tests.shm_clients import captured, check, prompt_of


def sharing(serve: Serve, address: str) -> Server:
    return serve(FakeBackend(place=Arena(Path("/dev/shm"), 1 << 20)), address)


async def test_a_client_shares_memory_again_as_soon_as_its_server_is_back(serve: Serve, short_folder: str) -> None:
    address = f"unix:{short_folder}/socket"
    first = sharing(serve, address)
    async with AsyncSteerClient(address) as client:
        async with await captured(client, prompt_of(1)) as handle:
            await check(handle, prompt_of(1), FAKE)
        await asyncio.to_thread(first.stop)
        with pytest.raises(EngineFailed, match="no server answers"):
            await captured(client, prompt_of(2))

        await asyncio.to_thread(sharing, serve, address)

        async with asyncio.timeout(BOUND_S), await captured_once_there(client) as handle:
            await check(handle, prompt_of(3), FAKE)


async def captured_once_there(client: AsyncSteerClient):
    while True:
        try:
            return await captured(client, prompt_of(3))
        except EngineFailed as error:  # gRPC waits a little before it connects again
            if error.reason != "UNREACHABLE":
                raise
            await asyncio.sleep(0.01)


async def test_a_directory_that_is_not_shared_is_not_tried_with_every_request(server: Server, tmp_path: Path) -> None:
    async with AsyncSteerClient(server.address, shm_dir=str(tmp_path)) as client:
        for number in range(3):
            with pytest.raises(Unsupported, match="cannot go through shared memory"):
                await captured(client, prompt_of(number))

        sessions = list(client._sessions.values())
    assert len(sessions) == 1
    assert sessions[0]._refused_until > 0
