"""`steer capture` through shared memory, and how much memory it takes."""

import asyncio
import collections
import resource
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from steer_client import (
    CaptureDelivery,
    CaptureSite,
    load_captures,
)
from steer_service.testing.fake_backend import FAKE_MODEL
from tests.cli.capture.command import (
    BFLOAT,
    TINY_SHARD,
    Permits,
    command,
    expect,
    fake,
    run,
    texts,
    words,
    write_lines,
)
from tests.client.conftest import BOUND_S, Serve, Server
from tests.shm.folders import open_files_limit


@pytest.mark.parametrize("delivery", ["auto", "shared"])
def test_rows_come_through_shared_memory_and_leave_nothing_there(
    serve: Serve,
    tmp_path: Path,
    delivery: str,
    capsys: pytest.CaptureFixture[str],
):
    server = serve(fake(BFLOAT))
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = ("--address", server.address, "--layers", "0,3", "--site", "both", "--out", tmp_path / "out")

    assert run(prompts, *arguments, "--delivery", delivery, *TINY_SHARD) == 0

    both = (CaptureSite.BEFORE, CaptureSite.AFTER)
    expect(lines, layers=(0, 3), sites=both, dtype="bfloat16").check(tmp_path / "out")
    assert {request.capture.delivery.is_shared for request in server.backend.requests} == {True}
    assert "through shared memory" in capsys.readouterr().err
    server.wait_until(lambda: server.backend.holding == 0)


def test_as_many_files_may_be_open_as_rows_of_prompts_are_mapped(server: Server, tmp_path: Path):
    lines = texts(40)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    with open_files_limit(500):
        assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    expect(lines).check(tmp_path / "out")


def test_rows_that_wait_for_an_earlier_prompt_do_not_hold_the_server_s_memory(
    serve: Serve,
    tmp_path: Path,
):
    class FirstWaits:
        """Lets the first prompt's token pass once it is told to."""

        opened = False
        is_first = True

        async def __call__(self, number: int) -> None:
            is_first, self.is_first = self.is_first, False
            while is_first and not self.opened:
                await asyncio.sleep(0.001)

    gate = FirstWaits()
    server = serve(fake(step=gate))
    lines = texts(6)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    with command(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") as process:
        server.wait_until(lambda: server.backend.finished == 5 and server.backend.holding == 0)
        gate.opened = True
        assert process.wait(BOUND_S) == 0
    expect(lines).check(tmp_path / "out")


def test_a_server_that_shares_no_memory_sends_rows_inline_and_it_says_so(
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    server = serve(fake(), shared_memory=0)
    lines = texts(5)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = ("--address", server.address, "--layers", 1)

    assert run(prompts, *arguments, "--out", tmp_path / "auto") == 0
    assert capsys.readouterr().err.count("captures are sent inline, not through shared memory: switched off") == 1
    expect(lines).check(tmp_path / "auto")
    assert run(prompts, *arguments, "--out", tmp_path / "shared", "--delivery", "shared") == 1
    assert "captures cannot go through shared memory" in capsys.readouterr().err
    assert run(prompts, *arguments, "--out", tmp_path / "inline", "--delivery", "inline") == 0
    assert server.backend.requests[-1].capture.delivery is CaptureDelivery.INLINE


@pytest.mark.parametrize(
    "tokens", [pytest.param(20_000, marks=pytest.mark.slow), pytest.param(200_000, marks=pytest.mark.extended)]
)
@pytest.mark.parametrize("delivery", ["inline", "shared"])
def test_memory_does_not_grow_with_the_number_of_prompts(
    serve: Serve,
    tmp_path: Path,
    tokens: int,
    delivery: str,
):
    """2 KiB a row: 20,000 that were kept would be 39 MiB."""
    permits = Permits()
    model = replace(FAKE_MODEL, hidden_size=512)
    server = serve(fake(model, step=permits))
    server.backend.requests = collections.deque(maxlen=8)  # the only thing that is meant to grow
    count = tokens // 200
    prompts = write_lines(tmp_path / "prompts.txt", [words(200, index) for index in range(count)])
    arguments = ("--address", server.address, "--layers", 1, "--out", tmp_path / "out", "--shard-mb", 1)

    with command(prompts, *arguments, "--concurrency", 4, "--delivery", delivery) as process:
        client, me = psutil.Process(process.pid), psutil.Process()
        seen = []
        for share in (count // 4, count // 2, count - 1):
            permits.left = share - server.backend.finished
            server.wait_until(lambda: server.backend.finished == share, bound_s=300)  # noqa: B023
            seen.append((client.memory_info().rss, me.memory_info().rss))
        permits.left = 1
        assert process.wait(BOUND_S) == 0

    (client_before, server_before), *_, (client_after, server_after) = seen
    assert client_after - client_before < 8 << 20, seen
    assert server_after - server_before < 12 << 20, seen
    assert sum(len(shard) for shard in load_captures(tmp_path / "out")) == tokens
