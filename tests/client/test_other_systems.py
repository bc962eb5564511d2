"""The client without what only Linux, or only POSIX, has."""

import subprocess
import sys
from pathlib import Path

import pytest

from steer_service.testing.fake_backend import FakeBackend
from tests.arena import Arena
from tests.client.conftest import Serve


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_it_generates_over_tcp_and_says_that_memory_is_not_shared(serve: Serve, shm_folder: Path, system: str) -> None:
    server = serve(FakeBackend(place=Arena(shm_folder)), shm_dir=str(shm_folder))
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.elsewhere", system, server.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    delivery, refusal = done.stdout.splitlines()
    assert delivery.split() == ["CaptureDelivery.INLINE", "SharedMemoryFallback.NO_SESSION"]
    assert refusal.startswith("NO_SHARED_MEMORY ")
