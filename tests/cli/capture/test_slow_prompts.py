"""`steer capture` of prompts that come slowly, through a pipe."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient
from steer_service.cli.capture.prompts import PromptSource, open_prompts
from steer_service.cli.capture.run import CaptureRun, Limits, PromptFailed
from steer_service.cli.capture.shards import CaptureFolder
from steer_service.cli.progress import CaptureProgress
from steer_service.formats.capture_dataset import FORMAT, VERSION
from tests.cli.capture.command import expect, texts
from tests.cli.capture.test_timed_shards import REQUEST, until
from tests.client.conftest import BOUND_S, Server

HEAD = {"format": FORMAT, "version": VERSION}


def capture_run(client: AsyncSteerClient, source: PromptSource, folder: CaptureFolder, seconds: float) -> CaptureRun:
    limits = Limits(concurrency=8, shard_bytes=1 << 20, shard_seconds=seconds, fail_fast=True)
    with CaptureProgress(total=None) as progress:
        return CaptureRun(client, client.info, REQUEST, folder, limits, progress, 0.0, HEAD)


async def test_prompts_are_captured_and_written_while_the_next_has_not_come(server: Server, tmp_path: Path) -> None:
    lines, (reading, writing) = texts(9), os.pipe()
    async with await AsyncSteerClient.connect(server.address) as client:
        os.write(writing, f"{lines[0]}\n{lines[1][:3]}".encode())  # the second is not complete
        with open_prompts(f"/dev/fd/{reading}") as source, CaptureFolder(tmp_path / "out", HEAD) as folder:
            capture = capture_run(client, source, folder, 0.0)
            task = asyncio.ensure_future(capture.run(source))
            await until(lambda: folder.next_prompt == 1)
            os.write(writing, "\n".join([lines[1][3:], *lines[2:5], ""]).encode())
            await until(lambda: folder.next_prompt == 5)
            os.write(writing, "\n".join(lines[5:]).encode())
            os.close(writing)
            await task
    os.close(reading)
    expect(lines).check(tmp_path / "out")


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
async def test_a_run_ends_though_its_prompts_do_not(server: Server, tmp_path: Path, ending: str) -> None:
    lines, (reading, writing) = texts(3), os.pipe()
    async with await AsyncSteerClient.connect(server.address) as client:
        os.write(writing, "\n".join([*lines, ""]).encode())
        with open_prompts(f"/dev/fd/{reading}") as source, CaptureFolder(tmp_path / "out", HEAD) as folder:
            capture = capture_run(client, source, folder, BOUND_S)
            task = asyncio.ensure_future(capture.run(source))
            await until(lambda: capture.covered == len(lines))
            if ending == "failed":
                os.write(writing, b"\xff\n")
            else:
                task.cancel()
            async with asyncio.timeout(BOUND_S):
                with pytest.raises(PromptFailed if ending == "failed" else asyncio.CancelledError):
                    await task
            assert list(source.lines) == []
    os.close(reading)
    os.close(writing)
    expect(lines).check(tmp_path / "out")


def test_a_command_ends_though_its_standard_input_does_not(server: Server, tmp_path: Path) -> None:
    options = ["--address", server.address, "--layers", "1", "--out", str(tmp_path / "out"), "--fail-fast"]
    with subprocess.Popen(
        [sys.executable, "-m", "steer_service.cli", "capture", "-", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"a b\nc \xff\n")
        process.stdin.flush()  # and stays open
        assert process.wait(60.0) == 1
        assert process.stderr is not None
        assert b"prompt 1 (line 2) failed" in process.stderr.read()
    expect(["a b"]).check(tmp_path / "out")
