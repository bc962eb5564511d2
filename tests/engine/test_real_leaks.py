"""Shared memory through `steer serve` on vLLM: whatever dies, whenever, nothing of it stays and nobody else notices.

On the deterministic model, whose rows are whole numbers in float32: what a capture must hold is known bit for bit,
whatever else is in the batch.
"""

import asyncio
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from steer_client import CaptureSite, load_captures
from steer_service.formats.capture_dataset import shard_name, tensor_name
from tests.engine.deterministic_model.serving import RealServer, listening, servable_model, serving
from tests.leak_checks import (
    CLEAN_S,
    CLIENTS,
    DROPPED,
    captures_at_once_are_solo_captures,
    cycles_leave_nothing,
    killed_clients_are_freed,
    killed_under_load,
    plant_foreign_files,
)
from tests.oracles import DETERMINISTIC
from tests.processes import MANY_CYCLES_S, loaded_server, report, segments, until
from tests.shm_clients import prompt_of

pytestmark = [DROPPED, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

GONE_S = 30.0
"""Seconds within which vLLM's processes end after the server that started them was killed."""
LOADED_S = 120.0
"""Seconds that loading may take: processes of a server that was killed meanwhile first end that."""
MANY_SEQUENCES = {"max_num_seqs": 128, "max_num_batched_tokens": 512}
"""Arguments for tests of many short requests."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with servable_model(tmp_path_factory.mktemp("deterministic")) as model:
        yield model


async def nothing_more() -> None:
    """What a server holds besides segments cannot be seen from outside."""


async def until_gone(processes: Sequence[psutil.Process], bound_s: float = GONE_S) -> float:
    """Seconds until all of them have ended; those that do not are killed."""
    try:
        return await until(lambda: not any(map(is_alive, processes)), bound_s)
    finally:
        for process in filter(is_alive, processes):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_captures_and_killed_clients_and_servers_leave_nothing(model: Path, shm_folder: Path) -> None:
    """Each of the tests below in small, on one server; the next one there is a server around the fake backend."""
    check_foreign_files = plant_foreign_files(shm_folder)
    async with serving(model, shm_folder, **MANY_SEQUENCES) as server:
        await cycles_leave_nothing(
            server.processes(), server.address, shm_folder, DETERMINISTIC, warm_up=100, count=100
        )
        await captures_at_once_are_solo_captures(server.address, shm_folder, DETERMINISTIC, each=10)
        await killed_clients_are_freed(server.address, shm_folder, DETERMINISTIC, 2, nothing_more)
        processes = server.processes()
        await killed_under_load(server.kill, server.address, shm_folder, DETERMINISTIC, random.Random(4))
        report(f"{len(processes)} processes ended within {await until_gone(processes):.2f} s")
        async with loaded_server(shm_folder) as following:
            await following.ask()
            assert segments(shm_folder) == set()
            check_foreign_files()


@pytest.mark.extended
async def test_ten_thousand_cycles_leave_nothing(model: Path, shm_folder: Path) -> None:
    async with serving(model, shm_folder) as server:
        processes = server.processes()
        await cycles_leave_nothing(processes, server.address, shm_folder, DETERMINISTIC, warm_up=1000, count=10_000)
    assert os.listdir(shm_folder) == []


@pytest.mark.extended
@pytest.mark.timeout(3600)
async def test_twenty_servers_that_were_killed_leave_nothing_once_another_listens(
    model: Path, shm_folder: Path
) -> None:
    kills, dice, check_foreign_files = 20, random.Random(4), plant_foreign_files(shm_folder)
    left, cleaned, gone = [], [], []
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(model, shm_folder))
        for _ in range(kills):
            processes = server.processes()
            left.append(await killed_under_load(server.kill, server.address, shm_folder, DETERMINISTIC, dice))
            ending = asyncio.ensure_future(until_gone(processes))
            server = await stack.enter_async_context(listening(model, shm_folder))
            cleaned.append(await until(lambda: not segments(shm_folder), CLEAN_S))
            gone.append(await ending)
            check_foreign_files()
            await server.wait_until_serving()
    report(
        f"{kills} kills of the server left {sum(left)} segments, at most {max(left)} at once, which were gone "
        f"{max(cleaned):.2f} s after the next one listened; its processes ended within {max(gone):.2f} s"
    )
    assert sum(left) > 0, "no kill met a segment"
    check_foreign_files()
    assert {name for name in os.listdir(shm_folder) if not name.endswith("foreign")} == set()


@pytest.mark.extended
@pytest.mark.parametrize("parallel", ["tensor", "data"])
async def test_all_processes_of_a_killed_server_end(model: Path, shm_folder: Path, parallel: str) -> None:
    before = set(os.listdir("/dev/shm"))
    async with serving(model, shm_folder, **{f"{parallel}_parallel_size": 2}) as server:
        processes = server.processes()
        await server.kill()
        report(f"{len(processes)} processes ended within {await until_gone(processes):.2f} s")
    assert set(os.listdir("/dev/shm")) == before, "vLLM's own memory"


@pytest.mark.extended
async def test_all_processes_of_a_server_that_was_killed_while_it_loaded_end(model: Path, shm_folder: Path) -> None:
    async with listening(model, shm_folder) as server:
        await until(lambda: has_worker(server), LOADED_S)
        processes = server.processes()
        await server.kill()
        seconds = await until_gone(processes, LOADED_S)
    report(f"{len(processes)} processes ended within {seconds:.2f} s of a kill while they loaded")


def has_worker(server: RealServer) -> bool:
    """True once vLLM's core has started the process that loads the model."""
    with suppress(psutil.NoSuchProcess):  # others come and go
        return any(process.children() for process in server.processes() if "EngineCore" in process.name())
    return False


@pytest.mark.extended
async def test_captures_of_fifty_killed_clients_are_freed_and_others_continue(model: Path, shm_folder: Path) -> None:
    async with serving(model, shm_folder, **MANY_SEQUENCES) as server:
        await killed_clients_are_freed(server.address, shm_folder, DETERMINISTIC, 50, nothing_more)
    assert os.listdir(shm_folder) == []


@pytest.mark.extended
async def test_a_thousand_captures_at_once_equal_their_solo_captures(model: Path, shm_folder: Path) -> None:
    async with serving(model, shm_folder, **MANY_SEQUENCES) as server:
        await captures_at_once_are_solo_captures(server.address, shm_folder, DETERMINISTIC, each=1000 // CLIENTS)
    assert os.listdir(shm_folder) == []


PROMPTS, PROMPT_TOKENS, GENERATED = 1000, 198, 3
ROWS = PROMPT_TOKENS + GENERATED - 1
ALL_LAYERS = (0, 1, 2, 3)
FLAT_BYTES = 4 << 20
"""Bytes by which a process may grow while 100 MiB of rows come and go, of which up to 2.5 MiB are under way at once."""


@pytest.mark.extended
@pytest.mark.parametrize("delivery", ["inline", "shared"])
async def test_a_capture_of_200_000_tokens_is_right_and_takes_no_more_memory_than_a_short_one(
    model: Path, shm_folder: Path, tmp_path: Path, delivery: str
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps({"token_ids": prompt_number(index)}) + "\n" for index in range(PROMPTS)))
    flags = ("--layers", "0-3", "--max-tokens", GENERATED, "--temperature", 0, "--shard-mb", 1, "--delivery", delivery)
    async with serving(model, shm_folder, **MANY_SEQUENCES) as server:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "steer_service.cli", "capture", str(prompts), "--out", str(out)),
            *("--address", server.address, "--shm-dir", str(shm_folder), *map(str, flags)),
        )
        try:
            seen = await memory_over_time([*server.processes(), psutil.Process(command.pid)], out)
            assert await asyncio.wait_for(command.wait(), MANY_CYCLES_S) == 0
        finally:
            if command.returncode is None:
                command.kill()
        assert segments(shm_folder) == set()
    grown = [last - first for first, last in zip(seen[0], seen[-1], strict=True)]
    said = ", ".join(f"{one / 2**20:+.2f}" for one in grown)
    report(f"RSS of servers, client over {PROMPTS * ROWS} tokens, {delivery}, in MiB: {said}; {seen}")
    assert max(grown) < FLAT_BYTES
    check_data_set(out)


def prompt_number(index: int) -> tuple[int, ...]:
    return (*prompt_of(index), *(1000 + (index + offset) % 997 for offset in range(PROMPT_TOKENS - 3)))


async def memory_over_time(processes: Sequence[psutil.Process], out: Path) -> list[list[int]]:
    """RSS of each process when a quarter, a half, three quarters and nearly all of the rows were written."""
    seen = []
    for share in (0.25, 0.5, 0.75, 0.95):
        await until(lambda: written_rows(out) >= share * PROMPTS * ROWS, MANY_CYCLES_S, every_s=0.1)  # noqa: B023
        seen.append([process.memory_info().rss for process in processes])
    return seen


def written_rows(out: Path) -> int:
    return sum(map(len, load_captures(out))) if (out / shard_name(0)).exists() else 0


def check_data_set(out: Path) -> None:
    """Every row of every prompt once, in order, with its labels."""
    shards = list(load_captures(out))
    held = {name: np.concatenate([shard.tensors[name] for shard in shards]) for name in shards[0].tensors}
    assert len(held["position"]) == PROMPTS * ROWS
    for index in range(PROMPTS):
        rows, prompt = slice(index * ROWS, (index + 1) * ROWS), prompt_number(index)
        tokens = [*prompt, *DETERMINISTIC.greedy_tokens(prompt, GENERATED - 1)]
        assert (held["prompt_index"][rows] == index).all()
        assert held["position"][rows].tolist() == list(range(ROWS))
        assert held["token_id"][rows].tolist() == tokens
        assert held["is_generated"][rows].tolist() == [False] * PROMPT_TOKENS + [True] * (GENERATED - 1)
        for layer, expected in DETERMINISTIC.rows(tokens, ALL_LAYERS).items():
            np.testing.assert_array_equal(held[tensor_name(layer, CaptureSite.AFTER)][rows], expected)
    assert not held["is_steered"].any()
    assert [entry["prompt_index"] for shard in shards for entry in shard.prompts] == list(range(PROMPTS))
