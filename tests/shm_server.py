"""A gRPC server around the fake backend whose captures lie in shared memory, for tests that count and kill.

`python -m tests.shm_server DIRECTORY [TOGETHER]` says that it is loaded; at the first line it is told it listens on a
free port and says where; each further line it answers with what it holds, as JSON. It ends in order when its standard
input ends. With TOGETHER no request gets its second token before so many requests wait for theirs.
"""

import asyncio
import collections
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.fake import FakeBackend
from steer_service.core.held import SegmentPlace, in_order
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory

BUDGET = 1 << 30
ALIGNMENT = 64


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


def placed(pool: SegmentPool, captured: CapturedRows) -> tuple[CapturedRows, SegmentPlace, Callable[[], None]]:
    """A copy of the rows in a segment, where they lie in it, and what frees it."""
    blocks = in_order(captured)
    sizes = [-(-hidden.nbytes // ALIGNMENT) * ALIGNMENT for _, _, hidden in blocks]
    segment = pool.acquire(max(ALIGNMENT, sum(sizes)))
    offsets = itertools.accumulate(sizes, initial=0)
    place = SegmentPlace(name=segment.name, size=segment.size)
    arrays: dict[CaptureSite, dict[int, np.ndarray]] = {CaptureSite.BEFORE: {}, CaptureSite.AFTER: {}}
    for (layer, site, hidden), offset in zip(blocks, offsets, strict=False):
        arrays[site][layer] = np.ndarray(hidden.shape, hidden.dtype, segment.memory, offset)
        arrays[site][layer][:] = hidden
        place.offsets[layer, site] = offset
    there = CapturedRows(before=arrays[CaptureSite.BEFORE], after=arrays[CaptureSite.AFTER], spans=captured.spans)
    return there, place, partial(pool.release, segment)


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
    pool = SegmentPool(BUDGET, SegmentDirectory(path=Path(folder)))
    backend = FakeBackend(place=partial(placed, pool))
    server = SteerServer(ServerConfig(address="127.0.0.1:0", shm_dir=folder, grace_s=0.0))
    address = await server.listen()
    await server.open(backend)
    say(address)
    backend.requests = collections.deque(maxlen=1)  # type: ignore[assignment]  # what it remembers of each would grow
    if together:
        backend.step = Together(together)
    while await lines.readline():
        say(json.dumps({"running": backend.running, "holding": backend.holding, "bytes": pool.reserved_bytes}))
    server.hurry()
    await server.drain()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
