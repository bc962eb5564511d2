"""No call hangs for ever: each has a limit of its own or of the client, and its error names both and the call."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from steer_client import (
    AsyncSteerClient,
    CaptureDelivery,
    CaptureSpec,
    DeadlineExceeded,
    InvalidRequest,
    SteerClient,
    fetch_all,
)
from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import Gate, Relay, Serve

HELD = CaptureSpec(layers=(1,), delivery=CaptureDelivery.HELD)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """The address of something that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def read(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        pass


CALLS: dict[str, Callable[[AsyncSteerClient], Awaitable[Any]]] = {
    "generate": lambda client: client.generate("hello", timeout_s=0.05),
    "chat": lambda client: client.chat(MESSAGES, timeout_s=0.05),
    "score": lambda client: client.score("a", [" b"], timeout_s=0.05),
    "stream": lambda client: read(client.stream("hello", timeout_s=0.05)),
    "stream_events": lambda client: read(client.stream_events("hello", timeout_s=0.05)),
    "tokenize": lambda client: client.tokenize("hello", timeout_s=0.05),
    "detokenize": lambda client: client.detokenize([1], timeout_s=0.05),
    "render": lambda client: client.render(MESSAGES, timeout_s=0.05),
    "load_info": lambda client: client.load_info(timeout_s=0.05),
    "server_info": lambda client: client.server_info(timeout_s=0.05),
    "connect": lambda client: AsyncSteerClient.connect(client.address, connect_timeout_s=0.05),
}


@pytest.mark.parametrize("call", CALLS)
async def test_every_call_has_a_timeout_of_its_own(call: str, silent: str) -> None:
    async with AsyncSteerClient(silent) as client:
        with pytest.raises(DeadlineExceeded) as raised:
            await CALLS[call](client)

    assert raised.value.message == f"{call} took longer than 0.05 s, the timeout_s of the call"


@pytest.mark.parametrize("call", ["tokenize", "detokenize", "render", "load_info", "server_info"])
async def test_without_one_the_client_s_counts(call: str, silent: str) -> None:
    calls: dict[str, Callable[[AsyncSteerClient], Awaitable[Any]]] = {
        "tokenize": lambda client: client.tokenize("hello"),
        "detokenize": lambda client: client.detokenize([1]),
        "render": lambda client: client.render(MESSAGES),
        "load_info": lambda client: client.load_info(),
        "server_info": lambda client: client.server_info(),
    }
    async with AsyncSteerClient(silent, unary_timeout_s=0.05) as client:
        with pytest.raises(DeadlineExceeded) as raised:
            await calls[call](client)

    assert raised.value.message == f"{call} took longer than 0.05 s, the unary_timeout_s of the client"


async def test_a_timeout_of_a_call_may_be_longer_than_the_client_s(serve: Serve) -> None:
    class Slow(FakeBackend):
        async def tokens_of(self, request: Any) -> Any:
            await asyncio.sleep(0.2)
            return await super().tokens_of(request)

    async with AsyncSteerClient(serve(Slow()).address, unary_timeout_s=0.05) as client:
        await client.load_info(timeout_s=5.0)
        assert (await client.tokenize("hello", timeout_s=5.0)).token_ids


@pytest.mark.parametrize("call", ["fetch", "fetch_rows", "fetch_all", "close"])
async def test_calls_about_captures_have_one_too(call: str, serve: Serve) -> None:
    relay = Relay(serve().address)
    async with AsyncSteerClient(relay.address) as client:
        _, [handle] = await client.generate("hello", max_tokens=1, capture=HELD)
        relay.hold()
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "fetch": lambda: handle.fetch(timeout_s=0.05),
            "fetch_rows": lambda: handle.fetch_rows(timeout_s=0.05),
            "fetch_all": lambda: fetch_all([handle], timeout_s=0.05),
            "close": lambda: handle.close(timeout_s=0.05),
        }
        with pytest.raises(DeadlineExceeded, match=f"{call} took longer than 0\\.05 s, the timeout_s of the call"):
            await calls[call]()
        relay.let_go()
        await handle.close()
    relay.close()


async def test_a_server_that_is_silent_ends_a_generation_without_a_timeout(silent: str) -> None:
    async with AsyncSteerClient(silent, silence_timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded, match=r"sent neither .* for 0\.1 s, the silence_timeout_s") as raised:
            await client.generate("hello")

    assert raised.value.reason == "SERVER_SILENT"


async def test_a_task_in_which_something_failed_before_is_told_of_a_silent_server(silent: str) -> None:
    async with AsyncSteerClient(silent, silence_timeout_s=0.1) as client:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                await client.generate(["hello", "you"])
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:  # before Python 3.13 it leaves a cancel of this task
                group.create_task(client.generate("hello", max_tokens=-1))
        with pytest.raises(DeadlineExceeded) as raised:
            await read(client.stream("hello"))
    assert raised.value.reason == "SERVER_SILENT"


async def test_a_program_that_holds_up_its_event_loop_does_not_make_the_server_silent(serve: Serve) -> None:
    reached, opened = threading.Event(), threading.Event()

    async def step(number: int) -> None:
        if number == 1:
            reached.set()
            await asyncio.to_thread(opened.wait, 10)

    async with AsyncSteerClient(serve(FakeBackend(step=step)).address, silence_timeout_s=2) as client:
        running = asyncio.ensure_future(client.generate("hello", max_tokens=3))
        assert await asyncio.to_thread(reached.wait, 10)
        threading.Event().wait(2.2)  # work of the caller in the event loop
        opened.set()
        texts, _ = await asyncio.wait_for(running, 10)

    assert texts


async def test_a_fetch_from_a_silent_server_ends(serve: Serve) -> None:
    relay = Relay(serve().address)
    async with AsyncSteerClient(relay.address, silence_timeout_s=0.1) as client:
        _, [handle] = await client.generate("hello", max_tokens=1, capture=HELD)
        relay.hold()
        with pytest.raises(DeadlineExceeded, match=r"fetch: the server at .* for 0\.1 s"):
            await handle.fetch()
        relay.let_go()
        await handle.close()
    relay.close()


async def test_heartbeats_keep_a_long_generation(serve: Serve) -> None:
    """A long prefill, or a wait for a place, is not silence."""
    gate = Gate(1)
    server = serve(FakeBackend(step=gate), heartbeat_s=0.02)
    async with AsyncSteerClient(server.address, silence_timeout_s=1) as client:
        call = asyncio.create_task(client.generate("hello", max_tokens=2))
        done, _ = await asyncio.wait([call], timeout=2)  # twice the limit
        assert not done
        call.cancel()
        await asyncio.wait([call])


async def test_a_reader_that_takes_its_time_is_not_a_silent_server(serve: Serve) -> None:
    async with AsyncSteerClient(serve().address, silence_timeout_s=1) as client:
        texts = []
        async for text in client.stream("hello", max_tokens=2):
            await asyncio.sleep(1.1)  # longer than the limit
            texts.append(text)

    assert len(texts) == 2


def test_the_blocking_client_has_the_same_timeouts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with SteerClient(f"127.0.0.1:{listener.getsockname()[1]}") as client:
            with pytest.raises(DeadlineExceeded, match="tokenize took longer than"):
                client.tokenize("hello", timeout_s=0.05)
            with pytest.raises(DeadlineExceeded, match="generate took longer than"):
                client.generate(["hello"], timeout_s=0.05)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1"])
async def test_what_is_no_timeout_is_refused(value: Any) -> None:
    client = AsyncSteerClient()
    with pytest.raises(InvalidRequest, match="timeout_s"):
        await client.tokenize("hello", timeout_s=value)
    with pytest.raises(InvalidRequest, match="silence_timeout_s"):
        AsyncSteerClient(silence_timeout_s=value)
