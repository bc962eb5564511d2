"""Processes with Python clients, while their server is killed and drained and connections are cut.

`python -m bench.soak python_client --seconds 300` runs it for five minutes, which end with a calm time.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from bench.soak.calls import Figures
from bench.soak.processes import ANY, Server, fake_server
from bench.soak.proxy import Proxy, proxy_to
from bench.soak.random_faults import EMPTY, SHOWN, segments

MEASURED = 3
"""Measurements while there are faults, after equal parts of the time."""

CALM_S = 6.0
"""Seconds of work without a fault, at the beginning and at the end."""

ANSWER_S = 140.0
"""Seconds in which a process must respond: all its calls may take their whole limit."""

ORPHANS_S = 15.0
"""Seconds for which the children of a killed process may live: workers of pools wait for ever, and some of loaders."""

TTL_S = 5.0
"""Seconds after which the server frees captures that nobody reads."""

LEFT_S = TTL_S + 30.0
"""Seconds in which a server must have freed everything."""

SLACK: dict[str, float] = {
    "threads": 4,
    "descriptors": 8,
    "mappings": 60,
    "rss": 24 << 20,
    "tasks": 0,
    "objects": 20_000,
}
"""How much more a process may have after the faults than after its first calm time."""

SLOPE = {"rss": 2048, "objects": 2.0}
"""How much more a process may have for each call, between the first and the last measurement under faults."""

LOOP = {"rss": 16384, "objects": 21.0}
"""How much more it may have for each event loop: gRPC keeps closed ones while a client is open."""

IDLE = (*EMPTY, "challenges")
"""Numbers of the server that are 0 while all clients rest."""

SERVER = {"shm_ttl": TTL_S, "send_timeout_s": 5.0, "heartbeat_s": 0.5, "grace_s": 3.0}


class Restarted:
    """A server that is ended and started again at the same address."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.address = ANY
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Starts the server, which then serves."""
        self.server = await self._stack.enter_async_context(
            fake_server(32, 0.002, 64, 64 << 20, address=self.address, **SERVER)
        )
        self.address = self.server.address

    async def end(self, *, is_killed: bool) -> None:
        """Ends it by SIGKILL, or by SIGTERM, which must succeed."""
        assert self.server is not None
        if is_killed:
            self.server.process.kill()
            await self.server.process.wait()
        else:
            await self.server.end()
        await self._stack.aclose()

    @property
    def running(self) -> Server:
        """The server that runs now."""
        assert self.server is not None
        return self.server


class ClientProcess:
    """A process with clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._said = asyncio.ensure_future(self._errors())

    @classmethod
    async def start(cls, direct: str, proxied: str, seed: str) -> "ClientProcess":
        """Starts one, which does nothing yet."""
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "bench.soak.client_process", direct, proxied, seed),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                limit=16 << 20,
                process_group=0,
            )
        )

    async def _errors(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode(errors="replace")

    async def tell(self, line: str) -> dict[str, Any]:
        """Its response. Raises AssertionError if it hangs or has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await self.process.stdout.readline()
        except TimeoutError:
            answer = b""
        if not answer:
            status = self.process.returncode
            raise AssertionError(f"a client's process hangs or has ended with {status}: {await self.kill()}")
        return dict(json.loads(answer))

    async def kill(self) -> str:
        """Kills it; returns what it wrote to its standard error."""
        if self.process.returncode is None:
            self.process.kill()
        try:
            async with asyncio.timeout(ORPHANS_S):
                said = await asyncio.shield(self._said)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            said = await self._said
        await self.process.wait()  # in Python 3.11 it also waits for all that hold its standard streams
        return said

    async def end(self) -> list[str]:
        """Lets it end; returns what is wrong with that."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(30.0):
                status = await self.process.wait()
        except TimeoutError:
            return [f"a client's process does not end: {await self.kill()}"]
        said = await self._said
        return [f"a client's process ended with {status}: {said[-2000:]}"] if status or said else []


class Run:
    """One run: the server, its clients and what is wrong."""

    def __init__(self, seed: int, stable: int, doomed: int) -> None:
        self.chance = random.Random(seed)
        self.found: list[str] = []
        self.faults = Counter[str]()
        self.restarted = Restarted()
        self.stable: list[ClientProcess] = []
        self.doomed: list[ClientProcess] = []
        self.counts = stable, doomed
        self.proxy: Proxy | None = None

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """The server, the proxy and the stable processes; afterwards none is left."""
        await self.restarted.start()
        try:
            async with proxy_to(self.restarted.address) as self.proxy:
                try:
                    self.stable = [await self._process(f"stable {number}") for number in range(self.counts[0])]
                    yield
                finally:
                    await asyncio.gather(*(one.kill() for one in (*self.stable, *self.doomed)))
        finally:
            server = self.restarted.server
            if server is not None and server.process.returncode is None:
                await self.restarted.end(is_killed=True)

    async def _process(self, name: str) -> ClientProcess:
        assert self.proxy is not None
        return await ClientProcess.start(self.restarted.address, self.proxy.address, f"{self.chance.random()} {name}")

    async def tell(self, line: str) -> list[dict[str, Any]]:
        """The responses of all stable processes."""
        return await asyncio.gather(*(one.tell(line) for one in self.stable))

    async def calm(self, seconds: float) -> list[dict[str, Any]]:
        """Works without a fault, and rests."""
        await self.tell("calm")
        await asyncio.sleep(seconds)
        return await self.tell("rest")

    async def stormy(self, seconds: float) -> list[dict[str, Any]]:
        """Works with faults, and rests."""
        await self.tell("work")
        for number in range(self.counts[1]):
            self.doomed.append(await self._process(f"doomed {number}"))
            await self.doomed[-1].tell("work")
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            await asyncio.sleep(self.chance.uniform(0.5, 2.5))
            fault = self.chance.choice((self.kill, self.drain, self.reset, self.cut, self.silence, self.kill_client))
            self.faults[fault.__name__] += 1
            await fault()
        for one in self.doomed:
            self._judge_stderr(await one.kill())
        self.doomed = []
        return await self.tell("rest")

    async def kill(self) -> None:
        """SIGKILL for the server, which is started again after a while."""
        await self._restart(is_killed=True)

    async def drain(self) -> None:
        """SIGTERM for the server, which is started again after a while."""
        await self._restart(is_killed=False)

    async def _restart(self, *, is_killed: bool) -> None:
        await self.restarted.end(is_killed=is_killed)
        await asyncio.sleep(self.chance.uniform(0.0, 1.0))
        await self.restarted.start()

    async def reset(self) -> None:
        """Resets all connections of the proxy."""
        assert self.proxy is not None
        self.proxy.reset()

    async def cut(self) -> None:
        """Resets all connections of the proxy in the middle of a response."""
        assert self.proxy is not None
        self.proxy.cut_after_bytes = self.chance.randrange(200_000)
        await asyncio.sleep(2.0)
        self.proxy.cut_after_bytes = -1

    async def silence(self) -> None:
        """Keeps all bytes back for a while; calls end as their server is silent."""
        assert self.proxy is not None
        self.proxy.stop_forwarding()
        await asyncio.sleep(self.chance.choice((1.0, 6.0)))
        self.proxy.forward_again()

    async def kill_client(self) -> None:
        """SIGKILL for a process with clients; another one follows it."""
        victim = self.doomed.pop(self.chance.randrange(len(self.doomed)))
        self._judge_stderr(await victim.kill())
        self.doomed.append(await self._process("doomed"))
        await self.doomed[-1].tell("work")

    def _judge_stderr(self, said: str) -> None:
        if said:
            self.found.append(f"a client's process wrote: {said[-2000:]}")

    async def left(self, names: Sequence[str]) -> None:
        """Records what the server still has after a while."""
        until_s = time.monotonic() + LEFT_S
        while there := [
            item for item in (await self.restarted.running.numbers()).items() if item[0] in names and item[1]
        ]:
            if time.monotonic() > until_s:
                self.found.append(f"left on the server: {there}")
                return
            await asyncio.sleep(0.1)


def grown(before: Mapping[str, Any], after: Mapping[str, Any], slack: Mapping[str, float], when: str) -> list[str]:
    """What a process has more of than before, beyond `slack`."""
    return [
        f"{name} of a client's process: {before[name]} before, {after[name]} after {when}"
        for name in slack
        if after[name] - before[name] > slack[name]
    ]


def slope(calls: int, loops: int) -> dict[str, float]:
    """How much more a process may have after so many calls that made so many event loops."""
    return {name: SLOPE[name] * max(calls, 2000) + LOOP[name] * loops for name in SLOPE}


async def python_client(seed: int, seconds: float = 150.0, stable: int = 2, doomed: int = 2) -> Figures:
    """Python clients while servers, connections and processes end, and what they and the server keep of it."""
    run = Run(seed, stable, doomed)
    async with run.started():
        first = await run.calm(CALM_S)
        stormy = []
        for _ in range(MEASURED):
            stormy.append(await run.stormy(seconds / MEASURED))
            await run.left(IDLE)
        last = await run.calm(CALM_S)
        closed = await run.tell("close")
        await run.left((*IDLE, "sessions"))
        for process in run.stable:
            run.found += await process.end()
        await run.restarted.end(is_killed=False)
    for number in range(stable):
        start, end = stormy[0][number], stormy[-1][number]
        run.found += grown(first[number], last[number], SLACK, "all calls")
        if MEASURED > 1:
            made = sum(end["calls"].values()) - sum(start["calls"].values())
            loops = end["loops"] - start["loops"]
            run.found += grown(start, end, slope(made, loops), f"{made} calls with {loops} event loops")
        if closed[number]["segments"] or closed[number]["children"]:
            run.found.append(f"left in a closed client's process: {closed[number]}")
    run.found += [f"left in shared memory: {name}" for name in segments()]
    for one in run.found[:SHOWN]:
        print(f"violation: {one}", flush=True)
    return {
        "seed": seed,
        "faults": dict(sorted(run.faults.items())),
        "calls that succeeded": dict(sum((Counter(one["calls"]) for one in closed), Counter())),
        "calls that failed as expected": dict(sum((Counter(one["errors"]) for one in closed), Counter())),
        "longest call": f"{max(one['longest_s'] for one in closed):.1f} s",
        **{
            f"{name}: calm, under faults, calm, closed": [
                [one[number][name] for one in (first, *stormy, last, closed)] for number in range(stable)
            ]
            for name in SLACK
        },
        "violations": len(run.found),
        "met": not run.found,
    }


SCENARIOS = {"python_client": python_client}
