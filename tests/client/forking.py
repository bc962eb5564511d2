"""Programs that fork while a client is open. `python -m tests.client.forking CASE ADDRESS SHM_DIR [COUNT]` runs one.

They fail with a traceback, and write nothing else to the standard error.
"""

import asyncio
import gc
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable, Generator

import numpy as np
import pytest

from steer_client import AsyncSteerClient, CaptureSpec, EngineFailed, SteerClient, SyncCaptureHandle

CHILD_S = 8.0
"""Seconds that a child may take; one that hangs takes for ever."""

MAPPED = CaptureSpec(layers=(1,), delivery="shared_memory_required")
HELD = CaptureSpec(layers=(1,), delivery="held")
LONG = 30
"""Tokens of the response that is in flight while the program forks; the test holds it up before the last of them."""


def ends(child: int) -> int:
    """The status with which a child ended; kills it if it takes too long."""
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], CHILD_S)[0]:
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"a child hangs: {os.waitpid(child, 0)}")
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(call: Callable[[], object]) -> None:
    """Raises AssertionError unless `call` is refused with the reason."""
    with pytest.raises(EngineFailed, match="spawn or forkserver") as raised:
        call()
    assert raised.value.reason == "FORKED"


class Parent:
    """What a process has when it forks: a client in use, captures of every kind, and a response in flight."""

    def __init__(self, address: str, folder: str) -> None:
        self.address = address
        self.unused = SteerClient(address)
        self.client = SteerClient(address, timeout_s=60.0, shm_dir=folder)
        self.read, self.mapped, self.held = self.captured(MAPPED), self.captured(MAPPED), self.captured(HELD)
        self.rows = self.read.fetch()[1][0]["hidden"].copy()
        self.stream = self.client.stream("a b", max_tokens=LONG)
        self.pieces = [next(self.stream)]

    def captured(self, spec: CaptureSpec) -> SyncCaptureHandle:
        handles = self.client.generate("a b c", max_tokens=2, temperature=0.0, capture=spec).handles
        assert handles is not None
        return handles[0]


def uses(parent: Parent) -> None:
    refused(lambda: parent.client.generate("x", max_tokens=2))
    refused(lambda: parent.client.tokenize("x"))
    refused(lambda: parent.client.info)
    refused(parent.held.fetch)
    refused(lambda: next(parent.stream))


def makes_a_client(parent: Parent) -> None:
    with SteerClient(parent.address, timeout_s=5.0) as client:
        refused(lambda: client.generate("x", max_tokens=2))
        refused(lambda: client.hidden_size)
    with parent.unused as client:
        refused(lambda: client.generate("x", max_tokens=2))


def makes_an_asynchronous_client(parent: Parent) -> None:
    async def main() -> None:
        async with AsyncSteerClient(parent.address, timeout_s=5.0) as client:
            await client.generate("x", max_tokens=2)

    refused(lambda: asyncio.run(main()))


def closes(parent: Parent) -> None:
    for handle in (parent.read, parent.mapped, parent.held):
        handle.close()
    parent.stream.close()
    parent.client.close()


def drops(parent: Parent) -> None:
    for name in list(vars(parent)):
        delattr(parent, name)
    gc.collect()


def reads(parent: Parent) -> None:
    for handle in (parent.read, parent.mapped):
        np.testing.assert_array_equal(handle.fetch()[1][0]["hidden"], parent.rows)
    parent.read.matrix(1)[:] = 0  # of this process alone


def is_killed(_: Parent) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(_: Parent) -> None:
    pass


ACTS = (uses, makes_a_client, makes_an_asynchronous_client, closes, drops, reads, is_killed, leaves)


class Cycle:
    """Garbage that only the garbage collector finds, as calls that failed are. Only its own process may free it."""

    def __init__(self) -> None:
        self.itself = self
        self.process = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            raise AssertionError("a child frees what its parent has left")


def acting(act: Callable[[Parent], None], parent: Parent, *, is_orderly: bool) -> int:
    """A child that does something and ends: as a whole program does, or at once."""
    Cycle()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        act(parent)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if not is_orderly:
        os._exit(status)
    sys.exit(status)


def open_client(address: str, folder: str, count: str) -> None:
    """Forks `count` children, which do all that they can; the parent then uses everything that it has."""
    parent = Parent(address, folder)
    for number in range(int(count)):
        act = ACTS[number % len(ACTS)]
        status = ends(acting(act, parent, is_orderly=number // len(ACTS) % 8 == 0))
        assert status == (-signal.SIGKILL if act is is_killed else 0), (number, act, status)
    print("forked", flush=True)
    parent.pieces.extend(parent.stream)
    with SteerClient(address) as other:
        assert "".join(parent.pieces) == "".join(other.stream("a b", max_tokens=LONG))
    for handle in (parent.read, parent.mapped, parent.held):
        with handle:
            np.testing.assert_array_equal(handle.fetch()[1][0]["hidden"], parent.rows)
            np.testing.assert_array_equal(handle.fetch_rows().hidden[1], parent.rows)
    parent.client.close()


def unused_client(address: str, _: str) -> None:
    """A client that was only made is used in children, however they are forked."""
    client = SteerClient(address, timeout_s=CHILD_S)

    def use() -> None:
        assert client.generate("x", max_tokens=2).texts == SteerClient(address).generate("x", max_tokens=2).texts

    child = os.fork()
    if not child:
        use()
        sys.exit(0)
    assert ends(child) == 0
    worker = multiprocessing.get_context("fork").Process(target=use)
    worker.start()
    worker.join(CHILD_S)
    assert worker.exitcode == 0
    use()
    client.close()
    child = os.fork()  # nothing of gRPC is open any more
    if not child:
        with SteerClient(address) as other:
            other.generate("x", max_tokens=2)
        sys.exit(0)
    assert ends(child) == 0


def in_a_coroutine(address: str, folder: str) -> None:
    """A program with an event loop starts workers while it awaits a response."""

    async def main() -> None:
        async with AsyncSteerClient(address, timeout_s=60.0, shm_dir=folder) as client:
            _, handles = await client.generate("a b c", max_tokens=2, capture=MAPPED)
            assert handles is not None
            rows = (await handles[0].fetch())[1][0]["hidden"].copy()
            stream = client.stream("a b", max_tokens=LONG)
            pieces = [await anext(stream)]
            waiting = asyncio.create_task(client.generate("a b", max_tokens=LONG))

            async def use() -> None:
                async with handles[0]:
                    np.testing.assert_array_equal((await handles[0].fetch())[1][0]["hidden"], rows)
                await client.generate("x", max_tokens=2)

            def work() -> None:
                refused(lambda: asyncio.run(use()))
                asyncio.run(client.close())
                gc.collect()

            for _ in range(5):
                worker = multiprocessing.get_context("fork").Process(target=work)
                worker.start()
                await asyncio.to_thread(worker.join, CHILD_S)
                assert worker.exitcode == 0, worker.exitcode
            print("forked", flush=True)
            pieces += [piece async for piece in stream]
            assert (await waiting).texts == ["".join(pieces)]
            await handles[0].close()

    asyncio.run(main())


def data_loader(address: str, folder: str) -> None:
    """Workers of a DataLoader read captures that their parent has mapped; some of them are mapped and not fetched."""
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __init__(self, handles: list[SyncCaptureHandle]) -> None:
            self.handles = handles

        def __len__(self) -> int:
            return len(self.handles)

        def __getitem__(self, index: int) -> np.ndarray:
            return self.handles[index].fetch()[1][0]["hidden"]

    def batches() -> Generator[object, None, None]:
        for batch in DataLoader(rows, batch_size=2, num_workers=2, multiprocessing_context="fork"):
            yield batch.numpy()

    with SteerClient(address, shm_dir=folder) as client:
        captured = client.generate([f"a b {number}" for number in range(8)], max_tokens=2, capture=MAPPED)
        assert captured.handles is not None
        rows = Rows(captured.handles)
        for handle in rows.handles[:4]:
            handle.fetch()
        first, second = np.concatenate([*batches()]), np.concatenate([*batches()])  # the second epoch forks anew
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, np.stack([rows[index] for index in range(len(rows))]))
        client.fetch_all(rows.handles)
        for handle in rows.handles:
            handle.close()


def failed_client(address: str, _: str) -> None:
    """A client whose call failed is closed; the error, which somebody keeps, must not keep gRPC's threads."""
    client = SteerClient("127.0.0.1:9", timeout_s=CHILD_S)
    with pytest.raises(EngineFailed, match="no server answers"):
        client.generate("x", max_tokens=2)
    client.close()
    child = os.fork()
    if not child:
        with SteerClient(address, timeout_s=CHILD_S) as other:
            other.generate("x", max_tokens=2)
        sys.exit(0)
    assert ends(child) == 0


CASES = {case.__name__: case for case in (open_client, unused_client, failed_client, in_a_coroutine, data_loader)}

if __name__ == "__main__":
    CASES[sys.argv[1]](*sys.argv[2:])
