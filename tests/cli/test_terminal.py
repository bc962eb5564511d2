"""Standard streams that are closed, that cannot encode a text, and that are a terminal which obeys what it is sent."""

import os
import pty
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import pytest

from steer_service.cli.terminal import shown
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve, Server

BOUND_S = 20
HOSTILE = "fake\x1b]0;owned\x07\x9b2J\r"
"""A name that changes the title of a terminal, clears it, and goes back to the beginning of the line."""


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def steer(*arguments: object, shell: str = "") -> tuple[str, ...]:
    """The command, with the redirections of `shell`."""
    command = (sys.executable, "-m", "steer_service.cli", *map(str, arguments))
    return ("bash", "-c", f'"$@" {shell}', "bash", *command) if shell else command


def test_control_characters_are_shown_on_a_terminal_and_kept_elsewhere() -> None:
    assert shown(HOSTILE, Terminal()) == r"fake\x1b]0;owned\x07\x9b2J\x0d"
    assert shown("é\t一\n", Terminal()) == "é\t一\n"
    assert shown(HOSTILE, StringIO()) == HOSTILE


def test_a_terminal_obeys_nothing_that_a_server_sends(serve: Serve) -> None:
    server = serve(FakeBackend(replace(FAKE_MODEL, name=HOSTILE)))
    near, far = pty.openpty()
    done = subprocess.run(
        steer("info", "--address", server.address), stdin=far, stdout=far, stderr=far, timeout=BOUND_S, check=False
    )
    os.close(far)
    text = os.read(near, 1 << 16).decode()
    os.close(near)

    assert done.returncode == 0
    assert r"fake\x1b]0;owned\x07\x9b2J\x0d" in text
    assert not {"\x1b", "\x07", "\x9b"} & {*text}


@pytest.mark.parametrize(
    ("arguments", "shell", "status", "error"),
    [
        (("generate", "a", "--max-tokens", 1), ">&-", 0, ""),
        (("generate", "--max-tokens", 1), "<&-", 2, "steer: prompt.text: the prompt is empty\n"),
        (("render", "é\udcff"), "2>&-", 2, ""),
    ],
)
def test_a_closed_stream_is_like_the_null_device(
    server: Server, arguments: tuple[object, ...], shell: str, status: int, error: str
) -> None:
    command = steer(*arguments, "--address", server.address, shell=shell)
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (status, "", error)


def test_a_character_that_the_output_cannot_encode_is_escaped(server: Server) -> None:
    command = steer("render", "é", "--address", server.address)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=BOUND_S, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\xe9" in done.stdout
