"""Measures how fast captures reach a client, and how much live ones slow down tokens: `python -m bench.captures`."""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import raw_stream
from bench.results import add_arguments, keep
from steer_client import (
    AsyncSteerClient,
    CaptureBlock,
    CaptureDelivery,
    CaptureHeld,
    CaptureSite,
    CaptureSpec,
    GenerateRequest,
    SamplingOptions,
    TokenDelta,
    TokenPrompt,
)
from steer_service.cli.server_process import ServerProcess
from steer_service.core.stored_capture import in_order
from steer_service.wire.blocks import DEFAULT_CHUNK_BYTES

LAYERS = 30
ROWS = 1950
"""Rows of a capture of all layers, before and after steering, in float32: 257 MiB."""
TOTAL = ROWS * LAYERS * 2 * 576 * 4
"""Bytes of that capture."""
STREAMS = 16
LIVE_TOKENS = 48
LIVE_LAYER = 15

WHOLE = CaptureSpec(layers=tuple(range(LAYERS)), site=CaptureSite.BOTH, dtype="float32")


def prompt(number: int, tokens: int) -> TokenPrompt:
    """Random tokens, different for every number."""
    chance = random.Random(number)
    return TokenPrompt(token_ids=[chance.randrange(100, 40_000) for _ in range(tokens)])


@dataclass(slots=True)
class Delivery:
    """The times of one delivered capture."""

    received_s: float = 0.0
    """From the last token until all rows were checked and in arrays, without `reduced_s`."""
    reduced_s: float = 0.0
    """Time to add up all numbers."""

    def reduce(self, hidden: npt.NDArray[Any]) -> None:
        """Adds up the numbers of some rows."""
        start = time.perf_counter()
        assert np.isfinite(np.add.reduce(hidden, axis=None))
        self.reduced_s += time.perf_counter() - start


async def timed_delivery(client: AsyncSteerClient, delivery: CaptureDelivery) -> Delivery:
    """Delivers a capture and adds up its numbers."""
    request = GenerateRequest(
        prompt=prompt(0, ROWS),
        sampling=SamplingOptions(max_tokens=1),
        capture=replace(WHOLE, delivery=delivery),
    )
    done, start, end, count = Delivery(), 0.0, 0.0, 0
    async for event in client.submit(request):
        match event:
            case TokenDelta():
                start = time.perf_counter()
            case CaptureBlock():
                done.reduce(event.hidden)
                count += event.hidden.nbytes
                end = time.perf_counter()
            case CaptureHeld():
                rows = await event.held.rows()
                for _, _, hidden in in_order(rows):
                    done.reduce(hidden)
                    count += hidden.nbytes
                end = time.perf_counter()
                await event.held.release()
    assert count == TOTAL
    done.received_s = end - start - done.reduced_s
    return done


async def timed_raw(client: AsyncSteerClient, address: str) -> float:
    """GiB/s of a bare gRPC stream, with the engine as busy as after a capture's last token."""
    await client.generate([prompt(1, 16)], max_tokens=1)
    total = TOTAL // DEFAULT_CHUNK_BYTES * DEFAULT_CHUNK_BYTES
    start = time.perf_counter()
    assert await raw_stream.read(address, total, DEFAULT_CHUNK_BYTES) == total
    return total / (time.perf_counter() - start) / 2**30


async def timed_gaps(client: AsyncSteerClient, number: int, *, is_live: bool) -> float:
    """The 95th percentile of the time between two tokens of a token stream, in ms, with all token streams in flight."""

    async def one(stream: int) -> list[float]:
        capture = CaptureSpec(layers=(LIVE_LAYER,), is_live=True) if is_live else None
        sampling = SamplingOptions(max_tokens=LIVE_TOKENS, ignore_eos=True, temperature=0.0)
        request = GenerateRequest(prompt=prompt(1000 + 100 * number + stream, 16), sampling=sampling, capture=capture)
        events = client.submit(request)
        times = [time.perf_counter() async for event in events if isinstance(event, TokenDelta)]
        return list(np.diff(times[1:]))  # the first step computes prompts

    gaps = await asyncio.gather(*[one(stream) for stream in range(STREAMS)])
    return quantiles([gap * 1000 for part in gaps for gap in part], n=20)[-1]


@asynccontextmanager
async def raw_server() -> AsyncIterator[str]:
    """Starts a bare gRPC server in a process of its own, and yields its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.raw_stream", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


async def measure(rounds: int) -> dict[str, Any]:
    """All results, each the median over the rounds; the parts of a round run one after the other."""
    inline, reduced, raw, shared, plain, live = ([] for _ in range(6))
    flags = ["--dtype", "float32", "--max-model-len", "4096", "--kv-cache-memory-bytes", str(1 << 30)]
    async with raw_server() as address, ServerProcess([*flags, "--disable-log-stats"]) as server:
        await server.wait_until_serving()
        async with AsyncSteerClient(server.address) as client:
            for number in range(-1, rounds):
                by_stream = await timed_delivery(client, CaptureDelivery.INLINE)
                bare = await timed_raw(client, address)
                by_memory = await timed_delivery(client, CaptureDelivery.SHARED_MEMORY_REQUIRED)
                results = (
                    TOTAL / 2**30 / by_stream.received_s,
                    TOTAL / 2**30 / (by_stream.received_s + by_stream.reduced_s),
                    bare,
                    TOTAL / 2**30 / (by_memory.received_s + by_memory.reduced_s),
                    await timed_gaps(client, 2 * number, is_live=False),
                    await timed_gaps(client, 2 * number + 1, is_live=True),
                )
                print(f"round {number + 1}: " + ", ".join(f"{result:.3g}" for result in results), file=sys.stderr)
                if number >= 0:  # the first warms up
                    for kept, result in zip((inline, reduced, raw, shared, plain, live), results, strict=True):
                        kept.append(result)
    return {
        "inline_gib_per_s": median(inline),
        "raw_grpc_gib_per_s": median(raw),
        "shm_gib_per_s": median(shared),
        "shm_vs_inline": median(b / a for a, b in zip(reduced, shared, strict=True)),
        "inline_vs_raw_grpc": median(a / b for a, b in zip(inline, raw, strict=True)),
        "live_itl_ratio": median(b / a for a, b in zip(plain, live, strict=True)),
        "plain_itl_p95_ms": median(plain),
    }


def main() -> None:
    """Measures and prints; `--out` adds the results to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.captures", description=__doc__)
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    keep({name: round(result, 4) for name, result in asyncio.run(measure(options.rounds)).items()}, options.out)


if __name__ == "__main__":
    main()
