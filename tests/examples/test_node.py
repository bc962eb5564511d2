"""The Node example against a real server: it gets, byte for byte, what the Python client gets."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_client import AddSpec, AsyncSteerClient, CaptureSite, CaptureSpec, LayerSteeringSpec, SteeringSpec
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.examples.node import (
    BOUND_S,
    PROMPT,
    SHARED_MEMORY,
    Segments,
    answer_in_node,
    described,
    needs_node,
    node,
    run_node,
)
from tests.server.served import Gate, Serve


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
    serve: Serve,
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
        assert answer["captures"] == described(await handles[0].fetch_rows(framework="native"))


@needs_node
async def test_node_prints_tokens_as_they_come(serve: Serve) -> None:
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
async def test_each_run_of_node_owns_its_captures(serve: Serve) -> None:
    served = await serve()

    await answer_in_node(served.server.address)
    await answer_in_node(served.server.address)

    clients = [request.client_id for request in served.backend.requests[-2:]]
    assert clients[0] != clients[1]
    assert all(len(client) > len("client ") + 20 for client in clients)


@needs_node
async def test_node_maps_a_segment_and_keeps_its_lease_until_enter(serve: Serve, segments: Segments) -> None:
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
async def test_without_shared_memory_node_reports_it_and_gets_captures_inline(
    serve: Serve,
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
async def test_node_prints_why_a_server_refused(serve: Serve) -> None:
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
async def test_node_resumes_an_interrupted_fetch(serve: Serve) -> None:
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
