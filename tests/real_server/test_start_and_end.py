"""How a real server starts, drains, ends and dies."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
from grpc_health.v1 import health_pb2

from steer_client import AsyncSteerClient
from steer_service.cli.doctor.ports import check_ports
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.runtime.results import Generation, collect
from steer_service.server.config import ServerConfig
from tests.real_server.serving import Server, ask, health_of, run, running_server, starting_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LONG = 100
"""Tokens that take seconds: the request runs while the test looks at a server that drains."""


def test_health_is_serving_only_after_loading(server: Server) -> None:
    assert server.health_while_loading == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.error_while_loading.reason == "LOADING"
    assert health_of(server.address) == health_pb2.HealthCheckResponse.SERVING


def test_a_probe_and_the_doctor_find_the_server(server: Server) -> None:
    command = [sys.executable, "-m", "steer_service.cli"]
    probe = subprocess.run([*command, "healthcheck", "--address", server.address], timeout=60, check=False)
    assert probe.returncode == 0
    [finding] = check_ports(ServerConfig(address=server.address))
    assert (str(finding.status), "a steer server runs here" in finding.text) == ("warn", True)


def test_server_and_workers_have_the_highest_limit_of_open_files(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    limits = [one.rlimit(psutil.RLIMIT_NOFILE) for one in (process, *process.children(recursive=True))]

    assert len(limits) > 1
    assert set(limits) == {(hard, hard)}


@pytest.mark.extended
def test_an_engine_that_dies_while_idle_ends_a_server_without_restarts() -> None:
    """An orchestrator must see it: health first, then the exit status."""
    with running_server("--max-restarts", "0") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        next(child for child in children if "EngineCore" in child.name()).kill()
        assert server.process.wait(timeout=90) == 1
        _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


@pytest.mark.parametrize("signals", [pytest.param(1, marks=pytest.mark.extended), 2])
def test_sigterm_while_loading_exits_cleanly_and_a_second_one_within_five_seconds(signals: int) -> None:
    with starting_server() as process:
        assert process.stdout is not None
        assert "listening on" in process.stdout.readline()
        server = psutil.Process(process.pid)
        while not any("EngineCore" in child.name() for child in server.children()):
            time.sleep(0.05)
        children = server.children(recursive=True)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        sent = time.monotonic()
        assert process.wait(timeout=120) == 0 or signals > 1
        assert time.monotonic() - sent < 5.0 or signals == 1
        assert psutil.wait_procs(children, timeout=60)[1] == []


def test_sigterm_lets_a_running_request_finish_and_leaves_nothing_behind(server: Server) -> None:
    """The last test of the server that all share: it ends it."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    generation, refused = asyncio.run(_drain(server))
    assert len(generation.outputs[0].token_ids) == LONG
    assert refused.reason == "DRAINING"
    assert server.process.wait(timeout=90) == 0
    assert server.process.stdout is not None
    output = server.process.stdout.read()  # vLLM logs to standard output
    assert "EngineDeadError" not in output
    assert "workers still running" not in output  # vLLM's warning before it sends SIGTERM
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    assert set(os.listdir("/dev/shm")) - server.shared_memory_before == set()


async def _drain(server: Server) -> tuple[Generation, SteerError]:
    """A generation that was running when SIGTERM came, and the refusal of one that came later."""
    async with AsyncSteerClient(server.address) as client:
        events = client.submit(ask("A long story", sampling={"max_tokens": LONG}))
        first = await anext(events)
        server.process.send_signal(signal.SIGTERM)
        while await asyncio.to_thread(health_of, server.address) == health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineFailed) as refused:
            await run(client, ask("Too late"))
        return await collect(_chain(first, events)), refused.value


async def _chain(first, rest):
    yield first
    async for event in rest:
        yield event
