"""The folder of files that vLLM's processes leave behind: Unix sockets, which vLLM itself never removes, and the file
through which the workers of an engine core find each other, which stays if they are killed.

The folder is removed when this process ends. If this process is killed, the next one that starts an engine removes it.

Relies on (vLLM 0.24 to 0.33): VLLM_RPC_BASE_PATH, the folder of the sockets of this process and of those that it
starts; names of 36 characters; `Worker.distributed_init_method`, the URL of the workers' file, which all workers of an
engine core get. tests/engine/test_seams.py notices a change.
"""

import os
import re
import threading
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import vllm.envs as envs

from steer_service.shm.instances import PREFIX, PRIVATE_FOLDER, create_private_folder

VARIABLE = "VLLM_RPC_BASE_PATH"

LONGEST_FOLDER = 107 - len("/") - 36
"""Characters of the folder's path at most: Linux limits the path of a socket to 107."""

MEETING_POINT = re.compile(r"vllm_dist_\w+-(?P<core>\d+)")
"""Name of a file through which workers find each other: vLLM's, and the process id of their engine core."""

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


def meeting_point(url: str, core: int) -> str:
    """The `distributed_init_method` with which the workers of the engine core with process id `core` meet in the
    folder; the same for all of them. Other URLs than that of a file stay, as does a file if there is no such folder.
    """
    folder, path = Path(envs.VLLM_RPC_BASE_PATH), Path(url.removeprefix("file://"))
    if not url.startswith("file://") or not folder.name.startswith(PREFIX):
        return url
    return f"file://{folder / path.name}-{core}"


def remove_dead_files(folder: Path) -> None:
    """Removes what no process uses any more, such as the files of an engine that has ended."""
    with open("/proc/net/unix") as table:
        bound = {line.rstrip("\n").split(maxsplit=7)[-1] for line in table}  # a path may have spaces
    for path in folder.iterdir():
        met = MEETING_POINT.fullmatch(path.name)
        if psutil.pid_exists(int(met["core"])) if met else str(path) in bound:
            continue
        with suppress(FileNotFoundError):
            path.unlink()
