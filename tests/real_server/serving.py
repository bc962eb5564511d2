"""`steer serve` on the bundled model in a process of its own, and requests to it."""

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steer_client import AsyncSteerClient
from steer_service.core.errors import SteerError
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.results import Generation, collect
from steer_service.wire import generation_pb2_grpc
from steer_service.wire.request import request_to_proto
from steer_service.wire.status_codes import error_from_rpc
from tests.shm.folders import open_files_limit

FLAGS = [
    *("--port", "0", "--max-model-len", "512", "--kv-cache-memory-bytes", str(256 << 20)),
    *("--grace", "60"),
]


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str
    health_while_loading: int
    error_while_loading: SteerError
    shared_memory_before: set[str]
    """The names in /dev/shm before it started."""
    metrics_port: int = 0
    """Its HTTP port, if it has one."""
    lines_while_loading: tuple[str, ...] = ()
    """What it printed on standard output until it served."""

    def next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@contextmanager
def running_server(*flags: str, stderr: IO[str] | None = None) -> Iterator[Server]:
    """A server that serves; it is killed at the block's end if it still runs."""
    before, metrics_port = set(os.listdir("/dev/shm")), free_port()
    with starting_server("--metrics-port", str(metrics_port), *flags, stderr=stderr) as process:
        yield replace(_serving(process, before), metrics_port=metrics_port)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def starting_server(*flags: str, stderr: IO[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A server that has just been started; it is killed at the block's end if it still runs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files_limit(min(1024, hard)):  # what most systems let a process begin with
        process = subprocess.Popen(
            [sys.executable, "-m", "steer_service.cli", "serve", *FLAGS, *flags],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with process:  # closes its pipe
        try:
            yield process
        finally:
            process.kill()


def _serving(process: subprocess.Popen[str], before: set[str]) -> Server:
    assert process.stdout is not None
    line = process.stdout.readline()
    address = line.strip().removeprefix("steer: listening on ")
    assert address != line.strip(), line
    health, error = health_of(address), error_of_a_generation(address)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("steer: serving "):
            return Server(process, address, health, error, before, lines_while_loading=tuple(lines))
    raise AssertionError(f"the server ended with {process.wait()}")


def health_of(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True).status


def error_of_a_generation(address: str) -> SteerError:
    with grpc.insecure_channel(address) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request_to_proto(ask("Hello")), timeout=30)
        try:
            next(iter(call))
        except grpc.RpcError as error:
            return error_from_rpc(error)
    raise AssertionError("a server that is loading answered")


def ask(text: str, **changes: object) -> GenerateRequest:
    sampling = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **changes.pop("sampling", {})}
    return GenerateRequest(prompt=TextPrompt(text=text), sampling=SamplingOptions(**sampling), **changes)


async def run(client: AsyncSteerClient, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(client.submit(request)), timeout=300)


def segments_here() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("steerllm-")]
