"""The channels of a client: one for each event loop, whatever threads the loops are in."""

import asyncio
import threading

import grpc
import pytest

from steer_client import InvalidRequest
from steer_client.channel import ClientConfig, LoopChannels, random_client_id

LIMIT_S = 10
HELD_UP_S = 0.2
"""Seconds for which a thread that must wait is given the chance not to."""


class Watched(asyncio.SelectorEventLoop):
    """A loop that tells when somebody looks whether it is closed, and then lets another thread run first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()
        self.others_done = threading.Event()

    def is_closed(self) -> bool:
        if threading.current_thread().name == "first":
            self.seen.set()
            self.others_done.wait(HELD_UP_S)
        return super().is_closed()


async def others_end() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


def test_a_token_that_was_read_from_a_file_loses_its_line_end() -> None:
    assert ClientConfig.of("localhost:1", {"token": "abc\r\n"}).token == "abc"
    with pytest.raises(InvalidRequest, match="without spaces and line ends"):
        ClientConfig.of("localhost:1", {"token": "a\nb"})


def test_two_threads_that_connect_at_once_each_keep_their_channel() -> None:
    channels = LoopChannels(ClientConfig(client_id=random_client_id()))
    kept: dict[str, bool] = {}

    async def connect() -> grpc.aio.Channel:
        return channels.for_running_loop()

    async def connect_twice(watched: Watched) -> None:
        channel = await connect()
        if threading.current_thread().name == "second":
            watched.others_done.set()
        both.wait(LIMIT_S)
        kept[threading.current_thread().name] = channel is await connect()
        both.wait(LIMIT_S)
        if threading.current_thread().name == "second":
            await channels.close()
        both.wait(LIMIT_S)
        await asyncio.sleep(0)  # the loop of the other thread begins to close its channel, and then has done so

    def second(watched: Watched) -> None:
        assert watched.seen.wait(LIMIT_S)
        asyncio.run(connect_twice(watched))

    both = threading.Barrier(2)
    known = Watched()
    try:
        known.run_until_complete(connect())
        threads = [
            threading.Thread(target=lambda: asyncio.run(connect_twice(known)), name="first"),
            threading.Thread(target=second, args=(known,), name="second"),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        known.run_until_complete(asyncio.sleep(0))
        known.run_until_complete(others_end())
    finally:
        known.close()

    assert kept == {"first": True, "second": True}
