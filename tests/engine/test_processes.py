"""What is left of an engine's processes when they are killed: nothing but this project's segments."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import psutil
import pytest

from steer_service.engine.processes import EngineProcesses
from steer_service.shm.segments import SegmentDirectory

PROGRAM = """
import sys
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from steer_service.engine.heart import start_heart
from steer_service.shm.segments import SegmentDirectory
resource_tracker.register = lambda *_: None  # it would remove the memory as well
start_heart()
memory = SharedMemory(create=True, size=10)
segment = SegmentDirectory().open(sys.argv[1], 10)
print(memory.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def segment() -> Iterator[str]:
    segment = SegmentDirectory().create(10)
    yield segment.name
    segment.unlink()


def test_killed_processes_leave_no_shared_memory_and_segments_stay(segment: str) -> None:
    others = set(hearts_here())  # of engines of other tests
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, segment], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        memory = process.stdout.readline().strip()
        processes = EngineProcesses([psutil.Process(process.pid)])
        [vitals] = processes.vitals()
        assert vitals.name.endswith(f"(process {process.pid})")
        assert vitals.pulse.beats >= 1
        assert len(set(hearts_here()) - others) == 1
        assert vitals.cpu_s > 0.0
        assert {memory, segment} <= set(os.listdir("/dev/shm"))
        asyncio.run(processes.remove())
        assert process.wait() == -9
    assert memory not in os.listdir("/dev/shm")
    assert segment in os.listdir("/dev/shm")
    assert processes.vitals() == []
    assert set(hearts_here()) <= others
    asyncio.run(processes.remove())


def hearts_here() -> list[str]:
    """Hearts of other processes that this process has mapped."""
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "steer-heart" in line and f"steer-heart-{os.getpid()} " not in line]


SHARING = """
import os
from steer_service.engine.heart import start_heart
start_heart()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(flush=True)
while True:
    pass
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux counts no waiting here")
def test_a_process_that_shares_a_processor_waits_for_it() -> None:
    with ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SHARING], stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        processes = EngineProcesses([psutil.Process(process.pid)])
        while processes.vitals()[0].waited_s < 0.2:
            time.sleep(0.02)
        processes.kill()
