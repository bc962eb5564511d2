"""Clients of `tests.shm_server` in processes of their own: one that is measured, and many that are killed.

`python -m tests.shm_clients cycle ADDRESS DIRECTORY` captures and releases as often as each line says, and says so.
`python -m tests.shm_clients fork ADDRESS DIRECTORY` forks a client for every line, which is its seed, says its process,
and from then on every client says its seed after whatever it has done. All end when the standard input does.
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
from steer_service.core.fake import FAKE_MODEL, encode_row, token_at
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
    _, handles = await client.generate(TokenPrompt(token_ids=tuple(prompt)), max_tokens=TOKENS, capture=spec)
    assert handles is not None
    return handles[0]


def solo(prompt: Sequence[int], layer: int) -> np.ndarray:
    """What `captured` must hold of a layer, computed here."""
    tokens = [*prompt, *(token_at(prompt, 0, number, FAKE_MODEL.vocab_size) for number in range(TOKENS))][:-1]
    return np.stack([encode_row(layer, position, token) for position, token in enumerate(tokens)])


async def check(handle: CaptureHandle, prompt: Sequence[int]) -> None:
    """Raises AssertionError unless it holds what it would if nobody else were there."""
    captures = await handle.fetch()
    assert tuple(captures) == LAYERS
    for layer in LAYERS:
        np.testing.assert_array_equal(captures[layer][0]["hidden"], solo(prompt, layer))


async def cycle(address: str, folder: str) -> None:
    lines = await told()
    async with AsyncSteerClient(address, shm_dir=folder) as client:
        say("loaded")
        while line := await lines.readline():
            numbers = iter(range(int(line)))
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(cycle_through(client, numbers))
            say(line.decode().strip())


async def cycle_through(client: AsyncSteerClient, numbers: Iterator[int]) -> None:
    for number in numbers:
        prompt = prompt_of(number)
        async with await captured(client, prompt) as handle:
            await check(handle, prompt)


async def use(address: str, folder: str, seed: int) -> None:
    """Captures, reads, keeps and releases at random without an end."""
    dice, kept, number = random.Random(seed), list[CaptureHandle](), 0
    async with AsyncSteerClient(address, shm_dir=folder) as client:
        while True:
            number += 1
            kept.append(await captured(client, prompt_of(seed, number)))
            say(f"{seed}")
            if dice.random() < 0.5:
                await check(kept[-1], prompt_of(seed, number))
                say(f"{seed}")
            if dice.random() < 0.5:
                await kept.pop(dice.randrange(len(kept))).close()
                say(f"{seed}")


def fork(address: str, folder: str) -> None:
    say("loaded")
    children, parent = list[int](), os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    asyncio.run(use(address, folder, int(line)))
            finally:
                os._exit(1)
        children.append(child)  # they are waited for at the end only: until then nobody else gets their numbers
        say(f"{int(line)} {child}")
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    if sys.argv[1] == "fork":
        fork(*sys.argv[2:])
    else:
        asyncio.run(cycle(*sys.argv[2:]))
