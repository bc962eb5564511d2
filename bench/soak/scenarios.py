"""The scenarios on the fake backend: each returns its figures, and raises AssertionError where one misses its bar."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from bench.soak.bomb import compressed_zeros, refused_after
from bench.soak.calls import GENERATE, Figures, channel_to, generating, idle, outcome, percentile, request
from bench.soak.hostile import ENTRIES, message, serialized
from bench.soak.overload import overload
from bench.soak.processes import fake_server, probing
from steer_service.core.capture import CaptureSpec as CoreCapture
from steer_service.core.errors import SteerError
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest as CoreRequest
from steer_service.core.specs import SteeringSpec
from steer_service.testing.fake_backend import FAKE_MODEL
from steer_service.wire.capture_pb2 import CAPTURE_DELIVERY_HELD, CaptureSpec, FetchCaptureRequest
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2 import GenerateRequest
from steer_service.wire.message_scan import model_limits, parsed, scan
from steer_service.wire.request import request_from_proto, request_to_proto
from steer_service.wire.status_codes import status_from_error


async def held_streams(count: int = 2000) -> Figures:
    """Streams that are open at once and then all complete."""
    async with fake_server(max_concurrent_requests=count, token_s=5.0) as server, channel_to(server.address) as channel:
        calls = [asyncio.ensure_future(outcome(channel, request(max_tokens=2))) for _ in range(count)]
        most = 0
        while most < count and not any(call.done() for call in calls):
            most = max(most, (await server.numbers())["running"])
            await asyncio.sleep(0.1)
        ended = await asyncio.gather(*calls)
        assert most == count, most
        assert Counter((one.code, one.tokens) for one in ended) == {("OK", 2): count}
        return {"streams held": most, "lost": 0, "memory of the server": f"{server.rss >> 20} MiB"}


async def burst(count: int = 4000) -> Figures:
    """Many calls opened at once, with hostile messages among them, while another process checks health."""
    messages = [message(field) for field in ENTRIES]
    async with fake_server(max_concurrent_requests=200, token_s=0.2) as server, channel_to(server.address) as channel:
        async with (
            probing(server.health_address) as checks,
            probing(server.address) as beside,
            channel_to(server.address) as hostile,
        ):
            calls = [asyncio.ensure_future(outcome(channel, request())) for _ in range(count)]
            bad = [await outcome(hostile, one) for one in messages]
            codes = Counter(one.code for one in await asyncio.gather(*calls))
        numbers = await idle(server, 5.0)
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"}, codes
    assert {one.code for one in bad} <= {"INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"}, bad
    figures = {
        "calls": count,
        "statuses": dict(codes),
        "refusal in the server, p99": f"{numbers['refusal_p99_s'] * 1e3:.1f} ms",
        "health from another process, worst": f"{max(checks) * 1e3:.0f} ms",
        "health, p99": f"{percentile(checks, 0.99) * 1e3:.0f} ms",
        "health on the address of all calls, worst": f"{max(beside) * 1e3:.0f} ms",
        "hostile messages of 16 MiB": len(bad),
    }
    figures["met"] = numbers["refusal_p99_s"] <= 0.02 and max(checks) <= 0.1
    return figures


async def hostile_messages() -> Figures:
    """One hostile message of every repeated field, alone: memory and time of each refusal."""
    worst_s, worst_mib = 0.0, 0.0
    async with fake_server() as server, channel_to(server.address) as channel:
        await outcome(channel, request())
        for field in ENTRIES:
            data = message(field)
            await server.numbers()
            before = server.rss
            assert (await outcome(channel, data)).code in ("INVALID_ARGUMENT", "UNIMPLEMENTED")
            while not (numbers := await server.numbers())["refused"]:
                await asyncio.sleep(0.01)  # the client has its status before the handler has ended
            worst_s = max(worst_s, numbers["refusal_p99_s"])
            worst_mib = max(worst_mib, (numbers["peak_kib"] * 1024 - before) / 2**20)
    return {
        "refusing one, worst": f"{worst_s * 1e3:.1f} ms",
        "memory, peak over before": f"{worst_mib:.0f} MiB",
        "met": worst_s <= 0.02 and worst_mib <= 32,
    }


async def cancels(count: int = 60_000, at_once: int = 100) -> Figures:
    """Calls that are cancelled at random moments; the server's memory must not follow their number."""
    chance = random.Random(1)
    async with fake_server(token_s=0.01) as server, channel_to(server.address) as channel:
        make = channel.unary_stream(GENERATE, request_serializer=serialized)

        async def cancelled() -> None:
            call = make(request(max_tokens=50))
            wait_s = chance.choice([0.0, 0.0, 0.001, 0.02])
            if wait_s:
                await asyncio.sleep(wait_s)
            call.cancel()
            try:
                await call.read()
            except (asyncio.CancelledError, grpc.aio.AioRpcError):
                return

        async def some(number: int) -> None:
            for _ in range(number // at_once):
                await asyncio.gather(*(cancelled() for _ in range(at_once)))

        await some(max(5000, count // 6))
        await idle(server)
        before, start = server.rss, time.monotonic()
        await some(count)
        seconds = time.monotonic() - start
        await idle(server)
        slope = (server.rss - before) / count
    return {
        "cancels": count,
        "per second": round(count / seconds),
        "memory of each": f"{slope:.0f} B",
        "met": slope <= 80,
    }


async def never_readers(stalled: int = 200, normal: int = 20, send_timeout_s: float = 30.0) -> Figures:
    """Clients that never read, beside clients that do."""
    spec = CaptureSpec(layers=[0, 1, 2, 3])
    prompt, width = tuple(range(1, 400)), 4096
    async with fake_server(hidden_size=width, send_timeout_s=send_timeout_s) as server:
        async with channel_to(server.address) as channel:
            alone = await _captured(channel, normal, 5.0)
            before = server.rss
            make = channel.unary_stream(GENERATE, request_serializer=serialized)
            others = [channel_to(server.address) for _ in range(stalled // 10)]
            calls = []
            for number in range(stalled):
                make = others[number % len(others)].unary_stream(GENERATE, request_serializer=serialized)
                calls.append(make(request(prompt, 1, capture=spec)))
            for call in calls:
                await call.read()
            while (await server.numbers())["stalled"] < stalled:
                await asyncio.sleep(0.05)
            began = time.monotonic()
            beside = await _captured(channel, normal, 10.0)
            held = server.rss - before - stalled * len(prompt) * width * 4  # beside the rows of the layer that is sent
            while (await server.numbers())["running"]:
                await asyncio.sleep(0.05)
            ended_s = time.monotonic() - began
            for call in calls:
                call.cancel()
            for other in others:
                await other.close()
            alone = (alone + await _captured(channel, normal, 5.0)) / 2
    return {
        "stalled streams": stalled,
        "throughput of the others": f"{beside / alone:.0%}",
        "everything of the stalled free after": f"{ended_s:.1f} s",
        "memory of a stalled stream beside its rows": f"{held / stalled / 1024:.0f} KiB",
        "met": beside / alone >= 0.9 and abs(ended_s - send_timeout_s) <= 2 and held / stalled <= 320 * 1024,
    }


async def _captured(channel: grpc.aio.Channel, at_once: int, seconds: float) -> float:
    """Requests per second, each with a small capture."""
    done, deadline = 0, time.monotonic() + seconds

    async def one() -> None:
        nonlocal done
        while time.monotonic() < deadline:
            ended = await outcome(channel, request(max_tokens=8, capture=CaptureSpec(layers=[1])))
            assert ended.code == "OK", ended
            done += 1

    await asyncio.gather(*(one() for _ in range(at_once)))
    return done / seconds


async def drains(rounds: int = 20, streams: int = 100, fetches: int = 20, grace_s: float = 5.0) -> Figures:
    """SIGTERM in the middle of streams and fetches that fit the grace."""
    slowest, failures = 0.0, Counter[str]()
    for _ in range(rounds):
        async with fake_server(hidden_size=1024, token_s=0.02, grace_s=grace_s) as server:
            async with channel_to(server.address) as channel:
                spec = CaptureSpec(layers=[0, 1], delivery=CAPTURE_DELIVERY_HELD)
                responses = [one async for one in generating(channel)(request(tuple(range(1, 500)), 1, capture=spec))]
                ids = [one.capture_held.capture_id for one in responses if one.HasField("capture_held")]
                running = [asyncio.ensure_future(outcome(channel, request(max_tokens=50))) for _ in range(streams)]
                while (await server.numbers())["running"] < streams:
                    await asyncio.sleep(0.01)
                fetched = [asyncio.ensure_future(_fetched(channel, ids[0])) for _ in range(fetches)]
                await asyncio.sleep(0.01)
                ending = asyncio.ensure_future(server.end())
                failures += Counter(
                    one.code for one in await asyncio.gather(*running) if (one.code, one.tokens) != ("OK", 50)
                )
                failures += Counter(code for code in await asyncio.gather(*fetched) if code != "OK")
                slowest = max(slowest, await ending)
    assert not failures, failures
    return {
        "drains": rounds,
        "streams and fetches in each": f"{streams} and {fetches}",
        "failures": sum(failures.values()),
        "slowest exit": f"{slowest:.1f} s (grace {grace_s:g} s)",
        "met": slowest <= grace_s + 2,
    }


async def _fetched(channel: grpc.aio.Channel, capture_id: str) -> str:
    count = 0
    try:
        async for response in CaptureServiceStub(channel).FetchCapture(FetchCaptureRequest(capture_id=capture_id)):
            count += len(response.capture_chunk.data)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK" if count == 499 * 2 * 1024 * 4 else "SHORT"


async def gzip_bomb(size: int = 1 << 30) -> Figures:
    """A message of 1 GiB that is 1 MiB on the wire."""
    bomb = compressed_zeros(size)
    async with fake_server() as server, channel_to(server.address) as channel:
        await outcome(channel, request())
        before = (await server.numbers())["peak_kib"]
        seconds = await refused_after(server.address, GENERATE, bomb)
        grown = ((await server.numbers())["peak_kib"] - before) / 1024
        assert (await outcome(channel, request())).code == "OK"
    return {
        "bytes on the wire and unpacked": f"{len(bomb) >> 10} KiB and {size >> 20} MiB",
        "refused after": f"{seconds * 1e3:.0f} ms",
        "memory, peak over before": f"{grown:.0f} MiB",
        "met": seconds <= 0.1 and grown <= 16 + 8,
    }


async def malformed(count: int = 50_000) -> Figures:
    """Damaged requests, read as the server reads them."""
    chance, limits, refused = random.Random(1), model_limits(FAKE_MODEL), Counter[str]()
    spec = SteeringSpec.simple_add(1, range(1, 9))
    prompt = TextPrompt(text="a text")
    whole = request_to_proto(CoreRequest(prompt=prompt, steering=spec, capture=CoreCapture(layers=(0, 1))))
    data, start = whole.SerializeToString(), time.monotonic()
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            damaged[place : place + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        try:
            scan(GenerateRequest.DESCRIPTOR, bytes(damaged), limits)
            request_from_proto(parsed(GenerateRequest, bytes(damaged)))
        except SteerError as error:
            refused[status_from_error(error).code.name] += 1
    assert not refused.keys() & {"UNKNOWN", "INTERNAL"}, refused
    return {"requests": count, "statuses": dict(refused), "seconds": f"{time.monotonic() - start:.1f}"}


Scenario = Callable[[], Coroutine[Any, Any, Figures]]

SCENARIOS: dict[str, Scenario] = {
    "held_streams": held_streams,
    "burst": burst,
    "hostile_messages": hostile_messages,
    "gzip_bomb": gzip_bomb,
    "malformed": malformed,
    "cancels": cancels,
    "overload": overload,
    "never_readers": never_readers,
    "drains": drains,
}
