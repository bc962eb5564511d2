"""Shards that are written because their time is over, so that a killed run loses little."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, InvalidRequest, load_captures
from steer_service.cli.capture.prompts import open_prompts
from steer_service.cli.capture.run import CaptureRun, Limits
from steer_service.cli.capture.shards import CaptureFolder
from steer_service.cli.progress import CaptureProgress
from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.formats.capture_dataset import FORMAT, VERSION
from tests.cli.capture.command import Permits, command, expect, fake, run, texts, write_lines
from tests.client.conftest import BOUND_S, Serve

REQUEST = GenerateRequest(
    prompt=TokenPrompt(token_ids=(0,)),
    sampling=SamplingOptions(max_tokens=0),
    capture=CaptureSpec(layers=(1,), dtype="float32"),
)


class Clock:
    """The time of a run: it passes when the test says so."""

    def __init__(self) -> None:
        self.waits: list[tuple[float, asyncio.Event]] = []
        self.ended = 0

    async def sleep(self, seconds: float) -> None:
        self.waits.append((seconds, asyncio.Event()))
        try:
            await self.waits[-1][1].wait()
        finally:
            self.ended += 1


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND_S):
        while not reached():
            await asyncio.sleep(0.001)


async def test_a_shard_is_written_once_its_time_is_over(serve: Serve, tmp_path: Path) -> None:
    permits, clock, lines = Permits(), Clock(), texts(12)
    server = serve(fake(step=permits))
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    limits = Limits(concurrency=1, shard_bytes=1 << 20, shard_seconds=7.0, fail_fast=False)
    async with await AsyncSteerClient.connect(server.address) as client:
        head = {"format": FORMAT, "version": VERSION}
        with (
            open_prompts(str(prompts)) as source,
            CaptureFolder(tmp_path / "out", head) as folder,
            CaptureProgress(total=None) as progress,
        ):
            capture = CaptureRun(client, client.info, REQUEST, folder, limits, progress, 0.0, head, None, clock.sleep)
            running = asyncio.ensure_future(capture.run(source))
            permits.left = 3
            await until(lambda: capture.covered == 3)
            assert folder.shards == 0  # its time is not over

            clock.waits[0][1].set()
            await until(lambda: folder.shards == 1)  # although the next prompt has not come
            assert folder.next_prompt == 3
            permits.left = 2
            await until(lambda: capture.covered == 5)
            assert (folder.shards, len(clock.waits), clock.ended) == (1, 2, 1)

            permits.left = len(lines)
            await running
            assert folder.shards == 2

    assert [seconds for seconds, _ in clock.waits] == [7.0, 7.0]
    assert clock.ended == 2  # nothing waits any more
    expect(lines).check(tmp_path / "out")


def test_a_killed_run_keeps_the_shards_whose_time_was_over(serve: Serve, tmp_path: Path) -> None:
    permits, lines = Permits(), texts(12)
    server = serve(fake(step=permits))
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out", "--concurrency", 1)

    def covered() -> int:
        try:
            return max((shard.about["prompts"][1] for shard in load_captures(tmp_path / "out")), default=0)
        except InvalidRequest:  # there is no manifest yet
            return 0

    with command(*arguments, "--shard-seconds", 0.01) as process:
        permits.left = 5
        server.wait_until(lambda: covered() == 5)
        process.send_signal(signal.SIGKILL)
        process.wait(BOUND_S)
    server.wait_idle()
    asked = len(server.backend.requests)
    permits.left = 100

    assert run(*arguments) == 0
    expect(lines).check(tmp_path / "out")
    assert len(server.backend.requests) - asked == len(lines) - 5  # none of them is captured again


@pytest.mark.parametrize("seconds", [0, -1, "inf", "nan"])
def test_a_time_that_is_none_is_refused(tmp_path: Path, seconds: object, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_lines(tmp_path / "prompts.txt", ["a"])
    assert run(prompts, "--layers", 1, "--out", tmp_path / "out", "--shard-seconds", seconds) == 2
    assert capsys.readouterr().err.startswith("steer: --shard-seconds: ")
