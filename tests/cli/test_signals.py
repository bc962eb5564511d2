"""The second signal ends a server within 5 s and the third at once, whatever does not end by itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import psutil
import pytest

from steer_service.wire.capture_pb2 import FetchCaptureRequest
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.server.capture_client import asking
from tests.server.served import text_request

PROGRAM = """
import asyncio, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from steer_service.cli.serve import serve
from steer_service.server.config import ServerConfig
from steer_service.server.event_loop import new_event_loop
from steer_service.shm.segments import SegmentDirectory
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend

folder, what = sys.argv[1:]

class Stubborn(FakeBackend):
    async def close(self):
        if what == "closing":
            await asyncio.Event().wait()
        if what == "blocking":
            time.sleep(1000)
        await super().close()

async def step(number):
    if number == 2 and what != "fetching":
        await asyncio.Event().wait()

async def start():
    SegmentDirectory(path=Path(folder)).create(100)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    print("child", child.pid, flush=True)
    if what == "loading":
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass
    return Stubborn(replace(FAKE_MODEL, hidden_size=4096), step=step)

config = ServerConfig(address="127.0.0.1:0", grace_s=1000.0, shm_dir=folder)
with asyncio.Runner(loop_factory=new_event_loop) as runner:
    sys.exit(runner.run(serve(config, start)))
"""

ENDED_S = 5.0
"""Seconds within which the second signal ends a server."""
AT_ONCE_S = 3.0
"""Seconds that an immediate end may take on a busy machine; less than the second signal allows."""


class Server:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self._lines = process.stdout
        self.address = self.line("steer: listening on ")
        self.child = psutil.Process(int(self.line("child ")))

    def line(self, beginning: str) -> str:
        line = self._lines.readline().strip()
        assert line.startswith(beginning), line
        return line.removeprefix(beginning)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal, and waits until the server has taken it out of the queue."""
        self.process.send_signal(number)
        while psutil.pid_exists(self.process.pid) and _is_pending(self.process.pid, number):
            time.sleep(0.001)

    def seconds_to_end(self) -> float:
        began = time.monotonic()
        self.process.wait(timeout=60)
        return time.monotonic() - began


def _is_pending(pid: int, number: signal.Signals) -> bool:
    with open(f"/proc/{pid}/status") as file:
        masks = [int(line.split()[1], 16) for line in file if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


@contextmanager
def server_that_hangs_in(what: str, folder: str) -> Iterator[Server]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Server(process)
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize("what", ["loading", "closing", "blocking"])
def test_the_second_signal_ends_the_process_and_its_children_within_five_seconds(what: str, shm_folder) -> None:
    with server_that_hangs_in(what, str(shm_folder)) as server:
        if what != "loading":
            server.line("steer: serving ")
        assert os.listdir(shm_folder)
        server.signal()
        server.signal(signal.SIGINT)
        assert server.seconds_to_end() < ENDED_S
        assert server.process.returncode not in (0, None)
        assert psutil.wait_procs([server.child], timeout=30)[1] == []
    assert os.listdir(shm_folder) == []


@pytest.mark.parametrize("what", ["loading", "closing"])
def test_the_third_signal_ends_the_process_and_its_children_at_once(what: str, shm_folder) -> None:
    with server_that_hangs_in(what, str(shm_folder)) as server:
        if what != "loading":
            server.line("steer: serving ")
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            server.signal(number)
        assert server.seconds_to_end() < AT_ONCE_S
        assert server.process.returncode not in (0, None)
        assert psutil.wait_procs([server.child], timeout=30)[1] == []
    assert os.listdir(shm_folder) == []


def test_the_second_signal_ends_a_stream_with_a_status_and_the_server_in_order(shm_folder) -> None:
    with server_that_hangs_in("nothing", str(shm_folder)) as server:
        server.line("steer: serving ")
        with grpc.insecure_channel(server.address) as channel:
            call = GenerationServiceStub(channel).Generate(text_request(), timeout=60)
            assert next(call).HasField("started")
            server.signal()
            server.signal()
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.seconds_to_end() < ENDED_S
        assert server.process.returncode == 0


def test_the_second_signal_ends_a_fetch_that_nobody_reads(shm_folder) -> None:
    with server_that_hangs_in("fetching", str(shm_folder)) as server:
        server.line("steer: serving ")
        with grpc.insecure_channel(server.address) as channel:
            responses = GenerationServiceStub(channel).Generate(asking(max_tokens=500))
            [held] = [one.capture_held for one in responses if one.HasField("capture_held")]
            call = CaptureServiceStub(channel).FetchCapture(FetchCaptureRequest(capture_id=held.capture_id))
            next(call)
            server.signal()
            server.signal()
            assert server.seconds_to_end() < ENDED_S
