"""Clients in processes of their own: one that is measured, and many that are killed.

`python -m tests.shm_clients cycle ORACLE ADDRESS DIRECTORY` captures and releases as often as each line says, and says
so. `python -m tests.shm_clients fork ORACLE ADDRESS DIRECTORY` forks a client for every line, which is its seed, says
its process, and from then on every client says its seed after whatever it has done. All compare what they capture with
the oracle of that name, and end when the standard input does.
"""

import asyncio
import ctypes
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from steer_client import AsyncSteerClient, CaptureDelivery, CaptureHandle, CaptureSpec, TokenPrompt
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.oracles import ORACLES, Oracle
from tests.shm_server import say, told

LAYERS = (1, 3)
TOKENS = 3
SHARED = CaptureDelivery.SHARED_MEMORY_REQUIRED
AT_ONCE = 4
"""Captures that a measured client has under way."""
PR_SET_PDEATHSIG = 1


def prompt_of(*numbers: int) -> tuple[int, ...]:
    """A prompt that is unlike those of other numbers, with two tokens more than numbers."""
    return (7, *(number % FAKE_MODEL.vocab_size for number in numbers), 9)


async def captured(
    client: AsyncSteerClient, prompt: Sequence[int], delivery: CaptureDelivery = SHARED
) -> CaptureHandle:
    """The handle of what a short answer to `prompt` leaves."""
    spec = CaptureSpec(layers=LAYERS, delivery=delivery)
    _, handles = await client.generate(
        TokenPrompt(token_ids=tuple(prompt)), max_tokens=TOKENS, temperature=0.0, capture=spec
    )
    assert handles is not None
    return handles[0]


def solo(prompt: Sequence[int], oracle: Oracle) -> dict[int, np.ndarray]:
    """What `captured` must hold of each layer, computed here; the last token is never fed."""
    return oracle.rows([*prompt, *oracle.greedy_tokens(prompt, TOKENS - 1)], LAYERS)


async def check(handle: CaptureHandle, prompt: Sequence[int], oracle: Oracle) -> None:
    """Raises AssertionError unless it holds what it would if nobody else were there."""
    captures, expected = await handle.fetch(), solo(prompt, oracle)
    assert tuple(captures) == tuple(expected)
    for layer, rows in expected.items():
        np.testing.assert_array_equal(captures[layer][0]["hidden"], rows)


async def cycle(oracle: Oracle, address: str, folder: str) -> None:
    lines = await told()
    async with AsyncSteerClient(address, shm_dir=folder) as client:
        say("loaded")
        while line := await lines.readline():
            numbers = iter(range(int(line)))
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(cycle_through(client, numbers, oracle))
            say(line.decode().strip())


async def cycle_through(client: AsyncSteerClient, numbers: Iterator[int], oracle: Oracle) -> None:
    for number in numbers:
        prompt = prompt_of(number)
        async with await captured(client, prompt) as handle:
            await check(handle, prompt, oracle)


async def use(oracle: Oracle, address: str, folder: str, seed: int) -> None:
    """Captures, reads, keeps and releases at random without an end."""
    dice, kept, number = random.Random(seed), list[CaptureHandle](), 0
    async with AsyncSteerClient(address, shm_dir=folder) as client:
        while True:
            number += 1
            kept.append(await captured(client, prompt_of(seed, number)))
            say(f"{seed}")
            if dice.random() < 0.5:
                await check(kept[-1], prompt_of(seed, number), oracle)
                say(f"{seed}")
            if dice.random() < 0.5:
                await kept.pop(dice.randrange(len(kept))).close()
                say(f"{seed}")


def fork(oracle: Oracle, address: str, folder: str) -> None:
    say("loaded")
    children, parent = list[int](), os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    asyncio.run(use(oracle, address, folder, int(line)))
            finally:
                os._exit(1)
        children.append(child)  # they are waited for at the end only: until then nobody else gets their numbers
        say(f"{int(line)} {child}")
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    what, oracle, *where = sys.argv[1:]
    if what == "fork":
        fork(ORACLES[oracle], *where)
    else:
        asyncio.run(cycle(ORACLES[oracle], *where))
