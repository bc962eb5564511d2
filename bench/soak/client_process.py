"""A process with Python clients under test: `python -m bench.soak.client_process DIRECT PROXIED SEED`.

It does what each line on its standard input says, and responds with a line of JSON:

work   its clients call, and errors that a lost server explains are allowed
calm   the same, and no error is allowed
once   a client of each kind makes each of its calls, and no error is allowed; then it measures itself
rest   its calls end, and it measures itself
close  the same, and its clients are closed

What may not happen is written to the standard error.
"""

import asyncio
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.soak.client_calls import CALLS, PATIENT_S, Either, closed, dropped
from bench.soak.client_children import fork_children
from bench.soak.client_results import is_explained, name_of
from steer_client import AsyncSteerClient, SteerClient

LIMIT_S = PATIENT_S + 30.0
"""Seconds that a call may take, with all its attempts."""

OPTIONS: dict[str, Any] = {"timeout_s": 15.0, "unary_timeout_s": 5.0, "silence_timeout_s": 5.0}

LOOPS = {"dropped": 1, "closed": 1, "fork": 2, "loader": 1, "loop": 1}
"""Event loops that a call makes at most, by its name."""

POOL = "soak-pool"
"""Prefix of the names of threads that wait for calls; they stay."""

READY_S = 30.0
"""Seconds in which a client must find its server after it was started again."""


class Workers:
    """Clients that call until they are told to rest."""

    def __init__(self, direct: str, proxied: str, chance: random.Random) -> None:
        self.calls = Counter[str]()
        """Calls that succeeded, by name."""
        self.errors = Counter[str]()
        """Errors that were explained, by name."""
        self.loops = 0
        """Event loops that calls have made, at most."""
        self.longest_s = 0.0
        """Seconds of the longest call."""
        self._addresses = direct, proxied
        self._chance = chance
        self._is_calm = False
        self._stop = threading.Event()
        self._tasks: list[asyncio.Task[None]] = []
        kinds = (AsyncSteerClient, SteerClient)
        self._clients = [kind(address, **OPTIONS) for kind in kinds for address in self._addresses]
        self._roaming = AsyncSteerClient(direct, **OPTIONS)

    def begin(self, *, is_calm: bool) -> None:
        """Starts all calls."""
        importlib.import_module("bench.soak.client_loaders")  # with torch, before what the process has is measured
        self._is_calm = is_calm
        self._stop.clear()
        loops = [self._own(client, is_calm) for client in self._clients]
        loops += [self._short_lived(), self._forks(), self._loops()]
        self._tasks = [asyncio.ensure_future(one) for one in loops]

    async def once(self) -> None:
        """A client of each kind makes each call once; others are closed, dropped and forked."""
        self._is_calm = True
        chance, address = random.Random(self._chance.random()), self._addresses[0]

        async def each(one: Either) -> None:
            await self._checked("ready", lambda: one.call(one.client.wait_until_ready, timeout_s=READY_S))
            for call in CALLS:
                await self._checked(call.__name__, partial(call, one, chance))

        await asyncio.gather(*(each(Either(client)) for client in self._clients[::3]))  # one of each kind
        make = partial(SteerClient, **OPTIONS)
        await self._checked("closed", partial(closed, address, chance, make))
        await self._checked("dropped", partial(dropped, address, chance, make))
        await self._checked("fork", partial(_in_thread, fork_children, address, OPTIONS, chance))
        await self._checked("loop", partial(asyncio.to_thread, self._in_a_loop, chance))

    async def rest(self) -> None:
        """Returns when no call runs; each has at most its limit."""
        self._stop.set()
        if not self._tasks:
            return
        done, pending = await asyncio.wait(self._tasks, timeout=LIMIT_S + 10.0)
        for task in pending:
            _report(f"hangs: {task.get_coro()}")
        for task in done:
            if task.exception() is not None:
                _report(f"a worker failed: {task.exception()!r}")
        self._tasks = []

    async def close(self) -> None:
        """Closes all clients."""
        for client in (*self._clients, self._roaming):
            one = Either(client)
            await self._checked("close", lambda one=one: one.call(one.client.close))  # type: ignore[misc]
        self._clients = []

    async def _own(self, client: AsyncSteerClient | SteerClient, is_calm: bool) -> None:
        one, chance = Either(client), random.Random(self._chance.random())
        if is_calm:
            await self._checked("ready", lambda: one.call(one.client.wait_until_ready, timeout_s=READY_S))
        while not self._stop.is_set():
            call = chance.choice(CALLS)
            await self._checked(call.__name__, partial(call, one, chance))

    async def _short_lived(self) -> None:
        """Clients that are made, used, and closed or not."""
        chance = random.Random(self._chance.random())
        while not self._stop.is_set():
            make = partial(chance.choice((AsyncSteerClient, SteerClient)), **OPTIONS)
            way, address = chance.choice((dropped, closed)), chance.choice(self._addresses)
            await self._checked(way.__name__, partial(way, address, chance, make))

    async def _forks(self) -> None:
        """Children and loaders take turns: two threads must not wait for processes of `multiprocessing` at once."""
        from bench.soak.client_loaders import load_rows

        chance = random.Random(self._chance.random())
        while not self._stop.is_set():
            for name, act in (("fork", fork_children), ("loader", load_rows)):
                address = chance.choice(self._addresses)
                await self._checked(name, partial(_in_thread, act, address, OPTIONS, chance))
                await asyncio.sleep(0.5)

    async def _loops(self) -> None:
        """Event loops that come and go, all with one client."""
        chance = random.Random(self._chance.random())
        while not self._stop.is_set():
            await self._checked("loop", partial(asyncio.to_thread, self._in_a_loop, chance))

    def _in_a_loop(self, chance: random.Random) -> None:
        asyncio.run(chance.choice(CALLS)(Either(self._roaming), chance))

    async def _checked(self, name: str, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Runs a call and counts how it ended."""
        began_s = time.monotonic()
        self.loops += LOOPS.get(name, 0)
        try:
            async with asyncio.timeout(LIMIT_S) as limit:
                await call()
            self.calls[name] += 1
        except Exception as error:
            if limit.expired():
                faulthandler.dump_traceback()
                _report(f"{name} took longer than {LIMIT_S:g} s")
            elif not self._is_calm and is_explained(error):
                self.errors[name_of(error)] += 1
                await asyncio.sleep(0.02)
            else:
                _report(f"{name}: {name_of(error)}: {str(error)[:500]}")
        self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def measured(self) -> dict[str, Any]:
        """What this process has, and what its calls did."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        about = psutil.Process()
        return {
            "threads": about.num_threads() - sum(thread.name.startswith(POOL) for thread in threading.enumerate()),
            "python threads": sorted(thread.name for thread in threading.enumerate()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
            "segments": Path("/proc/self/maps").read_text().count("steerllm"),
            "rss": about.memory_info().rss,
            "objects": len(gc.get_objects()),
            "children": len(about.children(recursive=True)),
            "tasks": len(asyncio.all_tasks()),
            "loops": self.loops,
            "longest_s": self.longest_s,
            "calls": dict(self.calls),
            "errors": dict(self.errors),
        }


async def _in_thread(function: Callable[..., None], *args: Any) -> None:
    """Runs a function in a thread of its own: a child that is forked in a thread of a pool cannot end properly."""
    loop, done = asyncio.get_running_loop(), Future[None]()

    def run() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    await asyncio.wrap_future(done, loop=loop)


def _report(violation: str) -> None:
    """Whoever started this process takes all that it writes here for violations."""
    print(violation, file=sys.stderr, flush=True)


async def main(direct: str, proxied: str, seed: str) -> None:
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()
    loop.set_default_executor(ThreadPoolExecutor(32, POOL))  # of which clients take some, too
    loop.add_reader(sys.stdin.fileno(), lambda: lines.put_nowait(sys.stdin.readline().strip()))
    workers = Workers(direct, proxied, random.Random(seed))
    while line := await lines.get():
        if line in ("work", "calm"):
            workers.begin(is_calm=line == "calm")
            print(json.dumps({}), flush=True)
            continue
        await (workers.once() if line == "once" else workers.rest())
        if line == "close":
            await workers.close()
        await asyncio.sleep(0.5)  # dropped clients end their threads and connections
        print(json.dumps(workers.measured()), flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # a child that hangs is asked where
    asyncio.run(main(*sys.argv[1:]))
