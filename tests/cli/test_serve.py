"""`steer serve` from its first line to its last signal, around the fake backend."""

import argparse
import asyncio
import os
import re
import signal
from contextlib import closing
from dataclasses import replace

import grpc
import pytest
import uvloop

from steer_service.cli import main as cli
from steer_service.cli.serve import serve
from steer_service.cli.server_flags import _address_from
from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed
from steer_service.server import event_loop as loops
from steer_service.server.config import ServerConfig
from steer_service.server.event_loop import new_event_loop
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.server.served import Gate, bounded, text_request

CONFIG = ServerConfig(address="127.0.0.1:0", grace_s=5.0)


class Lines:
    """Standard output as it grows."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd
        self.text = ""

    async def until(self, pattern: str) -> re.Match[str]:
        async def wait() -> re.Match[str]:
            while True:
                self.text += self._capfd.readouterr().out
                found = re.search(pattern, self.text)
                if found:
                    return found
                await asyncio.sleep(0.005)

        return await bounded(wait())


async def started(backend: FakeBackend) -> Backend:
    return backend


def test_the_command_runs_in_uvloop_where_that_is_installed(monkeypatch):
    with closing(new_event_loop()) as loop:
        assert isinstance(loop, uvloop.Loop)
    monkeypatch.setattr(loops, "uvloop", None)
    with closing(new_event_loop()) as loop:
        assert isinstance(loop, asyncio.SelectorEventLoop)


async def test_it_says_where_it_listens_and_what_it_serves_and_a_signal_ends_it(capfd):
    backend = FakeBackend()
    lines = Lines(capfd)
    serving = asyncio.ensure_future(serve(CONFIG, lambda: started(backend)))
    address = (await lines.until(r"steer: listening on (\S+)\n"))[1]
    assert (await lines.until(r"steer: serving (\S+) on (\S+)\n")).groups() == ("fake", address)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0
    assert backend.closed


async def test_a_signal_lets_requests_finish_and_the_second_does_not(capfd):
    gate = Gate()
    backend = FakeBackend()
    lines = Lines(capfd)
    serving = asyncio.ensure_future(serve(CONFIG, lambda: started(backend)))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    backend.step = gate
    async with grpc.aio.insecure_channel(address) as channel:
        call = GenerationServiceStub(channel).Generate(text_request())
        await bounded(gate.reached.wait())
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        assert not serving.done()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bounded(_drain(call))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert await bounded(serving) == 0
    assert backend.closed


async def _drain(call) -> None:
    async for _ in call:
        pass


async def test_a_signal_while_the_model_loads_ends_it(capfd):
    loading = asyncio.Event()

    async def start() -> Backend:
        loading.set()
        await asyncio.Event().wait()
        raise AssertionError

    serving = asyncio.ensure_future(serve(CONFIG, start))
    await bounded(loading.wait())
    os.kill(os.getpid(), signal.SIGINT)
    assert await bounded(serving) == 0


async def test_a_model_that_does_not_load_is_the_error_of_the_command():
    async def start() -> Backend:
        raise EngineFailed("no such model", reason="START_FAILED")

    with pytest.raises(EngineFailed, match="no such model"):
        await bounded(serve(CONFIG, start))


async def test_an_engine_that_dies_too_often_is_the_error_of_the_command(capfd):
    backend = FakeBackend()
    lines = Lines(capfd)
    serving = asyncio.ensure_future(serve(replace(CONFIG, max_restarts=0), lambda: started(backend)))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await bounded(_drain(GenerationServiceStub(channel).Generate(text_request())))
    with pytest.raises(EngineFailed, match="the engine died; it was restarted 0 times"):
        await bounded(serving)
    assert backend.closed


async def test_a_restarted_engine_serves_at_the_same_address(capfd):
    backends = [FakeBackend(), FakeBackend()]
    lines, starts = Lines(capfd), iter(backends)
    serving = asyncio.ensure_future(serve(CONFIG, lambda: started(next(starts))))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    backends[0].failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await bounded(_drain(GenerationServiceStub(channel).Generate(text_request())))
        await lines.until(rf"(?s)steer: serving .*steer: serving fake on {address}\n")
        await bounded(_drain(GenerationServiceStub(channel).Generate(text_request())))
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0
    assert [backend.closed for backend in backends] == [True, True]


async def test_a_signal_while_the_engine_restarts_ends_it(capfd):
    backend, restarting, lines = FakeBackend(), asyncio.Event(), Lines(capfd)
    starts = 0

    async def start() -> Backend:
        nonlocal starts
        starts += 1
        if starts > 1:
            restarting.set()
            await asyncio.Event().wait()
        return backend

    serving = asyncio.ensure_future(serve(CONFIG, start))
    address = (await lines.until(r"steer: serving \S+ on (\S+)\n"))[1]
    backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await bounded(_drain(GenerationServiceStub(channel).Generate(text_request())))
    await bounded(restarting.wait())
    os.kill(os.getpid(), signal.SIGTERM)
    assert await bounded(serving) == 0


@pytest.mark.parametrize(
    "test",
    [
        test_it_says_where_it_listens_and_what_it_serves_and_a_signal_ends_it,
        test_a_signal_lets_requests_finish_and_the_second_does_not,
        test_a_signal_while_the_model_loads_ends_it,
        test_a_restarted_engine_serves_at_the_same_address,
        test_an_engine_that_dies_too_often_is_the_error_of_the_command,
    ],
)
def test_it_does_so_in_uvloop_too(test, capfd):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test(capfd))


@pytest.mark.parametrize(
    ("flags", "address"),
    [
        ({}, "127.0.0.1:50051"),
        ({"port": 0}, "127.0.0.1:0"),
        ({"host": "0.0.0.0"}, "0.0.0.0:50051"),
        ({"host": "::1", "port": 7}, "[::1]:7"),
        ({"host": "unix:/run/s"}, "unix:/run/s"),
        ({"uds": "/run/s"}, "unix:/run/s"),
    ],
)
def test_flags_become_an_address(flags: dict, address: str):
    namespace = argparse.Namespace(**{"host": None, "port": None, "uds": None, **flags})
    assert _address_from(namespace, ServerConfig().address) == address


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["dance"])
    assert "serve" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)
