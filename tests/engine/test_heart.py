"""A process's signs of life, read from another process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steer_service.engine.heart import HeartReader

PROGRAM = """
import sys
from steer_service.engine.heart import start_heart
heart = start_heart()
assert start_heart() is heart
print("beats", flush=True)
for line in sys.stdin:
    heart.count_step(int(line))
    print("done", flush=True)
"""
BOUND_S = 30.0


@contextmanager
def beating_process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "beats\n"
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def reader_of(process: subprocess.Popen[str]) -> HeartReader:
    reader = HeartReader.of(process.pid)
    assert reader is not None
    return reader


def test_a_heart_beats_until_its_process_is_stopped() -> None:
    with beating_process() as process:
        reader = reader_of(process)
        first = reader.pulse().beats
        until(lambda: reader.pulse().beats >= first + 2)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        stopped = reader.pulse()
        time.sleep(1.5)  # more than a beat
        assert reader.pulse() == stopped
        process.send_signal(signal.SIGCONT)
        until(lambda: reader.pulse().beats > stopped.beats)


def test_steps_are_counted_with_the_longest_of_them() -> None:
    with beating_process() as process:
        reader = reader_of(process)
        assert (reader.pulse().steps, reader.pulse().longest_step_s) == (0, 0.0)
        for took_ns in (2_000_000_000, 3_000_000_000, 1_000_000_000):
            tell(process, str(took_ns))
        assert (reader.pulse().steps, reader.pulse().longest_step_s) == (3, 3.0)


def test_the_memory_of_a_heart_has_no_name_and_stays_readable() -> None:
    before = set(os.listdir("/dev/shm"))
    with beating_process() as process:
        reader = reader_of(process)
        assert set(os.listdir("/dev/shm")) <= before
        process.kill()
        process.wait()
        assert reader.pulse().beats >= 1


def test_a_process_without_a_heart_has_none_to_read() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert HeartReader.of(process.pid) is None
        process.kill()
    assert HeartReader.of(process.pid) is None


FORKING = """
import os, sys
from steer_service.engine.heart import start_heart
heart = start_heart()
if os.fork():
    sys.exit(os.wait()[1] != 0 or start_heart() is not heart)
assert start_heart() is not heart
"""


def test_a_forked_process_has_a_heart_of_its_own() -> None:
    assert subprocess.run([sys.executable, "-c", FORKING], check=False).returncode == 0
