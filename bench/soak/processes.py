"""The processes of a scenario: the server that is measured, and a prober of its health."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

PROBE_EVERY_S = 0.02

ANY = "127.0.0.1:0"
"""A free port of this host."""


class Server:
    """A running fake server."""

    def __init__(self, process: asyncio.subprocess.Process, address: str, health_address: str) -> None:
        self.process = process
        self.address = address
        self.health_address = health_address
        self.about = psutil.Process(process.pid)
        self._asking = asyncio.Lock()  # one line at a time

    async def numbers(self) -> dict[str, Any]:
        """What the server counts about itself."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        async with self._asking:
            self.process.stdin.write(b"\n")
            return dict(json.loads(await self.process.stdout.readline()))

    @property
    def rss(self) -> int:
        """Its resident memory, in bytes."""
        return int(self.about.memory_info().rss)

    async def end(self) -> float:
        """Sends SIGTERM; returns the seconds until it has ended. Raises RuntimeError for a status that is not 0."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = await self.process.wait()
        if status:
            raise RuntimeError(f"the server ended with status {status}")
        return time.monotonic() - start


@asynccontextmanager
async def fake_server(
    at_once: int = 0, token_s: float = 0.0, hidden_size: int = 8, shared_bytes: int = 0, **settings: Any
) -> AsyncIterator[Server]:
    """A fake server with these settings of ServerConfig; it is killed if the block leaves it running."""
    environment = {f"STEERLLM_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.soak.fake_server", str(at_once or 100_000), str(token_s)),
        *(str(hidden_size), str(shared_bytes)),
        env={**os.environ, "STEERLLM_ADDRESS": ANY, "STEERLLM_HEALTH_ADDRESS": ANY, **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield Server(process, *(await process.stdout.readline()).decode().split())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def probing(address: str) -> AsyncIterator[list[float]]:
    """Checks health from another process while the block runs; afterwards the list has the seconds of each check."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.soak.processes", address),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.readline()  # it has made its first check
    seconds: list[float] = []
    try:
        yield seconds
    finally:
        out, _ = await process.communicate(b"\n")
        seconds += json.loads(out)


async def _probe(address: str) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stop.set)
    seconds = []
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        await check(health_pb2.HealthCheckRequest())
        print("probing", flush=True)
        while not stop.is_set():
            start = time.perf_counter()
            await check(health_pb2.HealthCheckRequest())
            seconds.append(time.perf_counter() - start)
            await asyncio.sleep(PROBE_EVERY_S)
    print(json.dumps(seconds))


if __name__ == "__main__":
    asyncio.run(_probe(sys.argv[1]))
