"""The scenarios on the real engine: `steer serve` with a tiny random Llama."""

import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.soak.calls import channel_to, generating, outcome, request
from tests.tiny_models import CONFIGS, make_model


@dataclass(slots=True)
class RealServer:
    """A running `steer serve`."""

    process: asyncio.subprocess.Process
    address: str = ""
    starts: int = 0
    """How often its engine has begun to serve."""

    async def read(self) -> None:
        """Reads what it prints until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.startswith(b"steer: serving"):
                self.starts += 1
                self.address = line.decode().split()[-1]

    def child(self, name: str) -> psutil.Process:
        """The process of its engine whose name has `name` in it; raises StopIteration if there is none."""
        return next(one for one in psutil.Process(self.process.pid).children(recursive=True) if name in one.name())


@asynccontextmanager
async def real_process(*flags: str, **settings: Any) -> AsyncIterator[RealServer]:
    """`steer serve` with a tiny random model, these flags and settings of ServerConfig; drained after the block."""
    environment = {f"STEERLLM_{name.upper()}": str(value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "llama")
        make_model(CONFIGS["llama"], model)
        process = await asyncio.create_subprocess_exec(
            *(str(Path(sys.executable).with_name("steer")), "serve", str(model), "--port", "0"),
            *("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 29), "--max-concurrent-requests", "2048", *flags),
            env={**os.environ, **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        server = RealServer(process)
        reading = asyncio.ensure_future(server.read())
        try:
            while not server.starts:
                assert not reading.done(), "the server has ended"
                await asyncio.sleep(0.1)
            yield server
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            await reading


@asynccontextmanager
async def real_server() -> AsyncIterator[str]:
    """The address of such a server with default settings."""
    async with real_process() as server:
        yield server.address


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
