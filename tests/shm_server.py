"""A gRPC server around the fake backend whose captures lie in shared memory, for tests that count and kill.

`python -m tests.shm_server DIRECTORY [TOGETHER]` says that it is loaded; at the first line it is told it listens on a
free port and says where; each further line it answers with what it holds, as JSON. It ends in order when its standard
input ends. With TOGETHER no request gets its second token before so many requests wait for theirs.
"""

import asyncio
import collections
import json
import os
import sys
from pathlib import Path

from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena


class Together:
    """Holds requests before their second token until `count` of them wait there; what comes later passes."""

    def __init__(self, count: int) -> None:
        self.waiting = 0
        self._count = count
        self._all_there = asyncio.Event()

    async def __call__(self, number: int) -> None:
        if number == 1:
            self.waiting += 1
            if self.waiting == self._count:
                self._all_there.set()
            await self._all_there.wait()


def say(line: str) -> None:
    """A line to whoever started this process."""
    os.write(1, f"{line}\n".encode())  # in one piece, whoever else writes there


async def told() -> asyncio.StreamReader:
    """The lines of whoever started this process."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    return lines


async def main(folder: str, together: int = 0) -> None:
    lines = await told()
    say("loaded")
    if not await lines.readline():
        return
    arena = Arena(Path(folder))
    backend = FakeBackend(place=arena)
    server = SteerServer(ServerConfig(address="127.0.0.1:0", shm_dir=folder, grace_s=0.0))
    address = await server.listen()
    await server.open(backend)
    say(address)
    backend.requests = collections.deque(maxlen=1)  # type: ignore[assignment]  # what it remembers of each would grow
    if together:
        backend.step = Together(together)
    while await lines.readline():
        say(json.dumps({"running": backend.running, "holding": backend.holding, "bytes": arena.pool.reserved_bytes}))
    server.stop_now()
    await server.drain()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
