"""The scenarios on the real engine: `steer serve` with a tiny random Llama."""

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from bench.soak.calls import channel_to, generating, outcome, request
from tests.tiny_models import CONFIGS, make_model


@asynccontextmanager
async def real_server() -> AsyncIterator[str]:
    """The address of `steer serve` with a tiny random model; it is drained after the block."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "llama")
        make_model(CONFIGS["llama"], model)
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).with_name("steer")), "serve", str(model), "--port", "0"),
            *("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 29), "--max-concurrent-requests", "2048"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        try:
            while not (line := (await process.stdout.readline()).decode()).startswith("steer: serving"):
                assert line, "the server has ended"
            yield line.split()[-1]
        finally:
            process.terminate()
            await process.wait()


async def streams(count: int = 1000, tokens: int = 16) -> dict[str, Any]:
    """Many streams at once, all of which complete."""
    async with real_server() as address, channel_to(address) as channel:
        start = time.monotonic()
        calls = (outcome(channel, request((1, 2, 3 + number), tokens)) for number in range(count))
        ended = Counter((one.code, one.tokens) for one in await asyncio.gather(*calls))
        seconds = time.monotonic() - start
    complete = sum(number for (code, _), number in ended.items() if code == "OK")
    return {"streams at once": count, "complete": complete, "seconds": f"{seconds:.1f}", "met": complete == count}


async def cancels(count: int = 2000, at_once: int = 50) -> dict[str, Any]:
    """Requests that are cancelled at random moments; afterwards the engine serves as before."""
    chance = random.Random(1)
    async with real_server() as address, channel_to(address) as channel:

        async def cancelled(number: int) -> None:
            call = generating(channel)(request((1, 2, 3 + number % 1000), 400))
            await asyncio.sleep(chance.choice([0.0, 0.01, 0.1]))
            call.cancel()
            try:
                await call.read()
            except (asyncio.CancelledError, grpc.aio.AioRpcError):
                return

        start = time.monotonic()
        for first in range(0, count, at_once):
            await asyncio.gather(*(cancelled(first + number) for number in range(at_once)))
        seconds, probe = time.monotonic() - start, await outcome(channel, request((5, 6, 7), 4))
    return {
        "cancels": count,
        "seconds": f"{seconds:.1f}",
        "first token of a request right after": f"{probe.first_s * 1e3:.0f} ms",
        "met": probe.code == "OK" and probe.tokens == 4,
    }


SCENARIOS = {"real_streams": streams, "real_cancels": cancels}
