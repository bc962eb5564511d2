"""What `steer serve --listen-when-ready` prints, and that its address is known before its model."""

import asyncio
import os
import signal
from dataclasses import replace

import grpc
import pytest

from steer_service.cli.serve import serve
from steer_service.cli.server_process import LISTENING
from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.cli.test_serve import CONFIG, Lines, _drain
from tests.server.served import bounded, text_request
from tests.server.test_listen_when_ready import accepts

WAITING = replace(CONFIG, listen_when_ready=1)


async def test_it_says_that_it_listens_once_it_does(capfd) -> None:
    backends, loading, loaded, lines = iter([FakeBackend()]), asyncio.Event(), asyncio.Event(), Lines(capfd)

    async def start() -> Backend:
        loading.set()
        await loaded.wait()
        return next(backends)

    serving = asyncio.ensure_future(serve(WAITING, start))
    address = (await lines.until(r"steer: (\S+) accepts connections once the model is ready\n"))[1]
    await bounded(loading.wait())
    assert LISTENING not in lines.text
    assert not await accepts(address)

    loaded.set()

    await lines.until(rf"{LISTENING}{address}\nsteer: serving fake on {address}\n")
    assert await accepts(address)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0


async def test_it_says_so_once_however_often_the_engine_starts(capfd) -> None:
    backends, lines = [FakeBackend(), FakeBackend()], Lines(capfd)
    starts = iter(backends)

    async def start() -> Backend:
        return next(starts)

    serving = asyncio.ensure_future(serve(WAITING, start))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    backends[0].failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await bounded(_drain(GenerationServiceStub(channel).Generate(text_request())))
    await lines.until(r"(?s)steer: serving .*steer: serving ")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0
    assert lines.text.count(LISTENING) == 1
