"""Waiting for a server, and what it says about itself."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, DeadlineExceeded, EngineFailed, ServerInfo, SteerClient, Unauthenticated
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.server.info_servicer import API_REVISION
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve
from tests.server.served import bounded
from tests.server.test_tokens import entry


async def test_a_server_that_starts_later_is_waited_for(short_folder: str) -> None:
    address = f"unix:{short_folder}/socket"
    async with AsyncSteerClient(address) as client:
        with pytest.raises(EngineFailed):
            await client.load_info()
        waiting = asyncio.create_task(client.wait_until_ready(timeout_s=10.0))
        server = SteerServer(ServerConfig(address=address, grace_s=0.0))
        await server.listen()
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done, "it listens, and has no model"
        await server.open(FakeBackend())
        assert await bounded(waiting) == FAKE_MODEL
        await client.generate("hello", max_tokens=1)
    server.stop_now()
    await bounded(server.drain())


async def test_what_was_wrong_last_is_said(dead_address: str) -> None:
    once = [("grpc.enable_retries", 0)]  # gRPC says after a second what it knows at once
    async with AsyncSteerClient(dead_address, channel_options=once) as client:
        with pytest.raises(DeadlineExceeded) as raised:
            await client.wait_until_ready(timeout_s=0.2)
    assert "was not ready within 0.2 s" in raised.value.message
    assert raised.value.message.endswith("the connection is refused")
    assert raised.value.__cause__ is not None

    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    async with AsyncSteerClient(server.address, channel_options=once) as client:
        with pytest.raises(DeadlineExceeded, match=r"last: it is NOT_SERVING: .* \(LOADING\)"):
            await client.wait_until_ready(timeout_s=0.2)
        info = await client.server_info()
        assert info.start_proof is None
    await bounded(server.drain())


async def test_what_waiting_does_not_mend_is_raised_at_once(serve: Serve, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("alice", "secret"))
    async with AsyncSteerClient(serve(token_file=str(tokens)).address) as client:
        with pytest.raises(Unauthenticated):
            await bounded(client.wait_until_ready())


async def test_a_server_says_what_it_is(serve: Serve) -> None:
    server = serve(max_concurrent_requests=7, instance="seven")
    async with AsyncSteerClient(server.address) as client:
        info = await client.server_info()

    assert isinstance(info, ServerInfo)
    assert (info.api_revision, info.instance) == (API_REVISION, "seven")
    assert info.version
    assert info.instance_id
    assert info.limits.max_concurrent_requests == 7
    assert info.limits.max_message_bytes > info.limits.max_chunk_bytes > 0
    assert {"steering", "capture_live", "tokenizer"} <= info.features
    assert "priority" not in info.features


def test_the_blocking_client_has_both(serve: Serve) -> None:
    server = serve()
    with SteerClient(server.address) as client:
        assert client.wait_until_ready(timeout_s=5.0) == FAKE_MODEL
        assert dataclasses.asdict(client.server_info())["limits"]["max_outputs"] > 0
