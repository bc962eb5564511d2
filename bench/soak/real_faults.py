"""Random faults on the real engine: as on the fake one, and its processes are killed and stopped."""

import asyncio
import math
import random
import signal
import time
from contextlib import suppress
from functools import partial

import numpy as np
import psutil

from bench.soak.calls import Figures
from bench.soak.clients import Log, compute_references, hash_of
from bench.soak.faults import FAULTS, Planned, World, plan
from bench.soak.history import left_behind, violations
from bench.soak.leases import leased_capture
from bench.soak.random_faults import asks_of, figures_of, run, segments
from bench.soak.real import RealServer, real_process
from steer_service.wire.capture_pb2 import CAPTURE_SITE_BOTH
from steer_service.wire.generation_pb2 import GenerateRequest

TOLERANCE = 1e-4
"""By how much a row may differ from its reference, relative to the largest value: batches are rounded differently."""

SETTINGS = {"shm_ttl": 20.0, "send_timeout_s": 3.0, "heartbeat_s": 1.0, "client_shm_gb": 0.02}

CHILDREN_S = 10.0
"""Seconds in which what the run has left may go away."""

LEAST_PER_S = 0.2
"""Requests that must complete each second, restarts of the engine included."""

SLACK = {"threads": 4, "descriptors": 10, "processes": 0}


class RoundedRows:
    """Hashes of rows, the same for rows that differ by rounding from the first ones of their request."""

    def __init__(self) -> None:
        self._first: dict[str, bytes] = {}

    def __call__(self, rows: bytes, asked: str) -> str:
        """SHA-256 of these rows, or of the first ones."""
        first = self._first.setdefault(asked, rows)
        if len(first) == len(rows):
            right, found = np.frombuffer(first, np.float32), np.frombuffer(rows, np.float32)
            if right.size and np.abs(right - found).max() <= TOLERANCE * np.abs(right).max():
                return hash_of(first, asked)
        return hash_of(rows, asked)


async def process_killed(name: str, server: RealServer, world: World, chance: random.Random) -> None:
    """A process of the engine is killed. A capture that was held before is right during and after the restart."""
    while any(math.isinf(until) for _, until in world.log.outages):
        await asyncio.sleep(0.5)  # another one is started again
    async with world.client(chance) as client:
        held = (await client.generate("held", fault=f"before {name} is killed")).held
        assert held is not None, "the engine did not serve before its process was killed"
        starts, began_s = server.starts, time.monotonic()
        outage = len(world.log.outages)
        world.log.outages.append((began_s, math.inf))
        server.child(name).kill()
        while server.starts == starts:
            await asyncio.sleep(2.0)
            await client.fetch(held, fault=f"while {name} is started again")
        world.log.outages[outage] = began_s, time.monotonic()
        await client.fetch(held, fault=f"after {name} was killed")
        await client.release(held)
        await client.generate("steered", fault=f"after {name} was killed")


async def worker_stopped(server: RealServer, world: World, chance: random.Random) -> None:
    """A worker is stopped, for less than the time after which it counts as hanging."""
    with suppress(StopIteration, psutil.NoSuchProcess):  # the engine is being started
        worker = server.child("Worker")
        worker.send_signal(signal.SIGSTOP)
        await asyncio.sleep(chance.uniform(0.5, 3.0))
        worker.send_signal(signal.SIGCONT)


async def real_random_faults(seed: int, seconds: float = 180.0) -> Figures:
    """Faults of clients, networks and the engine's processes on the real engine."""
    async with real_process("--dtype", "float32", **SETTINGS) as server:  # its tokens do not depend on the batch
        asks = asks_of(4, 128, 700)
        too_large = GenerateRequest()
        too_large.CopyFrom(asks["held"])
        too_large.token_ids.ids[:] = [1] * 1000
        too_large.capture.site = CAPTURE_SITE_BOTH
        too_large.sampling.n = 8
        too_large.sampling.temperature = 1.0
        log = Log(hash_of=RoundedRows())
        world = World(
            address=server.address,
            log=log,
            asks=asks,
            too_large=too_large,
            hold_s=SETTINGS["shm_ttl"],
            send_timeout_s=SETTINGS["send_timeout_s"],
        )
        async with world.client(random.Random(seed)) as client:
            await compute_references(client)
        await _restart(server)  # the first one starts threads that later ones use again
        before = _numbers(server)
        kills = {
            "core_killed": partial(process_killed, "EngineCore", server),
            "worker_killed": partial(process_killed, "Worker", server),
        }
        faults = {
            **FAULTS,
            "leased_capture": leased_capture,
            "worker_stopped": partial(worker_stopped, server),
            **kills,
        }
        planned = _plan(seed, [name for name in faults if name not in kills], list(kills), seconds)
        await run(world, seed, seconds, planned, faults)
        found = violations(log.operations, log.references, outages=log.outages, least_done=int(seconds * LEAST_PER_S))
        until_s = time.monotonic() + CHILDREN_S
        while (left := left_behind(before, _numbers(server), SLACK)) and time.monotonic() < until_s:
            await asyncio.sleep(0.2)
        found += left
    if server.process.returncode:
        found.append(f"the server ended with status {server.process.returncode}")
    found += [f"left in shared memory: {name}" for name in segments()]
    return {
        **figures_of(world, planned, seed, found),
        "seconds without an engine": [round(until - since, 1) for since, until in log.outages],
    }


async def _restart(server: RealServer) -> None:
    """Kills the engine core and returns once the next one serves."""
    starts = server.starts
    server.child("EngineCore").kill()
    while server.starts == starts:
        await asyncio.sleep(0.5)
    await asyncio.sleep(1.0)


def _plan(seed: int, kinds: list[str], kills: list[str], seconds: float) -> list[Planned]:
    """Faults every two seconds, and each kill once, in equal parts of the time."""
    chance = random.Random(f"{seed} kills")
    part = (seconds - 20.0) / len(kills)
    killed = [
        Planned(10.0 + number * part + chance.uniform(0.0, 10.0), kind, chance.getrandbits(32))
        for number, kind in enumerate(kills)
    ]
    return sorted(plan(seed, kinds, seconds - 30.0, 2.0) + killed, key=lambda one: one.at_s)


def _numbers(server: RealServer) -> dict[str, int]:
    """What the server's processes hold."""
    process = psutil.Process(server.process.pid)
    return {
        "threads": process.num_threads(),
        "descriptors": process.num_fds(),
        "processes": len(process.children(recursive=True)),
    }


SCENARIOS = {"real_random_faults": real_random_faults}
