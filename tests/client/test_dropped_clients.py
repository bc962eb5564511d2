"""Clients that nobody closes, and clients of several event loops: nothing is left, and nothing is said."""

import subprocess
import sys
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient
from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.captures import HELD
from tests.client.conftest import Serve, Server
from tests.client.dropped import CASES

PROGRAM_S = 30.0
"""Seconds that a program may take."""


@pytest.fixture
def sharing(serve: Serve, shm_folder: Path) -> Server:
    return serve(FakeBackend(place=Arena(shm_folder)), shm_dir=str(shm_folder))


@pytest.mark.parametrize("case", CASES)
def test_a_program_that_closes_no_client_ends_in_order(sharing: Server, shm_folder: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.dropped", case, sharing.address, str(shm_folder)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_capture_whose_channel_was_collected_before_it_is_closed_without_a_word(serve: Serve) -> None:
    client = AsyncSteerClient(serve().address)
    _, [handle] = await client.generate("hello", max_tokens=1, capture=HELD)

    client._channels.for_running_loop().__del__()  # the garbage collector may come to it first

    await handle.close()
    await client.close()
