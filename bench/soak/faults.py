"""Faults that are injected at random moments, and the plan of a run: both follow from a seed."""

import asyncio
import math
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from grpc_health.v1 import health_pb2

from bench.soak.clients import Client, Log, Result
from bench.soak.history import END_S, End, Operation
from bench.soak.hostile import ENTRIES, message
from bench.soak.proxy import Proxy, proxy_to
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2
from steer_service.wire.generation_pb2 import GenerateRequest

OR_CANCELLED = frozenset({"OK", "CANCELLED"})
REFUSED = frozenset({"INVALID_ARGUMENT", "UNIMPLEMENTED"})
MISSING = frozenset({"NOT_FOUND"})

DAMAGED = REFUSED | {"OK", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
"""Statuses of damaged messages: some of them still are requests."""

DAMAGED_MESSAGES = 50

METHODS = tuple(
    f"/{service.full_name}/{method.name}"
    for file in (generation_pb2, capture_pb2, steering_pb2, info_pb2, health_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if (service.name, method.name) != ("Health", "List")  # the server does not have it
)

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536))
"""Options of a client that takes no more than 64 KiB which it does not read."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a plan."""

    at_s: float
    """Seconds after the begin of the run."""
    kind: str
    """Name of the fault."""
    seed: int
    """Seed of everything that is random in it."""


def plan(seed: int, kinds: Iterable[str], seconds: float, pause_s: float) -> list[Planned]:
    """Faults of random kinds, on average every `pause_s`; as far as there is time, each kind comes once first."""
    chance, first = random.Random(seed), sorted(kinds)
    names = list(first)
    chance.shuffle(first)
    planned: list[Planned] = []
    at_s = chance.expovariate(1 / pause_s)
    while at_s < seconds:
        kind = first[len(planned)] if len(planned) < len(first) else chance.choice(names)
        planned.append(Planned(at_s, kind, chance.getrandbits(32)))
        at_s += chance.expovariate(1 / pause_s)
    return planned


@dataclass(slots=True, kw_only=True)
class World:
    """The server of a run, and what may be asked of it."""

    address: str
    log: Log
    asks: Mapping[str, GenerateRequest]
    """Requests by name; `long`, `wide`, `held`, `plain` and `steered` are among them."""
    too_large: GenerateRequest
    """A request whose captures exceed the memory of a client."""
    hold_s: float
    """Seconds after which an unused capture expires."""
    send_timeout_s: float
    """Seconds after which a response stream ends that nobody reads."""

    def client(self, chance: random.Random, address: str = "", options: Sequence[tuple[str, int]] = ()) -> Client:
        """A client that there was not before."""
        return Client(self.log, f"c{chance.getrandbits(48)}", address or self.address, self.asks, options)


Fault = Callable[[World, random.Random], Awaitable[None]]


async def cancelled(world: World, chance: random.Random) -> None:
    """A client cancels at a random token, or before the first."""
    at = chance.randrange(40)

    def on_token(count: int, result: Result) -> None:
        if count >= at:
            result.call.cancel()

    async with world.client(chance) as client:
        asked = chance.choice(["long", "held", "wide"])
        await client.generate(asked, allowed=OR_CANCELLED, fault="cancelled", on_token=on_token)


async def cancelled_by_token(world: World, chance: random.Random) -> None:
    """A second call cancels by the token of the request."""
    at = chance.randrange(1, 20)
    async with world.client(chance) as client:

        def on_token(count: int, result: Result) -> Awaitable[object] | None:
            return client.cancel(result) if count == at else None

        await client.generate("long", allowed=OR_CANCELLED, fault="cancelled by token", on_token=on_token)


async def channel_closed(world: World, chance: random.Random) -> None:
    """A client closes its connection in the middle of its streams."""
    allowed = OR_CANCELLED | {"UNAVAILABLE"}
    async with world.client(chance) as client:
        calls = [
            asyncio.ensure_future(client.generate(asked, allowed=allowed, fault="channel closed"))
            for asked in ("long", "wide", "held")
        ]
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        await client.channel.close()
        await asyncio.gather(*calls)


async def client_killed(world: World, chance: random.Random) -> None:
    """A client's process is killed in the middle; its id is free again soon."""
    async with world.client(chance) as client:
        id, request = client.log.next_id(), world.asks["long"].SerializeToString().hex()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.soak.victim", world.address, client.owner, id, request),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        began_s = time.monotonic()
        assert process.stdout is not None
        await process.stdout.readline()
        with suppress(ProcessLookupError):  # the server refused its requests, and it has ended
            process.kill()
        await process.wait()
        killed = End(at_s=time.monotonic(), status="KILLED")
        client.log.operations.append(
            Operation(
                began_s=began_s,
                owner=client.owner,
                kind="generate",
                id=id,
                allowed=frozenset({"KILLED"}),
                fault="client killed",
                ends=[killed],
            )
        )
        until_s = killed.at_s + END_S
        while True:
            is_last = time.monotonic() > until_s
            allowed = frozenset({"OK"} if is_last else {"OK", "ALREADY_EXISTS"})
            again = await client.generate("plain", id=id, allowed=allowed, fault="id of a killed client")
            if is_last or again.end.status != "ALREADY_EXISTS":
                return
            await asyncio.sleep(0.1)


async def reader_stops(world: World, chance: random.Random) -> None:
    """A client reads nothing for a while, shorter or longer than the server waits."""
    pause_s = world.send_timeout_s * chance.choice([0.3, 1.5])

    def on_token(count: int, result: Result) -> Awaitable[None] | None:
        return asyncio.sleep(pause_s) if count == 1 else None

    allowed = {"OK"} if pause_s < world.send_timeout_s else {"RESOURCE_EXHAUSTED"}
    async with world.client(chance, options=SMALL_WINDOW) as client:
        await client.generate("wide", allowed=frozenset(allowed), fault="reader stops", on_token=on_token)


async def damaged_messages(world: World, chance: random.Random) -> None:
    """Requests with random bytes in random places."""
    async with world.client(chance) as client:
        for _ in range(DAMAGED_MESSAGES):
            data = bytearray(world.asks[chance.choice(sorted(world.asks))].SerializeToString())
            for _ in range(chance.randint(1, 4)):
                place = chance.randrange(len(data))
                data[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
            await client.generate("", request=bytes(data), allowed=DAMAGED, fault="damaged", timeout_s=2.0)


async def damaged_calls(world: World, chance: random.Random) -> None:
    """Random bytes to every method."""
    allowed = DAMAGED | {"ALREADY_EXISTS"}
    async with world.client(chance) as client:
        await asyncio.gather(
            *(
                client.send(method, chance.randbytes(chance.choice([0, 1, 10, 1000])), allowed, "damaged call")
                for method in METHODS
            )
        )


async def hostile_message(world: World, chance: random.Random) -> None:
    """16 MiB of one repeated field."""
    async with world.client(chance) as client:
        data = message(chance.choice(sorted(ENTRIES)))
        await client.generate("", request=data, allowed=REFUSED, fault="hostile")


async def refused_program(world: World, chance: random.Random) -> None:
    """A program with a vector that is not finite, at a layer that is not there, or of another width."""
    request = GenerateRequest()
    request.CopyFrom(world.asks["steered"])
    layer = request.steering.layers[0]
    tensor = layer.operations[0].add.vector.inline
    match chance.randrange(3):
        case 0:
            vector = np.frombuffer(tensor.data, np.float32).copy()
            vector[chance.randrange(vector.size)] = chance.choice([math.nan, math.inf, -math.inf])
            tensor.data = vector.tobytes()
        case 1:
            layer.layer = chance.choice([99, 2**31, 2**32 - 1])
        case _:
            tensor.data = tensor.data[:-4]
            tensor.shape[0] -= 1
    async with world.client(chance) as client:
        await client.generate("", request=request, allowed=REFUSED, fault="refused program")


async def over_quota(world: World, chance: random.Random) -> None:
    """A capture of more bytes than a client may have."""
    request = GenerateRequest()
    request.CopyFrom(world.too_large)
    async with world.client(chance) as client:
        allowed = frozenset({"RESOURCE_EXHAUSTED"})
        await client.generate("", request=request, allowed=allowed, fault="over quota")


async def duplicate_id(world: World, chance: random.Random) -> None:
    """An id is used again while it runs, by its client and by another one."""
    id, at = f"shared-{chance.getrandbits(32)}", chance.randrange(1, 10)
    async with world.client(chance) as client, world.client(chance) as other:

        async def use_again() -> None:
            allowed = frozenset({"OK", "ALREADY_EXISTS"})
            await client.generate("plain", id=id, allowed=allowed, fault="duplicate id")
            await other.generate("plain", id=id, fault="id of another client")

        def on_token(count: int, result: Result) -> Awaitable[None] | None:
            return use_again() if count == at else None

        await client.generate("long", id=id, on_token=on_token, fault="duplicate id, the first")


async def deadline(world: World, chance: random.Random) -> None:
    """Deadlines that are over at random moments."""
    async with world.client(chance) as client:
        calls = (
            client.generate(
                chance.choice(["long", "wide", "held"]),
                allowed=frozenset({"OK", "DEADLINE_EXCEEDED"}),
                fault="deadline",
                timeout_s=chance.uniform(0.001, 0.3),
            )
            for _ in range(10)
        )
        await asyncio.gather(*calls)


async def expired_capture(world: World, chance: random.Random) -> None:
    """A held capture is left alone until it expires."""
    async with world.client(chance) as client:
        result = await client.generate("held", fault="left alone")
        if result.held is not None:
            await asyncio.sleep(world.hold_s + 1.5)
            await client.fetch(result.held, allowed=MISSING, fault="expired")


async def _through_proxy(
    world: World, chance: random.Random, fault: str, allowed: frozenset[str], injure: Callable[[Proxy], Awaitable[None]]
) -> None:
    async with proxy_to(world.address) as proxy, world.client(chance, proxy.address) as client:
        calls = [
            asyncio.ensure_future(client.generate(asked, allowed=allowed, fault=fault))
            for asked in ("long", "wide", "live", "held")
        ]
        await injure(proxy)
        await asyncio.gather(*calls)


async def connection_cut(world: World, chance: random.Random) -> None:
    """The connection is reset after a random number of bytes."""

    async def injure(proxy: Proxy) -> None:
        proxy.cut_after_bytes = int(10 ** chance.uniform(1, 6))

    await _through_proxy(world, chance, "connection cut", frozenset({"OK", "UNAVAILABLE"}), injure)


async def connection_delayed(world: World, chance: random.Random) -> None:
    """Each piece of the connection comes later."""

    async def injure(proxy: Proxy) -> None:
        proxy.delay_s = chance.uniform(0.01, 0.1)

    await _through_proxy(world, chance, "connection delayed", frozenset({"OK"}), injure)


async def connection_silent(world: World, chance: random.Random) -> None:
    """Nothing passes the connection for a while, and then everything."""

    async def injure(proxy: Proxy) -> None:
        await asyncio.sleep(chance.uniform(0.0, 0.3))
        proxy.stop_forwarding()
        await asyncio.sleep(world.send_timeout_s * 0.5)
        proxy.forward_again()

    await _through_proxy(world, chance, "connection silent", frozenset({"OK"}), injure)


FAULTS: dict[str, Fault] = {
    one.__name__: one
    for one in (
        cancelled,
        cancelled_by_token,
        channel_closed,
        client_killed,
        reader_stops,
        damaged_messages,
        damaged_calls,
        hostile_message,
        refused_program,
        over_quota,
        duplicate_id,
        deadline,
        expired_capture,
        connection_cut,
        connection_delayed,
        connection_silent,
    )
}
"""Faults of clients and networks, which any server must bear."""
