"""Shared memory through the public surface: whatever dies, whenever, nothing of it stays and nobody else notices.

The server and the clients that are measured or killed are processes; only those started here are ended, by their
number.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureHandle, SteerError
from steer_service.core.fake import FAKE_MODEL
from steer_service.shm.instances import PREFIX
from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.shm_clients import LAYERS, TOKENS, captured, check, prompt_of, solo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BOUND_S = 60.0
"""Seconds within which whatever is waited for must happen, where nothing less is promised."""
MANY_CYCLES_S = 900.0
FREED_S = 5.0
"""Seconds within which what a dead client held is free."""
CLEAN_S = 2.0
"""Seconds after a restart in which nothing of the server before may be left."""
RSS_GROWTH = 1.02
CHALLENGE_BYTES = 32


class Process:
    """A process that was started here and answers in lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.about = psutil.Process(process.pid)

    @classmethod
    @asynccontextmanager
    async def start(cls, module: str, *arguments: str) -> AsyncIterator[Self]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            started = cls(process)
            assert await started.line() == "loaded"
            yield started
        finally:
            await started.end()

    async def line(self, bound_s: float = BOUND_S) -> str:
        assert self._process.stdout is not None
        return (await asyncio.wait_for(self._process.stdout.readline(), bound_s)).decode().strip()

    def tell(self, line: object = "") -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def ask(self, line: object = "") -> str:
        self.tell(line)
        return await self.line()

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Ends it in order, or at once if that takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.communicate(), BOUND_S)
        except TimeoutError:
            await self.kill()
            raise

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and self.about.is_running()


@asynccontextmanager
async def loaded_server(folder: Path, together: int = 0) -> AsyncIterator[Process]:
    """A server that listens as soon as it is told a line."""
    async with Process.start("tests.shm_server", str(folder), str(together)) as server:
        yield server


@asynccontextmanager
async def serving(folder: Path, together: int = 0) -> AsyncIterator[tuple[Process, str]]:
    """A server and its address."""
    async with loaded_server(folder, together) as server:
        yield server, await server.ask()


async def facts(server: Process) -> dict[str, int]:
    answer: dict[str, int] = json.loads(await server.ask())
    return answer


NOTHING = {"running": 0, "holding": 0, "bytes": 0}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="test-") as name:
        yield Path(name)


def segments(folder: Path) -> set[str]:
    """Names of segments with rows; nonces, which end by themselves, are left out."""
    found = set()
    for entry in os.scandir(folder):
        if entry.name.startswith(PREFIX) and not entry.name.endswith("-foreign"):
            try:
                if entry.stat().st_size != CHALLENGE_BYTES:
                    found.add(entry.name)
            except FileNotFoundError:
                pass
    return found


async def until(is_so: Callable[[], bool], bound_s: float = BOUND_S) -> float:
    """Seconds until it was so; fails after `bound_s`."""
    start = time.monotonic()
    async with asyncio.timeout(bound_s):
        while not is_so():
            await asyncio.sleep(0.002)
    return time.monotonic() - start


def report(said: str) -> None:
    print(f"\n[hygiene] {said}")


# -- (a) many cycles -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What a process has."""

    rss: int
    descriptors: int

    @classmethod
    def of(cls, process: Process) -> Self:
        return cls(process.about.memory_info().rss, process.about.num_fds())


@pytest.mark.parametrize(("warm_up", "count"), [(1000, 1500), pytest.param(1000, 10_000, marks=pytest.mark.thorough)])
async def test_cycles_of_capture_hand_over_and_release_leave_nothing(warm_up: int, count: int, folder: Path) -> None:
    async with (
        serving(folder) as (server, address),
        Process.start("tests.shm_clients", "cycle", address, str(folder)) as client,
    ):
        both = (server, client)
        assert await client.ask(warm_up) == str(warm_up)
        before = [Footprint.of(process) for process in both]
        start = time.monotonic()
        client.tell(count)
        assert await client.line(MANY_CYCLES_S) == str(count)
        seconds = time.monotonic() - start
        after = [Footprint.of(process) for process in both]

        assert segments(folder) == set()
        assert await facts(server) == NOTHING
        growth = [now.rss / then.rss - 1 for now, then in zip(after, before, strict=True)]
        report(f"{count} cycles in {seconds:.1f} s; RSS of server, client {growth[0]:+.2%}, {growth[1]:+.2%}; {after}")
        assert [now.descriptors for now in after] == [then.descriptors for then in before]
        assert max(growth) <= RSS_GROWTH - 1
    assert os.listdir(folder) == []


# -- (b) the server is killed ----------------------------------------------------------------------------------------


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


class Load:
    """Clients in this process that capture, read, keep and release until they are stopped or the server dies."""

    def __init__(self, address: str, folder: Path, seed: int, count: int = 3) -> None:
        self.done = 0
        self.failures: list[SteerError] = []
        self._address, self._folder = address, folder
        self._tasks = [asyncio.ensure_future(self._run(random.Random(seed * 100 + one), one)) for one in range(count)]

    async def _run(self, dice: random.Random, one: int) -> None:
        kept: list[CaptureHandle] = []
        async with AsyncSteerClient(self._address, shm_dir=str(self._folder)) as client:
            try:
                while True:
                    prompt = prompt_of(one, self.done)
                    kept.append(await captured(client, prompt))
                    await check(kept[-1], prompt)
                    self.done += 1
                    if dice.random() < 0.7:
                        await kept.pop(dice.randrange(len(kept))).close()
            except SteerError as error:
                self.failures.append(error)
            finally:
                for handle in kept:
                    handle._closed = True  # the server is dead or frees them itself; nobody warns

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def killed_under_load(server: Process, address: str, folder: Path, dice: random.Random) -> int:
    """Kills the server at a random point of what some clients do; returns how many segments it left."""
    load = Load(address, folder, dice.randrange(1000))
    try:
        point = dice.randrange(60)
        await until(lambda: load.done >= point)
        for _ in range(dice.randrange(50)):
            await asyncio.sleep(0)
        await server.kill()
        return len(segments(folder))
    finally:
        await load.stop()
        assert {error.reason for error in load.failures} <= {"CONNECTION_LOST", "UNREACHABLE", "CAPTURE_LOST"}


@pytest.mark.parametrize("kills", [20, pytest.param(50, marks=pytest.mark.thorough)])
async def test_a_server_that_was_killed_leaves_nothing_once_another_listens(kills: int, folder: Path) -> None:
    dice, left, seconds = random.Random(4), [], []
    check_foreign_files = plant_foreign_files(folder)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(loaded_server(folder))
        address = await server.ask()
        for _ in range(kills):
            following = await stack.enter_async_context(loaded_server(folder))  # what takes time is to load
            left.append(await killed_under_load(server, address, folder, dice))
            start = time.monotonic()
            following.tell()
            await until(lambda: not segments(folder), CLEAN_S)
            seconds.append(time.monotonic() - start)
            check_foreign_files()
            server, address = following, await following.line()
    report(
        f"{kills} kills of the server left {sum(left)} segments, at most {max(left)} at once; "
        f"the next removed them within {max(seconds):.2f} s"
    )
    assert sum(left) > 0, "no kill met a segment"
    check_foreign_files()
    assert {name for name in os.listdir(folder) if not name.endswith("foreign")} == set()


# -- (c) clients are killed ------------------------------------------------------------------------------------------


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
async def victims(address: str, folder: Path) -> AsyncIterator[Victims]:
    async with Process.start("tests.shm_clients", "fork", address, str(folder)) as parent:
        those = Victims(parent)
        try:
            yield those
        finally:
            await those.stop()


@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.thorough)])
async def test_what_killed_clients_held_is_freed_and_others_go_on(kills: int, folder: Path) -> None:
    dice, seconds, met, wave = random.Random(4), [], 0, 10
    async with (
        serving(folder) as (server, address),
        AsyncSteerClient(address, shm_dir=str(folder)) as survivor,
        victims(address, folder) as those,
    ):
        kept = [await captured(survivor, prompt_of(number)) for number in range(3)]
        mine = segments(folder)
        assert len(mine) == 3
        for first in range(0, kills, wave):
            others = Load(address, folder, first, count=1)
            await asyncio.gather(*(those.kill_at(seed, dice.randrange(1, 40)) for seed in range(first, first + wave)))
            met += len(segments(folder) - mine)
            assert others.failures == []
            await others.stop()
            seconds.append(await until(lambda: segments(folder) == mine, FREED_S))
            holding = await until_facts(server, {"running": 0, "holding": 3}, FREED_S)
            assert holding["bytes"] > 0
        for number, handle in enumerate(kept):
            await check(handle, prompt_of(number))
            await handle.close()
        report(f"{kills} kills of clients, {met} segments met; freed within {max(seconds):.2f} s")
        assert met > 0, "no kill met a segment"
        assert await facts(server) == NOTHING
        assert segments(folder) == set()


async def until_facts(server: Process, wanted: dict[str, int], bound_s: float) -> dict[str, int]:
    async with asyncio.timeout(bound_s):
        while True:
            found = await facts(server)
            if wanted.items() <= found.items():
                return found


# -- (d) clients misuse what they were given -------------------------------------------------------------------------


class RawClient:
    """A client that speaks the contract without this project's client."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.captures, self.generation = CaptureServiceStub(channel), GenerationServiceStub(channel)
        self.metadata = (("steer-client-id", name),)

    @asynccontextmanager
    async def session(self, folder: Path) -> AsyncIterator[bytes]:
        challenge = await self.captures.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=self.metadata)
        nonce = (folder / challenge.segment_name).read_bytes()
        call = self.captures.ConfirmSharedMemory(
            capture_pb2.ConfirmSharedMemoryRequest(challenge_token=challenge.challenge_token, nonce=nonce),
            metadata=self.metadata,
        )
        yield (await call.read()).session_token
        call.cancel()

    async def region(self, session: bytes, prompt: tuple[int, ...]) -> capture_pb2.SharedMemoryRegion:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.SamplingOptions(max_tokens=TOKENS),
            capture=capture_pb2.CaptureSpec(
                layers=LAYERS,
                delivery=capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
                shared_memory_session=session,
            ),
        )
        responses = [one async for one in self.generation.Generate(request, metadata=self.metadata)]
        return next(one.capture_shm for one in responses if one.WhichOneof("event") == "capture_shm")

    async def fetch(self, capture_id: str) -> grpc.StatusCode:
        call = self.captures.FetchCapture(
            capture_pb2.FetchCaptureRequest(capture_id=capture_id), metadata=self.metadata
        )
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def release(self, token: bytes) -> None:
        await self.captures.ReleaseCapture(capture_pb2.ReleaseCaptureRequest(lease_token=token), metadata=self.metadata)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: os.truncate(path, 0), id="truncates"),
        pytest.param(os.unlink, id="unlinks"),
        pytest.param(lambda path: path.write_bytes(b"x" * 10_000), id="overwrites"),
    ],
)
async def test_a_client_that_harms_its_segment_harms_nobody_else(harm: Callable[[Path], object], folder: Path) -> None:
    async with serving(folder) as (server, address), grpc.aio.insecure_channel(address) as channel:
        vandal = RawClient(channel, "vandal")
        async with (
            vandal.session(folder) as session,
            AsyncSteerClient(address, shm_dir=str(folder)) as client,
        ):
            before = await captured(client, prompt_of(1))
            region = await vandal.region(session, prompt_of(2))
            harm(folder / region.segment_name)

            # Not even its owner can make the server read what somebody else may have shortened.
            assert await vandal.fetch(region.lease_token.decode()) == grpc.StatusCode.NOT_FOUND
            await check(before, prompt_of(1))
            async with await captured(client, prompt_of(3)) as after:
                await check(after, prompt_of(3))
            await vandal.release(region.lease_token)
            await vandal.region(session, prompt_of(4))
            await before.close()
        await until_facts(server, NOTHING, FREED_S)
        assert segments(folder) == set()
        assert server.is_alive


# -- (e) many at once ------------------------------------------------------------------------------------------------


async def test_a_thousand_captures_at_once_are_each_its_solo_capture_and_nobody_else_s(folder: Path) -> None:
    clients_count, each = 10, 100
    async with serving(folder, together=clients_count * each) as (server, address), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncSteerClient(address, shm_dir=str(folder)))
            for _ in range(clients_count)
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
        assert (await facts(server))["holding"] == len(handles) == 1000

        await refused_to_strangers(stack, address, handles)
        for index, handle in enumerate(handles):
            await check(handle, prompt_of(*divmod(index, each)))
        assert (await facts(server))["holding"] == 1000, "a stranger released something"
        await asyncio.gather(*(handle.close() for handle in handles))
        assert await facts(server) == NOTHING
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


def test_solo_captures_of_different_prompts_differ() -> None:
    rows = {solo(prompt_of(one, number), 1).tobytes() for one in range(10) for number in range(100)}

    assert len(rows) == 1000
    assert FAKE_MODEL.vocab_size > 100
