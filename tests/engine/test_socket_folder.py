"""vLLM's sockets and files are in a folder of this project, from which only dead ones are removed."""

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from steer_service.engine.socket_folder import LONGEST_FOLDER, VARIABLE, meeting_point, remove_dead_files

PROGRAM = """
import os, signal, sys
from steer_service.engine.socket_folder import use_own_socket_folder
from vllm.utils.network_utils import get_open_zmq_ipc_path
folder = use_own_socket_folder()
assert use_own_socket_folder() == folder
path = get_open_zmq_ipc_path().removeprefix("ipc://")
open(path, "w").close()
print(folder, path, folder.stat().st_mode)
"""


def without_folder(**changed: str) -> dict[str, str]:
    """The environment for a process that has not chosen its folder yet, as this one may have."""
    return {name: value for name, value in os.environ.items() if name != VARIABLE} | changed


def test_only_sockets_that_nobody_has_open_are_removed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(tmp_path / "alive and well"))
        remove_dead_files(tmp_path)
        assert os.listdir(tmp_path) == ["alive and well"]
    remove_dead_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_workers_file_is_removed_once_their_engine_core_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "steerllm-0-1"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as core:
        urls = {core.pid: meeting_point("file:///tmp/vllm_dist_0a", core.pid)}
        assert urls == {core.pid: f"file://{folder}/vllm_dist_0a-{core.pid}"}
        Path(urls[core.pid].removeprefix("file://")).touch()
        remove_dead_files(folder)
        assert len(os.listdir(folder)) == 1
        core.kill()
    remove_dead_files(folder)
    assert os.listdir(folder) == []


def test_workers_without_a_file_or_without_the_folder_meet_where_vllm_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "steerllm-0-1"))
    assert meeting_point("tcp://10.0.0.1:5000", 1) == "tcp://10.0.0.1:5000"
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert meeting_point("file:///tmp/vllm_dist_0a", 1) == "file:///tmp/vllm_dist_0a"


def test_vllm_s_sockets_are_in_a_private_folder_that_ends_with_the_process(tmp_path: Path) -> None:
    parent = tmp_path / ("x" * LONGEST_FOLDER)  # too long for a socket
    parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=without_folder(TMPDIR=str(parent)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    name, path, mode = done.stdout.split()[-3:]
    assert Path(path).parent == Path(name)
    assert len(path) <= 107
    assert stat.S_IMODE(int(mode)) == 0o700
    assert not Path(name).exists()


def test_the_sockets_of_a_process_that_was_killed_are_removed_at_the_next_start() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:  # a short path
        environment = without_folder(TMPDIR=parent)

        def run(program: str) -> str:
            command = [sys.executable, "-c", program]
            return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False).stdout

        assert run(f"{PROGRAM}sys.stdout.flush()\nos.kill(os.getpid(), signal.SIGKILL)\n")
        (left,) = Path(parent).glob("steerllm-*")
        assert len(os.listdir(left)) == 1

        assert run(PROGRAM)

        assert os.listdir(parent) == []
