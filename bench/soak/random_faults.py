"""Clients that do ordinary work while faults are injected at random moments: their history must be right.

Everything random follows from a seed: `python -m bench.soak random_faults --seed 7` repeats a plan of faults, but not
the moments at which processes meet it.
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from bench.soak.calls import Figures
from bench.soak.clients import Client, Held, Log, compute_references
from bench.soak.fake_server import FAILS, KILLS
from bench.soak.faults import FAULTS, Fault, Planned, World, plan
from bench.soak.history import left_behind, violations
from bench.soak.leases import leased_capture
from bench.soak.processes import Server, fake_server
from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest as Request
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.wire.generation_pb2 import GenerateRequest
from steer_service.wire.request import request_to_proto

WORKERS = 6
"""Clients that do ordinary work."""

LEAST_PER_S = 2
"""Requests that must complete each second, or the run shows nothing."""

LATE_S = 60.0
"""Seconds after the end of a run in which everything must have ended."""

SHOWN = 10
"""Violations that are printed."""

HELD = CaptureDelivery.HELD


def asks_of(layers: int, hidden_size: int, longest: int) -> dict[str, GenerateRequest]:
    """What clients ask for: `longest` is the number of tokens of a prompt whose captures are large."""
    vector = np.linspace(-1.0, 1.0, hidden_size, dtype=np.float32)
    every = tuple(range(layers))

    def ask(first: int, tokens: int, length: int = 3, **fields: Any) -> GenerateRequest:
        prompt = TokenPrompt(token_ids=tuple(first + number % 500 for number in range(length)))
        sampling = SamplingOptions(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return request_to_proto(Request(prompt=prompt, sampling=sampling, **fields))

    steering = SteeringSpec.simple_add(1, vector, 2.0)
    return {
        "plain": ask(10, 8),
        "steered": ask(20, 8, steering=steering),
        "inline": ask(30, 8, capture=CaptureSpec(layers=every)),
        "live": ask(40, 12, steering=steering, capture=CaptureSpec(layers=(0, 1), is_live=True)),
        "held": ask(50, 8, length=30, capture=CaptureSpec(layers=every, delivery=HELD)),
        "held_steered": ask(60, 8, steering=steering, capture=CaptureSpec(layers=(1, 2), delivery=HELD)),
        "long": ask(70, 60, capture=CaptureSpec(layers=(2,), is_live=True)),
        "wide": ask(80, 4, length=longest, capture=CaptureSpec(layers=every)),
    }


async def work(world: World, chance: random.Random, stop: asyncio.Event) -> None:
    """A client that asks for one thing after the other until it is told to stop; then it has no captures left."""
    async with world.client(chance) as client, world.client(chance) as stranger:
        while not stop.is_set():
            result = await client.generate(chance.choice(sorted(world.asks)))
            if result.held is not None:
                await _use(client, stranger, result.held, chance)
            elif result.end.status == "OK" and chance.random() < 0.1:
                await stranger.cancel(result, token=b"a guess " + chance.randbytes(16))  # no name of a server
            if result.end.status == "UNAVAILABLE":
                await asyncio.sleep(0.2)  # the engine is being started; it is sent again under a new id


async def _use(client: Client, stranger: Client, held: Held, chance: random.Random) -> None:
    """Fetches a capture, lets another client try to, and releases it, partly while it is fetched."""
    missing, either = frozenset({"NOT_FOUND"}), frozenset({"OK", "NOT_FOUND"})
    if chance.random() < 0.3:
        await stranger.fetch(held, allowed=missing)
        await stranger.release(held)
    await client.fetch(held)
    if chance.random() < 0.3:
        await asyncio.gather(client.fetch(held, allowed=either), client.release(held))
    else:
        await client.release(held)
    if chance.random() < 0.5:
        await client.fetch(held, allowed=missing)


async def inject(world: World, planned: Sequence[Planned], faults: Mapping[str, Fault]) -> None:
    """Injects the faults of a plan, each at its time. Raises what they raise."""
    began_s, running = time.monotonic(), list[asyncio.Future[None]]()
    for one in planned:
        await asyncio.sleep(max(0.0, began_s + one.at_s - time.monotonic()))
        running.append(asyncio.ensure_future(faults[one.kind](world, random.Random(one.seed))))
    await asyncio.gather(*running)


async def run(world: World, seed: int, seconds: float, planned: Sequence[Planned], faults: Mapping[str, Fault]) -> None:
    """Works and injects for `seconds`. What has not ended `LATE_S` later is cancelled, which the history shows."""
    stop, began_s = asyncio.Event(), time.monotonic()
    workers = [asyncio.ensure_future(work(world, random.Random(f"{seed} {number}"), stop)) for number in range(WORKERS)]
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds + LATE_S):
            await inject(world, planned, faults)
            await asyncio.sleep(max(0.0, began_s + seconds - time.monotonic()))
            stop.set()
            await asyncio.gather(*workers)
    for worker in workers:
        worker.cancel()
    for result in await asyncio.gather(*workers, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


def figures_of(world: World, planned: Sequence[Planned], seed: int, found: Sequence[str]) -> Figures:
    """The report of a run."""
    operations = world.log.operations
    for one in found[:SHOWN]:
        print(f"violation: {one}", flush=True)
    return {
        "seed": seed,
        "faults": dict(sorted(Counter(one.kind for one in planned).items())),
        "operations": len(operations),
        "requests completed": sum(
            one.kind == "generate" and one.ends[0].status == "OK" for one in operations if one.ends
        ),
        "statuses": dict(Counter(one.ends[0].status for one in operations if one.ends)),
        "violations": len(found),
        "met": not found,
    }


async def engine_fails(world: World, chance: random.Random) -> None:
    """The engine fails in a step of one request, by a defect of its own."""
    await _first_token(world, chance, FAILS, "INTERNAL", "failing step")


async def engine_dies(server: Server, world: World, chance: random.Random) -> None:
    """The engine dies with all its requests, and is started again."""
    starts, began_s = (await server.numbers())["starts"], time.monotonic()
    outage = len(world.log.outages)
    world.log.outages.append((began_s, float("inf")))
    await _first_token(world, chance, KILLS, "UNAVAILABLE", "engine dies")
    while (await server.numbers())["starts"] == starts:
        await asyncio.sleep(0.02)
    world.log.outages[outage] = began_s, time.monotonic()


async def _first_token(world: World, chance: random.Random, first: int, status: str, fault: str) -> None:
    request = GenerateRequest()
    request.CopyFrom(world.asks["plain"])
    request.token_ids.ids[:] = [first, chance.randrange(30_000), chance.randrange(30_000)]
    async with world.client(chance) as client:
        await client.generate("", request=request, allowed=frozenset({status}), fault=fault)


EMPTY = ("running", "places", "waiting", "senders", "backend", "held", "shared_bytes", "fetches")
"""Numbers of a fake server that are 0 when nothing is asked of it."""

SLACK = {"tasks": 2, "threads": 2, "descriptors": 4}
"""What gRPC may keep for a while."""


async def random_faults(seed: int, seconds: float = 60.0) -> Figures:
    """Faults of clients, networks and the engine on the fake backend."""
    settings = {"shm_ttl": 4.0, "send_timeout_s": 3.0, "heartbeat_s": 0.2, "restart_window_s": 0.01}
    async with fake_server(8, 0.005, 64, 2 << 20, **settings) as server:
        log, asks = Log(), asks_of(4, 64, 1000)
        too_large = GenerateRequest()
        too_large.CopyFrom(asks["held"])
        too_large.token_ids.ids[:] = [1] * 4090
        world = World(address=server.address, log=log, asks=asks, too_large=too_large, hold_s=4.0, send_timeout_s=3.0)
        async with world.client(random.Random(seed)) as client:
            await compute_references(client)
        await asyncio.sleep(0.5)
        before = await server.numbers()
        faults = {
            **FAULTS,
            "leased_capture": leased_capture,
            "engine_fails": engine_fails,
            "engine_dies": partial(engine_dies, server),
        }
        planned = plan(seed, faults, seconds - 10.0, 1.0)
        await run(world, seed, seconds, planned, faults)
        found = violations(log.operations, log.references, outages=log.outages, least_done=int(seconds * LEAST_PER_S))
        found += await _left(server, before, within_s=15.0)
        await server.end()
    found += [f"left in shared memory: {name}" for name in segments()]
    return figures_of(world, planned, seed, found)


async def _left(server: Server, before: Mapping[str, int], within_s: float) -> list[str]:
    """What the server still has after `within_s`; returns as soon as that is nothing."""
    until_s, empty = time.monotonic() + within_s, dict.fromkeys(EMPTY, 0)
    kept = {name: before[name] for name in SLACK}
    while found := left_behind(empty | kept, await server.numbers(), SLACK):
        if time.monotonic() > until_s:
            return found
        await asyncio.sleep(0.1)
    return []


def segments() -> list[str]:
    """Names in shared memory that this project's servers have left."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("steerllm") and not name.endswith(".lock")]


SCENARIOS = {"random_faults": random_faults}
