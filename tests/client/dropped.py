"""Programs that close no client. `python -m tests.client.dropped CASE ADDRESS SHM_DIR` runs one.

They fail with a traceback, and write nothing else to the standard error.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable

from steer_client import AsyncSteerClient, CaptureSpec, SteerClient, SyncCaptureHandle

BOUND_S = 10.0
PAUSE_S = 0.005
MAPPED = CaptureSpec(layers=(1,), delivery="shared_memory_required")
HELD = CaptureSpec(layers=(1,), delivery="held")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def ends(is_so: Callable[[], bool]) -> None:
    """Returns when it is so; fails if it is not in time."""
    pause = threading.Event()
    for _ in range(int(BOUND_S / PAUSE_S)):
        if is_so():
            return
        pause.wait(PAUSE_S)
    raise AssertionError([thread.name for thread in threading.enumerate()], descriptors())


def captured(client: SteerClient, spec: CaptureSpec) -> SyncCaptureHandle:
    handles = client.generate("a b", max_tokens=2, capture=spec).handles
    assert handles is not None
    return handles[0]


def blocking(address: str, folder: str) -> None:
    """Clients that are used and dropped leave neither threads nor descriptors."""
    keep = SteerClient(address)  # gRPC's own thread and descriptors stay while something is open
    keep.generate("a", max_tokens=1)
    threads, before = threading.active_count(), descriptors()
    for _ in range(10):
        client = SteerClient(address, shm_dir=folder)
        captured(client, MAPPED).close()
        del client
    gc.collect()
    ends(lambda: threading.active_count() == threads and descriptors() <= before + 2)
    keep.close()


def handles_of_a_dropped_client(address: str, folder: str) -> None:
    """Handles and iterators keep their client alive, which ends with the last of them."""
    held, mapped = (captured(SteerClient(address, shm_dir=folder), spec) for spec in (HELD, MAPPED))
    stream = SteerClient(address).stream("a b", max_tokens=4)
    gc.collect()
    assert held.fetch()[1][0]["hidden"].shape == mapped.fetch()[1][0]["hidden"].shape == (3, 8)
    assert len(list(stream)) >= 1
    held.close()
    mapped.close()
    del held, mapped, stream
    gc.collect()
    ends(lambda: not any(thread.name == "steer-client" for thread in threading.enumerate()))


def asynchronous(address: str, folder: str) -> None:
    """A client of an event loop that is dropped with an open session closes its connection."""

    async def main() -> None:
        keep = AsyncSteerClient(address)
        await keep.generate("a", max_tokens=1)
        before = descriptors()
        for _ in range(10):
            client = AsyncSteerClient(address, shm_dir=folder)
            _, handles = await client.generate("a b", max_tokens=2, capture=MAPPED)
            assert handles is not None
            await handles[0].close()
            del client, handles
        gc.collect()
        async with asyncio.timeout(BOUND_S):
            while descriptors() > before + 2:
                await asyncio.sleep(0.005)
        await keep.close()

    asyncio.run(main())


def left_open_at_exit(address: str, folder: str) -> None:
    """The interpreter ends although clients, handles and iterators are open."""
    global left
    client = SteerClient(address, shm_dir=folder)
    stream = client.stream("a b", max_tokens=4)
    left = client, next(stream), stream, captured(client, HELD), captured(client, MAPPED)
    captured(SteerClient(address), CaptureSpec(layers=(1,)))


def several_loops(address: str, folder: str) -> None:
    """Loops in many threads, and one after the other, with one client and with one each."""
    shared, blocking = AsyncSteerClient(address, shm_dir=folder), SteerClient(address)

    async def call(client: AsyncSteerClient, times: int) -> None:
        for _ in range(times):
            await asyncio.gather(*(client.generate(["a", "b"], max_tokens=2) for _ in range(4)))
        _, handles = await client.generate("a b", max_tokens=2, capture=MAPPED)
        assert handles is not None
        await handles[0].close()

    async def own() -> None:
        async with AsyncSteerClient(address, shm_dir=folder) as client:
            await call(client, 8)

    def work() -> None:
        asyncio.run(call(shared, 8))
        asyncio.run(own())
        for _ in range(8):
            blocking.generate("a", max_tokens=2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(5):
        asyncio.run(call(shared, 1))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(call(shared, 1))
    loop.run_until_complete(shared.close())
    loop.close()
    blocking.close()


CASES = {
    case.__name__: case
    for case in (blocking, handles_of_a_dropped_client, asynchronous, left_open_at_exit, several_loops)
}

if __name__ == "__main__":
    CASES[sys.argv[1]](*sys.argv[2:])
