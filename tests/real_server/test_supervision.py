"""Engines that die or hang under a real server: who notices, how soon, and what serves afterwards."""

import asyncio
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2

from steer_client import AsyncSteerClient, CaptureSpec
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.handle import CaptureHandle
from tests.processes import report
from tests.real_server.serving import Server, ask, error_of_a_generation, health_of, run, running_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ENDED_S = 1.0
"""Seconds within which the death of the engine ends every stream and turns health off."""
FOUND_S = 15.0
"""Seconds within which a stopped process is found."""
RESTART_FACTOR = 1.5
"""A restart takes at most this many times the cold start of the same run."""
SLACK_S = 2.0
"""What a busy machine may add to a bound of one second."""
BOUND_S = 300.0

SERVING = health_pb2.HealthCheckResponse.SERVING
STREAMS, WAITING = 16, 8
ONE_SLOT = ("--steer-slots", "1")
_stories = itertools.count()  # no request twice: one that was lost two times runs alone


@contextmanager
def read_out(server: Server) -> Iterator[None]:
    """Reads the server's output, which would block it once the pipe is full."""
    assert server.process.stdout is not None

    reader = Thread(target=server.process.stdout.read)
    reader.start()
    yield
    reader.join()


def process_of(server: Server, name: str) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if name in child.name())


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.endswith(".lock")}


def socket_folder(server: Server) -> Path:
    sockets = psutil.Process(server.process.pid).net_connections("unix")
    return next(Path(socket.laddr).parent for socket in sockets if "/steerllm-" in socket.laddr)


async def until_health(server: Server, wanted: Callable[[int], bool], every_s: float = 0.02) -> float:
    """The time at which health was first so."""
    async with asyncio.timeout(BOUND_S):
        while not wanted(await asyncio.to_thread(health_of, server.address)):
            await asyncio.sleep(every_s)
    return time.monotonic()


class Load:
    """Streams that run until something ends them, and steered ones beside them, most of which wait for a slot.

    One that waits has not begun: its client sends it again once the engine serves.
    """

    def __init__(self, client: AsyncSteerClient) -> None:
        self._client = client
        self._begun = 0
        self._all_begun = asyncio.Event()
        self.ended_at: list[float] = []
        self.errors: list[SteerError] = []

    async def begin(self) -> None:
        self._tasks = [asyncio.ensure_future(self._stream(number)) for number in range(STREAMS + WAITING)]
        await asyncio.wait_for(self._all_begun.wait(), BOUND_S)

    async def _stream(self, number: int) -> None:
        request = ask(f"Story {next(_stories)}", sampling={"max_tokens": 480})
        is_new = number < STREAMS
        if not is_new:
            request = replace(request, steering=SteeringSpec.simple_add(3, np.ones(576), number / 100))
        try:
            async for event in self._client.submit(request):
                if is_new and isinstance(event, TokenDelta):
                    is_new = False
                    self._begun += 1
                    if self._begun == STREAMS:
                        self._all_begun.set()
        except SteerError as error:
            self.errors.append(error)
        if number < STREAMS:
            self.ended_at.append(time.monotonic())

    async def end(self) -> float:
        """The time at which the last of those that had begun ended."""
        await asyncio.wait_for(asyncio.gather(*self._tasks[:STREAMS]), BOUND_S)
        for waiting in self._tasks[STREAMS:]:
            waiting.cancel()
        await asyncio.wait(self._tasks)
        return max(self.ended_at)


async def outlive(server: Server, client: AsyncSteerClient, number: signal.Signals, name: str) -> tuple[float, float]:
    """Signals one of the engine's processes under load; returns the seconds until all streams ended, until health."""
    load = Load(client)
    await load.begin()
    flipping = asyncio.ensure_future(until_health(server, lambda status: status != SERVING))
    sent = time.monotonic()
    process_of(server, name).send_signal(number)
    ended, flipped = await asyncio.gather(load.end(), flipping)
    assert STREAMS <= len(load.errors) <= STREAMS + WAITING
    assert {(type(error), error.reason) for error in load.errors} == {(EngineFailed, "ENGINE_DIED")}
    assert all(error.retry_after_s for error in load.errors)
    return ended - sent, flipped - sent


async def until_serving(server: Server, cold_start_s: float) -> float:
    """Checks the refusals meanwhile, and returns the seconds until the restarted engine serves."""
    died = time.monotonic()
    refused = await asyncio.to_thread(error_of_a_generation, server.address)  # the client would wait and retry
    assert refused.reason == "ENGINE_RESTARTING"
    assert refused.retry_after_s
    restart_s = await until_health(server, lambda status: status == SERVING, 0.25) - died
    report(f"serving again after {restart_s:.1f} s; the cold start took {cold_start_s:.1f} s")
    return restart_s


async def captured(client: AsyncSteerClient, delivery: str) -> CaptureHandle:
    capture = CaptureSpec(layers=(3, 17), delivery=delivery)
    options = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    return (await client.generate(["The harbour lies"], capture=capture, **options))[1][0]


@contextmanager
def watched_server(*flags: str) -> Iterator[tuple[Server, float]]:
    """A server and the seconds of its cold start. When it ends nothing must be left of all its engines."""
    before, began = shared_memory(), time.monotonic()
    with running_server(*flags) as server:
        cold_start_s, sockets = time.monotonic() - began, socket_folder(server)
        with read_out(server):
            yield server, cold_start_s
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=90) == 0
    assert shared_memory() - before == set()
    assert not sockets.exists()


def test_a_killed_and_a_stopped_engine_are_replaced_and_held_captures_stay() -> None:
    with watched_server(*ONE_SLOT) as (server, cold_start_s):
        asyncio.run(_kill_and_stop(server, cold_start_s))
        engine = psutil.Process(server.process.pid).children(recursive=True)  # which is starting again
    assert psutil.wait_procs(engine, timeout=60)[1] == []


async def _kill_and_stop(server: Server, cold_start_s: float) -> None:
    async with AsyncSteerClient(server.address, timeout_s=BOUND_S) as client:
        expected = await (await captured(client, "inline")).fetch_rows()
        held = await captured(client, "held")
        ended_s, flipped_s = await outlive(server, client, signal.SIGKILL, "EngineCore")
        report(f"core killed: streams ended after {ended_s:.2f} s, health after {flipped_s:.2f} s")
        assert max(ended_s, flipped_s) < ENDED_S + SLACK_S
        await until_serving(server, cold_start_s)
        assert await held.fetch_rows() == expected
        await held.close()
        for delivery in ("inline", "held", "shared_memory_required"):
            async with await captured(client, delivery) as again:
                assert await again.fetch_rows() == expected
    await _stop(server, "Worker")


async def _stop(server: Server, name: str) -> None:
    async with AsyncSteerClient(server.address, timeout_s=BOUND_S) as client:
        ended_s, flipped_s = await outlive(server, client, signal.SIGSTOP, name)
        report(f"{name} stopped: streams ended after {ended_s:.1f} s, health after {flipped_s:.1f} s")
        assert max(ended_s, flipped_s) < FOUND_S


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_five_engines_are_replaced_and_the_sixth_death_ends_the_server() -> None:
    before, began = shared_memory(), time.monotonic()
    with running_server(*ONE_SLOT) as server:
        cold_start_s, sockets = time.monotonic() - began, socket_folder(server)
        with read_out(server):
            asyncio.run(_kill_five_times(server, cold_start_s))
            engine = psutil.Process(server.process.pid).children(recursive=True)
            asyncio.run(_stop(server, "EngineCore"))
            assert server.process.wait(timeout=90) == 1
        assert psutil.wait_procs(engine, timeout=60)[1] == []
    assert shared_memory() - before == set()
    assert not sockets.exists()


def files_of(server: Server) -> set[str]:
    """Names in shared memory and in the folder of sockets."""
    return shared_memory() | set(os.listdir(socket_folder(server)))


async def _kill_five_times(server: Server, cold_start_s: float) -> None:
    process, grown, restarts_s = psutil.Process(server.process.pid), [], []
    files = files_of(server)
    async with AsyncSteerClient(server.address, timeout_s=BOUND_S) as client:
        for kill in range(5):
            name = ("EngineCore", "Worker")[kill % 2]
            ended_s, flipped_s = await outlive(server, client, signal.SIGKILL, name)
            report(f"{name} killed: streams ended after {ended_s:.2f} s, health after {flipped_s:.2f} s")
            assert max(ended_s, flipped_s) < ENDED_S + SLACK_S
            restarts_s.append(await until_serving(server, cold_start_s))
            before, files = files, files_of(server)
            outlived = len(before & files)  # what an engine has beside these differs from start to start
            grown.append((process.num_threads(), process.num_fds(), process.memory_info().rss >> 20, outlived))
    report(f"threads, descriptors, MiB, files that outlived an engine, after each restart: {grown}; {files}")
    for allowed, first, last in zip((2, 8, 100, 0), grown[0], grown[-1], strict=True):
        assert last <= first + allowed
    assert max(restarts_s) <= RESTART_FACTOR * cold_start_s


QUIET_S = 300.0
"""Seconds without a false alarm."""
PREFILL_S = 35.0
"""Seconds that a prefill should take."""
FIRST_PROMPT, LONGEST_PROMPT = 1500, 8000
"""Tokens of the prompt by which the machine is measured, and of one step at most."""
LONG_STEPS = ("--max-model-len", "8192", "--max-num-batched-tokens", "8192")


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_a_busy_machine_and_long_prefills_are_no_hangs() -> None:
    with watched_server(*LONG_STEPS) as (server, _), busy_cores():
        core = process_of(server, "EngineCore")
        asyncio.run(_prefill(server))
        assert core.is_running()


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process per core that computes all the time."""
    with ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        yield


async def _prefill(server: Server) -> None:
    """Prompts of one step each for `QUIET_S`, none of them in the prefix cache; health stays on.

    The first one is short, and each of the others as long as it may be to take `PREFILL_S` at the speed of the last.
    """
    took, began, dice = [], time.monotonic(), random.Random(15)
    length = FIRST_PROMPT
    async with AsyncSteerClient(server.address, timeout_s=BOUND_S) as client:
        while time.monotonic() - began < QUIET_S:
            prompt = TokenPrompt(token_ids=[dice.randrange(1000, 40_000) for _ in range(length)])
            start = time.monotonic()
            await run(client, GenerateRequest(prompt=prompt, sampling=SamplingOptions(max_tokens=1, ignore_eos=True)))
            took.append((length, round(time.monotonic() - start, 1)))
            assert await asyncio.to_thread(health_of, server.address) == SERVING
            # Attention takes quadratic time, the rest of the model linear time.
            length = min(LONGEST_PROMPT, round(length * math.sqrt(PREFILL_S / max(1.0, took[-1][1]))))
    report(f"prompts and the seconds that they took: {took}")


@pytest.mark.extended
@pytest.mark.timeout(900)
def test_an_engine_without_a_completed_step_is_killed_and_the_server_without_restarts_ends() -> None:
    with running_server(*LONG_STEPS, "--step-timeout", "1", "--max-restarts", "0") as server, read_out(server):
        with pytest.raises(EngineFailed) as failed:
            asyncio.run(_prefill(server))
        assert failed.value.reason == "ENGINE_DIED"
        assert server.process.wait(timeout=90) == 1
