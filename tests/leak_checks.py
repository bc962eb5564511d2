"""Checks that nothing leaks: servers and clients are killed, what stays is counted, and the others go on."""

import asyncio
import gc
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureHandle, SteerError
from steer_service.shm.instances import PREFIX
from tests.oracles import Oracle
from tests.processes import MANY_CYCLES_S, Process, report, segments, until
from tests.raw_client import RawClient
from tests.shm_clients import captured, check, prompt_of

FREED_S = 5.0
"""Seconds within which what a dead client held is free."""
CLEAN_S = 2.0
"""Seconds after a restart in which nothing of the server before may be left."""
RSS_GROWTH = 1.02
CLIENTS = 10
"""Clients that capture at once, or are killed in one wave."""


@dataclass(frozen=True)
class Footprint:
    """What a process has."""

    rss: int
    descriptors: int

    @classmethod
    def of(cls, process: psutil.Process) -> Self:
        return cls(process.memory_info().rss, process.num_fds())


async def cycles_leave_nothing(
    servers: Sequence[psutil.Process], address: str, folder: Path, oracle: Oracle, *, warm_up: int, count: int
) -> None:
    """After some cycles to warm up, `count` more: the server's processes and the client stay as they are."""
    async with Process.start("tests.shm_clients", "cycle", oracle.name, address, str(folder)) as client:
        measured = (*servers, client.about)
        assert await client.ask(warm_up, MANY_CYCLES_S) == str(warm_up)
        before = [Footprint.of(process) for process in measured]
        start = time.monotonic()
        assert await client.ask(count, MANY_CYCLES_S) == str(count)
        seconds = time.monotonic() - start
        after = [Footprint.of(process) for process in measured]

        assert segments(folder) == set()
        growth = [now.rss / then.rss - 1 for now, then in zip(after, before, strict=True)]
        said = ", ".join(f"{one:+.2%}" for one in growth)
        report(f"{count} cycles in {seconds:.1f} s; RSS of servers, client {said}; {after}")
        assert [now.descriptors for now in after] == [then.descriptors for then in before]
        assert max(growth) <= RSS_GROWTH - 1


def plant_foreign_files(folder: Path) -> Callable[[], None]:
    """Files of others, and a check that nobody touched them."""
    (folder / "foreign").write_bytes(b"another's")
    (folder / f"{PREFIX}0123456789abcdef-foreign").write_bytes(b"of nobody known")
    (folder / f"{PREFIX}link-foreign").symlink_to(folder / "foreign")

    def seen() -> dict[str, Any]:
        return {
            path.name: (os.lstat(path).st_ino, os.lstat(path).st_mtime_ns, path.read_bytes())
            for path in folder.iterdir()
            if path.name.endswith("foreign")
        }

    before = seen()
    assert len(before) == 3

    def check_untouched() -> None:
        assert seen() == before

    return check_untouched


DROPPED = pytest.mark.filterwarnings("ignore:the captures of request .* were never closed:ResourceWarning")
"""For tests that cancel clients in the middle of a capture: nobody is left to close its handle."""


class Load:
    """Clients in this process that capture, read, keep and release until they are stopped or the server dies."""

    def __init__(self, address: str, folder: Path, oracle: Oracle, seed: int, count: int = 3) -> None:
        self.done = 0
        self.failures: list[SteerError] = []
        self._address, self._folder, self._oracle = address, folder, oracle
        self._tasks = [asyncio.ensure_future(self._run(random.Random(seed * 100 + one), one)) for one in range(count)]

    async def _run(self, dice: random.Random, one: int) -> None:
        kept: list[CaptureHandle] = []
        async with AsyncSteerClient(self._address, shm_dir=str(self._folder)) as client:
            try:
                while True:
                    prompt = prompt_of(one, self.done)
                    kept.append(await captured(client, prompt))
                    await check(kept[-1], prompt, self._oracle)
                    self.done += 1
                    if dice.random() < 0.7:
                        await kept.pop(dice.randrange(len(kept))).close()
            except SteerError as error:
                self.failures.append(error)
            finally:
                for handle in kept:
                    handle.mark_closed()  # the server is dead or frees them itself; nobody warns

    async def stop(self) -> None:
        """Ends them; raises what one of them met besides a server that is gone."""
        for task in self._tasks:
            task.cancel()
        for end in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end
        self._tasks.clear()
        gc.collect()  # of a client that was cancelled in a capture: its handle warns now, in the test that expects it


async def killed_under_load(
    kill: Callable[[], Awaitable[None]], address: str, folder: Path, oracle: Oracle, dice: random.Random
) -> int:
    """Kills the server at a random point of what some clients do; returns how many segments it left."""
    load = Load(address, folder, oracle, dice.randrange(1000))
    try:
        point = dice.randrange(60)
        await until(lambda: load.done >= point)
        for _ in range(dice.randrange(50)):
            await asyncio.sleep(0)
        await kill()
        return len(segments(folder))
    finally:
        await load.stop()
        assert {error.reason for error in load.failures} <= {"CONNECTION_LOST", "UNREACHABLE", "CAPTURE_LOST"}


class Victims:
    """Clients in processes of their own, which say what they have done."""

    def __init__(self, parent: Process) -> None:
        self._parent = parent
        self.steps: Counter[int] = Counter()
        self.pids: dict[int, int] = {}
        self._listening = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        while words := [int(word) for word in (await self._parent.line()).split()]:
            if len(words) == 2:
                self.pids[words[0]] = words[1]
            else:
                self.steps[words[0]] += 1

    async def kill_at(self, seed: int, point: int) -> None:
        """Starts a client and kills it once it has taken `point` steps."""
        self._parent.tell(seed)
        await until(lambda: seed in self.pids and self.steps[seed] >= point)
        os.kill(self.pids[seed], 9)

    async def stop(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)


@asynccontextmanager
async def victims(address: str, folder: Path, oracle: Oracle) -> AsyncIterator[Victims]:
    async with Process.start("tests.shm_clients", "fork", oracle.name, address, str(folder)) as parent:
        those = Victims(parent)
        try:
            yield those
        finally:
            await those.stop()


async def killed_clients_are_freed(
    address: str,
    folder: Path,
    oracle: Oracle,
    kills: int,
    settled: Callable[[], Awaitable[None]],
) -> None:
    """Kills clients at random points; a client that lives keeps three captures, and one that captures meets no error.

    `settled` is awaited after each wave, when nothing but the three captures is left.
    """
    dice, seconds, met = random.Random(4), [], 0
    async with (
        AsyncSteerClient(address, shm_dir=str(folder)) as survivor,
        victims(address, folder, oracle) as those,
    ):
        kept = [await captured(survivor, prompt_of(number)) for number in range(3)]
        mine = segments(folder)
        assert len(mine) == 3
        for first in range(0, kills, CLIENTS):
            wave = range(first, min(first + CLIENTS, kills))
            others = Load(address, folder, oracle, first, count=1)
            await asyncio.gather(*(those.kill_at(seed, dice.randrange(1, 40)) for seed in wave))
            met += len(segments(folder) - mine)
            assert others.failures == []
            await others.stop()
            seconds.append(await until(lambda: segments(folder) == mine, FREED_S))
            await settled()
        for number, handle in enumerate(kept):
            await check(handle, prompt_of(number), oracle)
            await handle.close()
    report(f"{kills} kills of clients, {met} segments met; freed within {max(seconds):.2f} s")
    assert met > 0, "no kill met a segment"
    assert segments(folder) == set()


async def captures_at_once_are_solo_captures(address: str, folder: Path, oracle: Oracle, each: int) -> None:
    """So many captures of each client, all under way and then all held at once: each is right and its owner's alone."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncSteerClient(address, shm_dir=str(folder))) for _ in range(CLIENTS)
        ]
        start = time.monotonic()
        handles = await asyncio.gather(
            *(
                captured(client, prompt_of(one, number), delivery_of(number))
                for one, client in enumerate(clients)
                for number in range(each)
            )
        )
        report(f"{len(handles)} captures at once in {time.monotonic() - start:.1f} s")
        held = segments(folder)
        assert len(held) == len(handles) == CLIENTS * each

        await refused_to_strangers(stack, address, handles)
        for index, handle in enumerate(handles):
            await check(handle, prompt_of(*divmod(index, each)), oracle)
        assert segments(folder) == held, "a stranger released something"
        await asyncio.gather(*(handle.close() for handle in handles))
        assert segments(folder) == set()


def delivery_of(number: int) -> CaptureDelivery:
    return CaptureDelivery.SHARED_MEMORY_REQUIRED if number % 2 else CaptureDelivery.HELD


async def refused_to_strangers(stack: AsyncExitStack, address: str, handles: list[CaptureHandle]) -> None:
    """Every key is tried by one who does not own it: fetching is NOT_FOUND, releasing does nothing."""
    stranger = RawClient(await stack.enter_async_context(grpc.aio.insecure_channel(address)), "stranger")

    async def attempt(handle: CaptureHandle) -> grpc.StatusCode:
        key = key_of(handle)
        await stranger.release(key.encode())
        return await stranger.fetch(key)

    codes = Counter(await in_turns(attempt(handle) for handle in handles))
    report(f"{len(handles)} foreign attempts to fetch: {dict(codes)}")
    assert codes == {grpc.StatusCode.NOT_FOUND: len(handles)}


def key_of(handle: CaptureHandle) -> str:
    held = handle._held
    return held._request.lease_token.decode() if hasattr(held, "_request") else held._id  # type: ignore[attr-defined]


async def in_turns(attempts: Iterator[Awaitable[grpc.StatusCode]]) -> list[grpc.StatusCode]:
    room = asyncio.Semaphore(50)

    async def one(attempt: Awaitable[grpc.StatusCode]) -> grpc.StatusCode:
        async with room:
            return await attempt

    return await asyncio.gather(*(one(attempt) for attempt in attempts))
