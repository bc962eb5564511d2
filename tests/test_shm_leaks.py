"""Shared memory through the public surface: whatever dies, whenever, nothing of it stays and nobody else notices.

Around the fake backend, where a kill costs little; tests/engine/test_real_leaks.py does the same to vLLM.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from steer_client import AsyncSteerClient
from tests.leak_checks import (
    CLEAN_S,
    CLIENTS,
    DROPPED,
    FREED_S,
    captures_at_once_are_solo_captures,
    cycles_leave_nothing,
    killed_clients_are_freed,
    killed_under_load,
    plant_foreign_files,
)
from tests.oracles import FAKE, ORACLES, Oracle
from tests.processes import Process, loaded_server, report, segments, until
from tests.raw_client import RawClient
from tests.shm_clients import LAYERS, captured, check, prompt_of, solo

pytestmark = [DROPPED, pytest.mark.slow, pytest.mark.timeout(1200)]

NOTHING = {"running": 0, "holding": 0, "bytes": 0}


@asynccontextmanager
async def serving(shm_folder: Path, together: int = 0) -> AsyncIterator[tuple[Process, str]]:
    """A server and its address."""
    async with loaded_server(shm_folder, together) as server:
        yield server, await server.ask()


async def facts(server: Process) -> dict[str, int]:
    answer: dict[str, int] = json.loads(await server.ask())
    return answer


async def until_facts(server: Process, wanted: dict[str, int], bound_s: float) -> dict[str, int]:
    async with asyncio.timeout(bound_s):
        while True:
            found = await facts(server)
            if wanted.items() <= found.items():
                return found


@pytest.mark.parametrize(("warm_up", "count"), [(1000, 1500), pytest.param(1000, 10_000, marks=pytest.mark.extended)])
async def test_cycles_of_capture_hand_over_and_release_leave_nothing(
    warm_up: int, count: int, shm_folder: Path
) -> None:
    async with serving(shm_folder) as (server, address):
        await cycles_leave_nothing([server.about], address, shm_folder, FAKE, warm_up=warm_up, count=count)
        assert await facts(server) == NOTHING
    assert os.listdir(shm_folder) == []


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.extended)])
async def test_a_server_that_was_killed_leaves_nothing_once_another_listens(kills: int, shm_folder: Path) -> None:
    dice, left, seconds = random.Random(4), [], []
    check_foreign_files = plant_foreign_files(shm_folder)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(loaded_server(shm_folder))
        address = await server.ask()
        for _ in range(kills):
            following = await stack.enter_async_context(loaded_server(shm_folder))  # what takes time is to load
            left.append(await killed_under_load(server.kill, address, shm_folder, FAKE, dice))
            start = time.monotonic()
            following.tell()
            await until(lambda: not segments(shm_folder), CLEAN_S)
            seconds.append(time.monotonic() - start)
            check_foreign_files()
            server, address = following, await following.line()
    report(
        f"{kills} kills of the server left {sum(left)} segments, at most {max(left)} at once; "
        f"the next removed them within {max(seconds):.2f} s"
    )
    assert sum(left) > 0, "no kill met a segment"
    check_foreign_files()
    assert {name for name in os.listdir(shm_folder) if not name.endswith("foreign")} == set()


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.extended)])
async def test_captures_of_killed_clients_are_freed_and_others_continue(kills: int, shm_folder: Path) -> None:
    async with serving(shm_folder) as (server, address):

        async def settled() -> None:
            holding = await until_facts(server, {"running": 0, "holding": 3}, FREED_S)
            assert holding["bytes"] > 0

        await killed_clients_are_freed(address, shm_folder, FAKE, kills, settled)
        assert await facts(server) == NOTHING


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda path: os.truncate(path, 0), id="truncates"),
        pytest.param(os.unlink, id="unlinks"),
        pytest.param(lambda path: path.write_bytes(b"x" * 10_000), id="overwrites"),
    ],
)
async def test_a_client_that_damages_its_segment_does_not_affect_others(
    harm: Callable[[Path], object], shm_folder: Path
) -> None:
    async with serving(shm_folder) as (server, address), grpc.aio.insecure_channel(address) as channel:
        vandal = RawClient(channel, "vandal")
        async with (
            vandal.session(shm_folder) as session,
            AsyncSteerClient(address, shm_dir=str(shm_folder)) as client,
        ):
            before = await captured(client, prompt_of(1))
            region = await vandal.region(session, prompt_of(2))
            harm(shm_folder / region.segment_name)

            # Not even its owner can make the server read what somebody else may have shortened.
            assert await vandal.fetch(region.lease_token.decode()) == grpc.StatusCode.NOT_FOUND
            await check(before, prompt_of(1), FAKE)
            async with await captured(client, prompt_of(3)) as after:
                await check(after, prompt_of(3), FAKE)
            await vandal.release(region.lease_token)
            await vandal.region(session, prompt_of(4))
            await before.close()
        await until_facts(server, NOTHING, FREED_S)
        assert segments(shm_folder) == set()
        assert server.is_alive


async def test_a_thousand_captures_at_once_equal_their_solo_captures_and_belong_to_their_client(
    shm_folder: Path,
) -> None:
    each = 100
    async with serving(shm_folder, together=CLIENTS * each) as (server, address):
        await captures_at_once_are_solo_captures(address, shm_folder, FAKE, each)
        assert await facts(server) == NOTHING


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_solo_captures_of_different_prompts_differ(oracle: Oracle) -> None:
    prompts = [prompt_of(one, number) for one in range(CLIENTS) for number in range(100)]

    assert len({solo(prompt, oracle)[LAYERS[0]].tobytes() for prompt in prompts}) == len(prompts) == 1000
