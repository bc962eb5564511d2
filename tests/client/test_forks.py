"""Processes that were forked from one with a client: they work or say at once what to do, and the parent goes on."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_client import forks
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client import forking
from tests.client.conftest import Serve, Server

PROGRAM_S = 60.0
"""Seconds that a program with its children may take."""


class HeldUp:
    """Holds the response in flight before its last token until `pass_on`."""

    def __init__(self) -> None:
        self._passed = asyncio.Event()

    async def __call__(self, number: int) -> None:
        if number == forking.LONG - 1:
            await self._passed.wait()

    def pass_on(self, server: Server) -> None:
        server._loop.loop.call_soon_threadsafe(self._passed.set)


@pytest.fixture
def held_up() -> HeldUp:
    return HeldUp()


@pytest.fixture
def sharing(serve: Serve, held_up: HeldUp, shm_folder: Path) -> Server:
    return serve(FakeBackend(place=Arena(shm_folder), step=held_up), shm_dir=str(shm_folder))


def runs(case: str, server: Server, folder: Path, held_up: HeldUp | None = None, *more: str) -> None:
    """Runs a program of `forking` to its end; it must succeed and say nothing."""
    arguments = [sys.executable, "-m", "tests.client.forking", case, server.address, str(folder), *more]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            if held_up is not None:
                assert program.stdout is not None
                said = program.stdout.readline()
                held_up.pass_on(server)
                server.wait_until(lambda: said == "forked\n" or program.poll() is not None)
            _, errors = program.communicate(timeout=PROGRAM_S)
        except subprocess.TimeoutExpired:
            program.kill()
            raise
    assert (program.returncode, errors) == (0, "")


@pytest.mark.parametrize("count", [200])
def test_whatever_children_do_none_hangs_or_crashes_and_the_parent_goes_on(
    sharing: Server, shm_folder: Path, held_up: HeldUp, count: int
) -> None:
    runs("open_client", sharing, shm_folder, held_up, str(count))
    sharing.wait_holding(0)


def test_a_client_that_was_only_made_works_in_children(server: Server, shm_folder: Path) -> None:
    runs("unused_client", server, shm_folder)


def test_a_closed_client_whose_call_failed_does_not_refuse_children(server: Server, shm_folder: Path) -> None:
    runs("failed_client", server, shm_folder)


def test_workers_of_a_program_with_an_event_loop_leave_its_calls_alone(
    sharing: Server, shm_folder: Path, held_up: HeldUp
) -> None:
    runs("in_a_coroutine", sharing, shm_folder, held_up)
    sharing.wait_holding(0)


def test_a_data_loader_reads_captures_that_its_parent_has_mapped(sharing: Server, shm_folder: Path) -> None:
    runs("data_loader", sharing, shm_folder)
    sharing.wait_holding(0)


FORKING = """
import grpc
import os
from steer_client import SteerClient
with SteerClient(ADDRESS) as client:
    client.generate("a b", max_tokens=2)
    for _ in range(2):
        if not (child := os.fork()):
            os._exit(0)
        os.waitpid(child, 0)
if not os.fork():
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("setting", "is_warned"), [(None, True), ("true", True), ("0", False), ("False", False)], ids=str
)
def test_a_program_whose_grpc_acts_in_forked_processes_is_told_once(
    server: Server, setting: str | None, is_warned: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != forks.FORK_SUPPORT}
    if setting is not None:
        environment[forks.FORK_SUPPORT] = setting
    program = FORKING.replace("ADDRESS", repr(server.address))
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=PROGRAM_S
    ).stderr
    assert told.count(forks.WARNING) == is_warned
    assert is_warned or not told
