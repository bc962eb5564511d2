"""The C example reads a leased segment, and refuses what it cannot read."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steer_client import AsyncSteerClient, CaptureSite, CaptureSpec
from steer_service.testing.fake_backend import FakeBackend
from tests.examples.node import BOUND_S, CC, EXAMPLES, PROMPT, SHARED_MEMORY, Segments, needs_cc
from tests.server.served import Serve


@pytest.fixture(scope="module")
def read_segment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the C program, built as its first comment says."""
    program = tmp_path_factory.mktemp("c") / "read_segment"
    source = EXAMPLES / "c" / "read_segment.c"
    subprocess.run([str(CC), "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)], check=True)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S)

    return run


ReadSegment = Callable[..., subprocess.CompletedProcess[str]]


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


@needs_cc
async def test_c_reads_a_leased_segment_until_the_lease_is_released(
    serve: Serve,
    segments: Segments,
    read_segment: ReadSegment,
) -> None:
    served = await serve(FakeBackend(place=segments))
    capture = CaptureSpec(layers=(1, 2), delivery="shared_memory_required")
    async with AsyncSteerClient(served.server.address) as client:
        _, handles = await client.generate(PROMPT, max_tokens=8, capture=capture)
        assert handles is not None
        rows = (await handles[0].fetch())[2][0]["hidden"].tobytes()
        [place] = segments.places
        where = place.name, place.offsets[2, CaptureSite.AFTER], len(rows)

        done = await asyncio.to_thread(read_segment, *where)

        assert place.offsets[2, CaptureSite.AFTER] > 0
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"bytes {len(rows)} sum {sum(rows)} fnv1a {fnv1a(rows):016x}\n"

        await handles[0].close()
        done = await asyncio.to_thread(read_segment, *where)

    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot open the segment: No such file or directory" in done.stderr


@pytest.fixture
def name() -> Iterator[str]:
    """A name in /dev/shm that is free, and free again after the test."""
    path = SHARED_MEMORY / f"read-segment-test-{os.getpid()}"
    yield path.name
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@needs_cc
@pytest.mark.parametrize(("offset", "count"), [(0, 101), (100, 1), (101, 1), (2**63, 2**63), (0, 0)])
def test_c_refuses_to_read_beyond_the_segment(read_segment: ReadSegment, name: str, offset: int, count: int) -> None:
    (SHARED_MEMORY / name).write_bytes(bytes(100))

    done = read_segment(name, offset, count)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"the segment has 100 bytes, not {count} from {offset} on" in done.stderr


@needs_cc
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_c_refuses_a_path_that_is_not_a_plain_file(
    read_segment: ReadSegment, name: str, make: Callable[[Path], None]
) -> None:
    make(SHARED_MEMORY / name)

    done = read_segment(name, 0, 1)

    assert (done.returncode, done.stdout) == (1, "")
    assert "not a segment" in done.stderr


@needs_cc
@pytest.mark.parametrize("arguments", [(), ("a", 0), ("a", -1, 4), ("a", "0x10", 4), ("a", 0, 2**70), ("a", 0, "")])
def test_c_refuses_invalid_arguments(read_segment: ReadSegment, arguments: tuple[object, ...]) -> None:
    assert read_segment(*arguments).returncode == 2
