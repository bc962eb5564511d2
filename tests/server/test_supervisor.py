"""An engine that dies is started again, within a limit, and clients are told so."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.server.supervisor import Supervisor, pause_s
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import info_pb2
from steer_service.wire.status_codes import error_from_rpc
from tests.arena import Arena
from tests.server.capture_client import Client
from tests.server.served import Gate, Served, bounded, text_request


class Mortal(FakeBackend):
    lives = True

    @property
    def is_alive(self) -> bool:
        return self.lives


class Starts:
    """Starts backends, each when the test lets it; by number, some starts fail or return other backends."""

    def __init__(self, **backend: Any) -> None:
        self.backends: list[Mortal] = []
        self.begun = 0
        self.failures: dict[int, Exception] = {}
        self.others: dict[int, FakeBackend] = {}
        self.open = asyncio.Event()
        self.open.set()
        self._backend = backend

    async def __call__(self) -> Backend:
        number, self.begun = self.begun, self.begun + 1
        await self.open.wait()
        if number in self.failures:
            raise self.failures[number]
        if number in self.others:
            return self.others[number]
        self.backends.append(Mortal(**self._backend))
        return self.backends[-1]


class Supervised:
    """A supervised server, a client of it, and the backends that it began to serve."""

    def __init__(self, served: Served, starts: Starts) -> None:
        self.served = served
        self.starts = starts
        self.serving: asyncio.Queue[Backend] = asyncio.Queue()
        self.running = asyncio.ensure_future(Supervisor(served.server, starts, 0.0).run(self.serving.put_nowait))

    async def next_serving(self) -> Mortal:
        return await bounded(self.serving.get())

    async def kill(self) -> None:
        self.starts.backends[-1].lives = False
        await bounded(self.served.server.engine_died.wait())


@asynccontextmanager
async def supervised(starts: Starts, **config: Any) -> AsyncIterator[Supervised]:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0, **config))
    await server.listen()
    async with grpc.aio.insecure_channel(server.address) as channel:
        one = Supervised(Served(server, None, channel), starts)
        try:
            yield one
        finally:
            one.running.cancel()
            await asyncio.wait((one.running,))
            await bounded(server.drain())


async def test_the_death_of_an_engine_and_its_restart_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with supervised(Starts()) as one:
        await one.next_serving()
        await one.kill()
        await one.next_serving()
        lines = [
            (record.levelname, record.event, record.fields) for record in caplog.records if "event" in vars(record)
        ]
    assert lines == [
        ("ERROR", "engine_died", {"requests": 0}),
        ("WARNING", "engine_restart", {"reason": "ENGINE_DIED"}),
    ]


async def test_an_engine_that_dies_is_replaced_and_its_streams_end_at_once() -> None:
    gate, starts = Gate(), Starts()
    async with supervised(starts) as one:
        first = await one.next_serving()
        first.step = gate
        streams = [asyncio.ensure_future(one.served.failure(text_request())) for _ in range(8)]
        await bounded(gate.reached.wait())
        starts.open.clear()
        await one.kill()
        failures = await bounded(asyncio.gather(*streams))
        errors = [error_from_rpc(failure) for failure in failures]
        assert {failure.code() for failure in failures} == {grpc.StatusCode.UNAVAILABLE}
        assert {error.reason for error in errors} == {"ENGINE_DIED"}
        assert all(error.retry_after_s for error in errors)
        assert (first.aborted, first.running) == (8, 0)

        assert set((await one.served.statuses()).values()) == {"NOT_SERVING"}
        refused = await one.served.failure(text_request())
        assert refused.code() == grpc.StatusCode.UNAVAILABLE
        assert error_from_rpc(refused).reason == "ENGINE_RESTARTING"
        assert error_from_rpc(refused).retry_after_s

        starts.open.set()
        second = await one.next_serving()
        assert set((await one.served.statuses()).values()) == {"SERVING"}
        assert (await one.served.generate(text_request()))[-1].HasField("completed")
        assert first.closed
        assert not second.closed
        assert len(second.requests) == 2  # the warm-up and ours


async def test_the_retry_delay_is_the_rest_of_what_the_last_start_took() -> None:
    starts = Starts()
    async with supervised(starts, retry_after_s=0.5) as one:
        await one.next_serving()
        starts.open.clear()
        one.served.server.restart_s = 40.0
        await one.kill()
        early = error_from_rpc(await one.served.failure(text_request())).retry_after_s
        assert 20.0 < early <= 40.0
        one.served.server.restart_s = 0.0
        assert error_from_rpc(await one.served.failure(text_request())).retry_after_s == 0.5
        starts.open.set()


async def test_a_request_that_meets_the_dead_engine_first_has_the_retry_delay_too() -> None:
    starts = Starts()
    async with supervised(starts, retry_after_s=3.0) as one:
        backend = await one.next_serving()
        backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
        error = error_from_rpc(await one.served.failure(text_request()))
        assert (error.reason, error.retry_after_s) == ("ENGINE_DIED", 3.0)
        await one.next_serving()


async def test_an_engine_that_dies_too_often_ends_the_server() -> None:
    starts = Starts()
    async with supervised(starts, max_restarts=2) as one:
        for _ in range(2):
            await one.next_serving()
            await one.kill()
        await one.next_serving()
        starts.backends[-1].lives = False
        with pytest.raises(EngineFailed, match=r"the engine died; it was restarted 2 times within 600 s, at most 2"):
            await bounded(one.running)
        assert [backend.closed for backend in starts.backends] == [True] * 3


async def test_restarts_outside_the_window_are_not_counted() -> None:
    starts = Starts()
    async with supervised(starts, max_restarts=1, restart_window_s=0.0) as one:
        for _ in range(4):
            await one.next_serving()
            await one.kill()
        await one.next_serving()


async def test_a_restart_that_fails_is_tried_again() -> None:
    starts = Starts()
    starts.failures = {1: EngineFailed("no memory", reason="START_FAILED")}
    async with supervised(starts) as one:
        await one.next_serving()
        await one.kill()
        await one.next_serving()
        assert starts.begun == 3


@pytest.mark.parametrize(
    ("error", "begun"),
    [
        (EngineFailed("no memory", reason="START_FAILED"), 3),
        (InvalidRequest("no such model"), 2),
    ],
)
async def test_restarts_that_keep_failing_end_the_server_with_their_reason(error: Exception, begun: int) -> None:
    starts = Starts()
    starts.failures = {1: error, 2: error}
    async with supervised(starts, max_restarts=2) as one:
        await one.next_serving()
        await one.kill()
        with pytest.raises(type(error), match=str(error)):
            await bounded(one.running)
        assert starts.begun == begun


async def test_a_first_start_that_fails_is_not_tried_again() -> None:
    starts = Starts()
    starts.failures = {0: EngineFailed("no memory", reason="START_FAILED")}
    async with supervised(starts) as one:
        with pytest.raises(EngineFailed, match="no memory"):
            await bounded(one.running)
        assert starts.begun == 1


async def test_a_new_engine_that_cannot_generate_is_closed_and_replaced() -> None:
    class Broken(Mortal):
        async def submit(self, request: Any) -> Any:
            raise EngineFailed("the engine died", reason="ENGINE_DIED")
            yield

    starts = Starts()
    starts.others = {1: Broken()}
    async with supervised(starts) as one:
        await one.next_serving()
        await one.kill()
        await one.next_serving()
        assert starts.others[1].closed


def test_pauses_between_restarts_grow_to_a_limit() -> None:
    assert [pause_s(earlier, 1.0) for earlier in range(6)] == [0.0, 1.0, 2.0, 4.0, 8.0, 8.0]


async def test_held_captures_survive_the_engine(tmp_path: Any) -> None:
    arena = Arena(tmp_path)
    starts = Starts(place=arena)
    async with supervised(starts, shm_dir=str(arena.folder)) as one:
        await one.next_serving()
        client = Client(one.served, "alice")
        held = await client.held()
        before = await client.fetch(held.capture_id)
        await one.kill()
        assert await client.fetch(held.capture_id) == before
        await one.next_serving()
        assert await client.fetch(held.capture_id) == before
    assert arena.pool.reserved_bytes == 0


async def test_the_server_is_the_same_one_after_a_restart() -> None:
    starts = Starts()
    async with supervised(starts) as one:
        await one.next_serving()
        before = await bounded(one.served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
        await one.kill()
        await one.next_serving()
        assert await bounded(one.served.info.GetServerInfo(info_pb2.GetServerInfoRequest())) == before


async def test_a_request_that_learns_late_of_a_death_does_not_end_the_next_engine() -> None:
    class Late(Mortal):
        closed_late = asyncio.Event()

        async def submit(self, request: Any) -> Any:
            try:
                async for event in super().submit(request):
                    yield event
            finally:
                if request.request_id != "warm-up":
                    await self.closed_late.wait()
                    raise EngineFailed("the engine died", reason="ENGINE_DIED")

    gate, starts = Gate(), Starts()
    starts.others = {0: Late(step=gate)}
    async with supervised(starts) as one:
        gate.opened.set()
        first = await one.next_serving()
        gate.opened.clear()
        late = asyncio.ensure_future(one.served.failure(text_request()))
        await bounded(gate.reached.wait())
        first.lives = False
        await one.next_serving()
        Late.closed_late.set()
        assert error_from_rpc(await bounded(late)).reason == "ENGINE_DIED"
        await one.served.server.drain()
        assert starts.begun == 2
        assert not one.served.server.engine_died.is_set()
