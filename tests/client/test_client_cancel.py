"""Closing an iterator at any level ends the request at the server."""

import asyncio
from contextlib import aclosing, closing

import pytest

from steer_client import AsyncSteerClient, EngineFailed, GenerateRequest, SamplingOptions, SteerClient, TextPrompt
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import BOUND_S, Gate, Serve, Server

LONG = GenerateRequest(prompt=TextPrompt(text="hello"), sampling=SamplingOptions(max_tokens=4000))


@pytest.fixture
def held(serve: Serve) -> Server:
    """A server on which every request stops before its third token."""
    return serve(FakeBackend(step=Gate(2)))


def assert_aborted(server: Server, count: int = 1) -> None:
    server.wait_idle()
    assert (server.backend.running, server.backend.aborted, server.backend.finished) == (0, count, 0)


async def test_closing_a_stream_ends_the_request(held: Server) -> None:
    async with AsyncSteerClient(held.address) as client:
        async with aclosing(client.stream("hello")) as stream:
            await anext(stream)

        assert_aborted(held)


async def test_closing_an_event_iterator_that_was_not_read_ends_the_request(serve: Serve) -> None:
    server = serve()
    async with AsyncSteerClient(server.address) as client:
        events = client.submit(LONG)
        await anext(events)
        await events.aclose()

        assert_aborted(server)


async def test_cancelling_a_task_ends_all_requests_of_its_call(held: Server) -> None:
    async with AsyncSteerClient(held.address) as client:
        task = asyncio.create_task(client.generate(["a", "b", "c"]))
        await asyncio.to_thread(held.wait_running, 3)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert_aborted(held, 3)


async def test_a_time_limit_around_the_call_ends_the_request(held: Server) -> None:
    async with AsyncSteerClient(held.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.generate("hello")

        assert_aborted(held)


async def test_a_time_limit_around_a_stream_ends_the_request(held: Server) -> None:
    async def read() -> None:
        async with asyncio.timeout(0.3), aclosing(client.stream("hello")) as stream:
            async for _ in stream:
                pass

    async with AsyncSteerClient(held.address) as client:
        with pytest.raises(TimeoutError):
            await read()
        assert_aborted(held)


async def test_cancelling_a_task_that_reads_a_stream_ends_the_request(held: Server) -> None:
    async def read() -> None:
        async for _ in client.stream("hello"):
            pass

    async with AsyncSteerClient(held.address) as client:
        task = asyncio.create_task(read())
        await asyncio.to_thread(held.wait_running, 1)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert_aborted(held)


async def test_closing_the_client_ends_what_runs_and_says_so(held: Server) -> None:
    client = AsyncSteerClient(held.address)
    task = asyncio.create_task(client.generate("hello"))
    await asyncio.to_thread(held.wait_running, 1)

    await client.close()

    with pytest.raises(EngineFailed) as raised:
        await asyncio.wait_for(task, BOUND_S)
    assert raised.value.reason == "CLOSED"
    assert_aborted(held)


async def test_a_request_read_to_its_end_is_not_aborted(serve: Serve) -> None:
    server = serve()
    async with AsyncSteerClient(server.address) as client:
        await client.generate("hello", max_tokens=3)

    server.wait_idle()
    assert (server.backend.aborted, server.backend.finished) == (0, 1)


def test_closing_a_blocking_stream_ends_the_request(held: Server) -> None:
    with SteerClient(held.address) as client:
        with closing(client.stream("hello")) as stream:
            next(stream)

        assert_aborted(held)


def test_leaving_a_blocking_stream_ends_the_request(held: Server) -> None:
    with SteerClient(held.address) as client:
        for _ in client.stream("hello"):
            break

        assert_aborted(held)


def test_closing_the_blocking_client_ends_what_runs(held: Server) -> None:
    client = SteerClient(held.address)
    stream = client.stream("hello")
    next(stream)

    client.close()

    assert_aborted(held)
    with pytest.raises(EngineFailed):
        next(stream)
