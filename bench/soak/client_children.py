"""What a client's process does in processes that it forks, and how they must end."""

import asyncio
import gc
import multiprocessing
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from bench.soak.client_calls import LAYERS
from bench.soak.client_results import Wrong
from steer_client import AsyncSteerClient, CaptureSpec, EngineFailed, SteerClient, SyncCaptureHandle

FORK = multiprocessing.get_context("fork")

CHILD_S = 20.0
"""Seconds that a child may take; one that hangs takes for ever."""

REFUSED = 7
"""Status of a child whose call was refused as it must be."""


class Parent:
    """What the children inherit."""

    def __init__(self, client: SteerClient, other: AsyncSteerClient) -> None:
        self.client = client
        self.other = other
        capture = CaptureSpec(layers=LAYERS, delivery="shared_memory_required")
        handles = client.generate(["a b c", "d e"], max_tokens=2, capture=capture).handles
        assert handles is not None
        self.handles: list[SyncCaptureHandle] = handles
        self.rows = self.handles[0].fetch()[LAYERS[0]][0]["hidden"].copy()


def _uses(parent: Parent) -> None:
    try:
        parent.client.generate("x", max_tokens=1)
    except EngineFailed as error:
        if error.reason == "FORKED":
            sys.exit(REFUSED)
        raise


def _uses_in_a_loop(parent: Parent) -> None:
    try:
        asyncio.run(parent.other.generate("x", max_tokens=1))
    except EngineFailed as error:
        if error.reason == "FORKED":
            sys.exit(REFUSED)
        raise


def _closes(parent: Parent) -> None:
    for handle in parent.handles:
        handle.close()
    parent.client.close()


def _drops(parent: Parent) -> None:
    for name in list(vars(parent)):
        delattr(parent, name)
    gc.collect()


def _reads(parent: Parent) -> None:
    np.testing.assert_array_equal(parent.handles[0].fetch()[LAYERS[0]][0]["hidden"], parent.rows)
    parent.handles[0].matrix(LAYERS[0])[:] = 0  # of this process alone


def _is_killed(_: Parent) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leaves(_: Parent) -> None:
    pass


ACTS: dict[Callable[[Parent], None], int] = {
    _uses: REFUSED,
    _uses_in_a_loop: REFUSED,
    _closes: 0,
    _drops: 0,
    _reads: 0,
    _is_killed: -signal.SIGKILL,
    _leaves: 0,
}
"""What children do, and the status with which they must end."""


def _first_of(number: int) -> Any:
    """In a worker of a pool: the first captured row."""
    return number, _inherited.handles[0].fetch()[LAYERS[0]][0]["hidden"][0]


_inherited: Parent


def fork_children(address: str, shm: dict[str, Any], chance: random.Random) -> None:
    """Forks children that do all that they can, then a pool; the parent then reads what it had.

    Raises Wrong for a child that hangs or ends with another status.
    """
    global _inherited
    with SteerClient(address, **shm) as client:
        parent = _inherited = Parent(client, AsyncSteerClient(address, **shm))
        try:
            for act in chance.sample([*ACTS], 3):
                _fork(act, parent)
            if chance.random() < 0.3:
                _pool()
            for handle in parent.handles:
                handle.fetch()
                handle.close()
            np.testing.assert_array_equal(parent.handles[0].fetch()[LAYERS[0]][0]["hidden"], parent.rows)
        finally:
            del _inherited
            asyncio.run(parent.other.close())


def _fork(act: Callable[[Parent], None], parent: Parent) -> None:
    child = FORK.Process(target=act, args=(parent,))
    child.start()
    status: int | str | None = f"no end within {CHILD_S:g} s"
    if _ends(child):
        status = child.exitcode
    else:
        os.kill(child.pid or 0, signal.SIGUSR1)  # writes where it hangs to the standard error
        time.sleep(1.0)
        child.kill()
        child.join()
    child.close()
    if status != ACTS[act]:
        raise Wrong(f"a child that {act.__name__[1:]} ended with {status} in place of {ACTS[act]}")


def _ends(child: BaseProcess) -> bool:
    """Whether a child ends in time. Its sentinel does not tell: a child of another thread may have inherited it."""
    assert child.pid is not None
    descriptor = os.pidfd_open(child.pid)
    try:
        return bool(select.select([descriptor], [], [], CHILD_S)[0])
    finally:
        os.close(descriptor)


def _pool() -> None:
    with FORK.Pool(2) as pool:
        try:
            rows = pool.map_async(_first_of, range(8)).get(CHILD_S)
        except multiprocessing.TimeoutError:
            raise Wrong("a pool of forked processes hangs") from None
        pool.close()
        until_s = time.monotonic() + CHILD_S
        for worker in pool._pool:  # type: ignore[attr-defined]
            worker.join(max(0.0, until_s - time.monotonic()))
    with suppress(ValueError):
        pool.join()
    if any(not np.array_equal(row, _inherited.rows[0]) for _, row in rows):
        raise Wrong("a worker of a pool read other rows")
