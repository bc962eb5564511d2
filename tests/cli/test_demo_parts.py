"""What the demo is made of, without a model."""

import argparse
import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.cli import demo
from steer_service.cli import server_process as child
from steer_service.cli.exit_status import FAILED
from steer_service.cli.server_process import ServerProcess
from steer_service.core.errors import EngineFailed
from steer_service.core.events import Receipt
from steer_service.core.specs import AddSpec, ProjectionCapSpec
from steer_service.runtime.results import Output
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.client.conftest import Serve, serve  # noqa: F401  (a fixture)

DEEP_MODEL = replace(FAKE_MODEL, layer_count=30)
FIRST_ROW = np.full((1, 4), 1e6)
"""Stands for the attention sink that every text begins with."""


def test_the_direction_leads_from_one_group_to_the_other_without_the_first_rows() -> None:
    sea = [np.concatenate([FIRST_ROW, [[0, 3, 0, 0], [0, 5, 0, 0]]]).astype(np.float32)]
    land = [np.concatenate([-FIRST_ROW, [[0, 1, 0, 0]]]).astype(np.float32)]
    specs = demo.steering_specs(sea, land)
    (added,) = specs["steered"].layers[demo.STEERED_LAYER].operations
    (capped,) = specs["capped"].layers[demo.STEERED_LAYER].operations
    assert isinstance(added, AddSpec)
    assert isinstance(capped, ProjectionCapSpec)
    np.testing.assert_allclose(added.materialize(), [0, 3, 0, 0])
    assert capped.min == pytest.approx(4.0)
    assert specs["unsteered"] is None


async def test_the_demonstration_captures_both_groups_and_answers_four_times(serve: Serve) -> None:  # noqa: F811
    backend = FakeBackend(DEEP_MODEL)
    async with AsyncSteerClient(serve(backend).address) as client:
        shown = await demo.demonstrate(client)
    words = sum(len(text.split()) for text in demo.SEA + demo.LAND)
    assert shown.captured == demo.Captured(layers=demo.CAPTURED_LAYERS, rows=words, width=8)
    assert list(shown.outputs) == ["unsteered", "steered", "capped", "ablated"]
    assert len({output.receipt.steering_digest for output in shown.outputs.values()}) == 4


def test_the_text_fits_the_terminal_and_shows_every_receipt() -> None:
    receipt = Receipt(steering_digest="ab" * 32, steered_layers=(12,), rows_steered=7, rows_total=9)
    outputs = {
        name: Output(text="word " * 30, receipt=receipt) for name in ("unsteered", "steered", "capped", "ablated")
    }
    captured = demo.Captured(layers=(12, 16), rows=100, width=576)
    text = demo.as_text(demo.Demonstration(captured=captured, outputs=outputs), 100)
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("digest ababababab") == 4
    assert "layer 12 [100, 576], layer 16 [100, 576]" in text
    assert "steered 7/9" in text


FAKE_SERVER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
print("noise")
print("steer: listening on 127.0.0.1:1", flush=True)
print("steer: serving fake on 127.0.0.1:1", flush=True)
time.sleep(60)
"""


BROKEN_SERVER = """
import sys
print("steer: listening on 127.0.0.1:1", flush=True)
sys.exit("steer: no such model")
"""

BOUND_S = 10.0
"""Seconds in which an orphan must have ended."""

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes `ServerProcess` run the given program in place of a server."""

    def install(source: str) -> None:
        monkeypatch.setattr(child, "COMMAND", (_program(tmp_path, source),))

    return install


def _program(folder: Path, source: str) -> str:
    program = folder / "server"
    program.write_text(f"#!{sys.executable}\n{source}")
    program.chmod(0o755)
    return str(program)


async def test_a_child_is_found_by_its_lines_and_stopped(install: Install) -> None:
    install(FAKE_SERVER.format(status=0))
    async with ServerProcess(()) as server:
        await server.wait_until_serving()
        assert server.address == "127.0.0.1:1"
        await server.stop()


async def test_a_child_that_stops_badly_is_an_error(install: Install) -> None:
    install(FAKE_SERVER.format(status=3))
    async with ServerProcess(()) as server:
        await server.wait_until_serving()
        with pytest.raises(EngineFailed, match="stopped with status 3"):
            await server.stop()


async def test_an_error_inside_still_stops_the_child(install: Install) -> None:
    install(FAKE_SERVER.format(status=0))
    with contextlib.suppress(KeyError):
        async with ServerProcess(()) as server:
            await server.wait_until_serving()
            raise KeyError
    assert server.status == 0


async def test_a_child_is_not_a_fork_of_this_process(install: Install) -> None:
    """gRPC's threads do not survive one: now and then the child ended by SIGABRT before it ran the server."""
    forks: list[bool] = []
    os.register_at_fork(before=lambda: forks.append(True))  # for good: nothing takes it back
    install(FAKE_SERVER.format(status=0))
    async with ServerProcess(()) as server:
        await server.wait_until_serving()
    assert forks == []


PARENT = """
import asyncio
from steer_service.cli import server_process
from steer_service.cli.server_process import ServerProcess

async def main():
    server_process.COMMAND = ({server!r},)
    async with ServerProcess(()) as server:
        await server.wait_until_serving()
        print(server.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = PARENT.format(server=_program(tmp_path, FAKE_SERVER.format(status=0)))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        grandchild = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([grandchild], [], [], BOUND_S)
    os.close(grandchild)
    assert ended


def test_a_server_that_does_not_start_is_reported_in_one_line(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(BROKEN_SERVER)
    monkeypatch.setattr(demo, "_model_flags", lambda: ())
    assert demo.run(argparse.Namespace(json=True)) == FAILED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] == "steer: the server ended with status 1: steer: no such model"


CRASHING_SERVER = """
import os, signal
print("steer: listening on 127.0.0.1:1", flush=True)
print("noise", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_child_that_was_killed_is_reported_with_the_signal_and_its_whole_output(install: Install) -> None:
    install(CRASHING_SERVER)
    async with ServerProcess(()) as server:
        with pytest.raises(
            EngineFailed, match="ended by SIGKILL; the usual cause is too little memory: noise"
        ) as failed:
            await server.wait_until_serving()
    assert _taken(failed.value.message.rpartition("whole output: ")[2].rstrip(")")) == (
        "steer: listening on 127.0.0.1:1\nnoise\n"
    )


def _taken(path: str) -> str:
    text = Path(path).read_text()
    Path(path).unlink()
    return text
