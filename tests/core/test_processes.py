"""Ending all children of a process at once."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from steer_service.core.processes import killed_by

FAMILY = """
import os, subprocess, sys
from multiprocessing.shared_memory import SharedMemory
from steer_service.core.processes import kill_descendants
depth = int(sys.argv[1])
if depth:
    child = subprocess.Popen([sys.executable, __file__, str(depth - 1)], stdout=subprocess.PIPE, text=True)
    pids = child.stdout.readline().split()
else:
    pids = []
memory = SharedMemory(create=True, size=1)  # starts Python's resource tracker
if depth == 3:
    print(memory.name, *pids, flush=True)
    kill_descendants()
    os._exit(1)
print(os.getpid(), *pids, flush=True)
sys.stdin.read()
"""


def memories() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.mark.timeout(60)
def test_all_generations_are_killed_and_the_resource_tracker_removes_what_they_left(tmp_path) -> None:
    program, before = tmp_path / "family.py", memories()
    program.write_text(FAMILY)
    with subprocess.Popen(
        [sys.executable, str(program), "3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the tracker's warnings
        text=True,
    ) as process:
        assert process.stdout is not None
        memory, *pids = process.stdout.readline().split()
        assert process.wait(timeout=60) == 1
    assert len(pids) == 3
    _, alive = psutil.wait_procs([psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))], timeout=30)
    assert alive == []
    assert memory.startswith("psm_")
    while memories() - before:  # the trackers remove it when they see that the processes are gone
        time.sleep(0.01)


def test_a_signal_is_named_with_its_usual_cause() -> None:
    assert killed_by(-9) == "SIGKILL; the usual cause is too little memory"
    assert killed_by(-15) == "SIGTERM"
