"""`steer generate` in a process of its own, which ends early."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from steer_service.testing.fake_backend import FakeBackend
from tests.client.conftest import BOUND_S, Gate, Serve, Server


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`steer generate` in a process of its own, which hears SIGINT even where this one is a background job.

    Not by `preexec_fn`: that forks instead of spawning, and gRPC's threads in this process do not survive a fork.
    """
    line = ["env", "--default-signal=INT", sys.executable, "-m", "steer_service.cli.main", "generate", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ctrl_c_cancels_the_request(serve: Serve) -> None:
    server = serve(FakeBackend(step=Gate(2)))

    with command("hello", "--address", server.address) as process:
        assert process.stdout.read(2) == " t"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=BOUND_S)

    server.wait_idle()
    assert (process.returncode, error, server.backend.aborted) == (130, "", 1)


def test_a_reader_that_leaves_ends_the_request_without_a_word(server: Server) -> None:
    with command("hello", "--address", server.address, "--max-tokens", "4000") as process:
        assert process.stdout.read(2) == " t"
        process.stdout.close()
        error = process.stderr.read()
        process.wait(BOUND_S)

    server.wait_idle()
    assert (process.returncode, error) == (1, "")
