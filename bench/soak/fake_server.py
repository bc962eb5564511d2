"""A server around the fake backend, whose engine computes a known number of requests at once.

`python -m bench.soak.fake_server AT_ONCE SECONDS_PER_TOKEN HIDDEN_SIZE [SHARED_BYTES]` prints its addresses, and
answers each line on standard input with its numbers as JSON. Settings come from the environment, as for `steer serve`.
SIGTERM drains. With SHARED_BYTES, held captures lie in so much shared memory. A prompt that begins with FAILS fails in
the engine; one that begins with KILLS ends the engine, which is then started again.
"""

import asyncio
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from steer_service.core.backend import Backend
from steer_service.core.errors import EngineFailed
from steer_service.core.events import Event, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.server.event_loop import kept_heap, new_event_loop
from steer_service.server.generation_servicer import GenerationServicer
from steer_service.server.supervisor import Supervisor
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.arena import Arena

FAILS, KILLS = 31_998, 31_999
"""First tokens of prompts that fail in the engine, or end it, at their second token."""


class TimedBackend(FakeBackend):
    """Computes `at_once` requests, each token in `token_s` seconds; others wait in the order in which they came."""

    def __init__(self, at_once: int, token_s: float, hidden_size: int, arena: Arena | None = None) -> None:
        info = replace(FAKE_MODEL, hidden_size=hidden_size)
        super().__init__(info, step=self._step if token_s else None, place=arena)
        self._is_alive = True
        self._at_once = at_once
        self._token_s = token_s
        self._slots = asyncio.Semaphore(at_once)

    @property
    def requests_at_once(self) -> int:
        return self._at_once

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        first = request.prompt.token_ids[0] if isinstance(request.prompt, TokenPrompt) else 0
        tokens = 0
        async with self._slots, aclosing(super().submit(request)) as events:
            async for event in events:
                tokens += isinstance(event, TokenDelta)
                if tokens == 2 and first == FAILS:
                    raise EngineFailed("an injected defect", reason="INJECTED")
                if tokens == 2 and first == KILLS:
                    self._is_alive = False
                    raise EngineFailed("an injected death", reason="ENGINE_DIED")
                yield event
                self.requests.clear()  # it would keep every request of a long run, cancelled ones too

    async def _step(self, number: int) -> None:
        await asyncio.sleep(self._token_s)


class Refusals:
    """Measures, in the server, how long a refused Generate call took from the start of its handler."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        generate = GenerationServicer.Generate

        async def timed(servicer: Any, body: Any, context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
            start = time.perf_counter()
            try:
                async with aclosing(generate(servicer, body, context)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AbortError:
                self.seconds.append(time.perf_counter() - start)
                raise

        GenerationServicer.Generate = timed  # type: ignore[method-assign]


def _peak_kib() -> int:
    """Most resident memory so far, in KiB; what getrusage says includes the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


async def serve(at_once: int, token_s: float, hidden_size: int, shared_bytes: int = 0) -> None:
    """Serves until SIGTERM."""
    refusals, stop, config = Refusals(), asyncio.Event(), ServerConfig.from_environment()
    server, backends = SteerServer(config), list[TimedBackend]()
    arena = Arena(Path(config.shm_dir), shared_bytes) if shared_bytes else None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    async def start() -> Backend:
        backends[:] = [TimedBackend(at_once, token_s, hidden_size, arena)]
        return backends[0]

    def on_serving(_: Backend) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            print(server.address, server.health_address, flush=True)

    starts = 0
    await server.listen()
    supervising = asyncio.ensure_future(Supervisor(server, start).run(on_serving))

    def numbers() -> None:
        sys.stdin.readline()
        spent = sorted(refusals.seconds)
        print(
            json.dumps(
                {
                    "running": server.running,
                    "places": server._admission._queue.running,
                    "waiting": server._admission._queue.waiting,
                    "stalled": sum(one.since < math.inf for one in server._send_timeout._senders),
                    "senders": len(server._send_timeout._senders),
                    "backend": backends[0].running,
                    "starts": starts,
                    "sessions": len(server._sessions),
                    "challenges": len(server._sessions._challenges),
                    "held": len(server._store),
                    "held_bytes": server._store.total_bytes,
                    "shared_bytes": arena.pool.reserved_bytes if arena is not None else 0,
                    "fetches": sum(capture.readers != {} for capture in server._store._captures.values()),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                    "refused": len(spent),
                    "refusal_p99_s": spent[int(len(spent) * 0.99)] if spent else 0.0,
                    "tasks": len(asyncio.all_tasks()),
                    "peak_kib": _peak_kib(),
                }
            ),
            flush=True,
        )
        refusals.seconds.clear()

    loop.add_reader(sys.stdin.fileno(), numbers)
    await stop.wait()
    loop.remove_reader(sys.stdin.fileno())
    supervising.cancel()
    await asyncio.wait([supervising])
    await server.drain()


if __name__ == "__main__":
    with kept_heap(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:])))
