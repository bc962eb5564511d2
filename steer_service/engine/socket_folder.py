"""The folder of vLLM's Unix sockets, which vLLM itself never removes.

It is removed when this process ends. If this process is killed, the next one that starts an engine removes it.

Relies on (vLLM 0.24 to 0.33): VLLM_RPC_BASE_PATH, the folder of the sockets of this process and of those that it
starts; names of 36 characters. tests/engine/test_seams.py notices a change.
"""

import os
import threading
from contextlib import suppress
from pathlib import Path

import vllm.envs as envs

from steer_service.shm.instances import PRIVATE_FOLDER, create_private_folder

VARIABLE = "VLLM_RPC_BASE_PATH"

LONGEST_FOLDER = 107 - len("/") - 36
"""Characters of the folder's path at most: Linux limits the path of a socket to 107."""

_folder: Path | None = None
_choosing = threading.Lock()


def use_own_socket_folder() -> Path:
    """Makes vLLM put its sockets into a folder of this process; removes those of processes that were killed.

    In a temporary folder with a long path, the new one is in /tmp.
    """
    global _folder
    with _choosing:
        if _folder is None:
            is_long = len(envs.VLLM_RPC_BASE_PATH) + len(f"/{PRIVATE_FOLDER}") > LONGEST_FOLDER
            parent = "/tmp" if is_long else envs.VLLM_RPC_BASE_PATH
            _folder = create_private_folder(Path(parent))
            os.environ[VARIABLE] = str(_folder)
        return _folder


def remove_dead_sockets(folder: Path) -> None:
    """Removes the files of sockets that no process has open, such as those of an engine that has ended."""
    with open("/proc/net/unix") as table:
        bound = {line.rstrip("\n").split(maxsplit=7)[-1] for line in table}  # a path may have spaces
    for path in folder.iterdir():
        if str(path) not in bound:
            with suppress(FileNotFoundError):
                path.unlink()
