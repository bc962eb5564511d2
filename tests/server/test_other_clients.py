"""A client that this project did not write: buf's, on another gRPC stack, knowing only what reflection says."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.server.served import Serve, Served, bounded

BUF = shutil.which("buf", path=str(Path(sys.executable).parent))

pytestmark = pytest.mark.skipif(BUF is None, reason="buf is not installed; it comes with the dev extra")


async def buf_curl(served: Served, method: str, body: dict | None = None, *flags: str) -> tuple[int, str, str]:
    url = f"http://{served.server.address}{method}"
    data = () if body is None else ("-d", json.dumps(body))
    process = await asyncio.create_subprocess_exec(
        str(BUF),
        "curl",
        "--protocol=grpc",
        "--http2-prior-knowledge",
        *flags,
        *data,
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await bounded(process.communicate())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def objects(text: str) -> list[dict]:
    decoder, found, position = json.JSONDecoder(), [], 0
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        found.append(value)
        position += len(text[position:]) - len(text[position:].lstrip())
    return found


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
async def test_it_finds_every_method(serve: Serve, version: str):
    served = await serve()
    status, out, _ = await buf_curl(served, "", None, "--list-methods", "--reflect-protocol", version)
    assert status == 0
    assert {"steer.v1.GenerationService/Generate", "grpc.health.v1.Health/Watch"} <= set(out.split())


async def test_it_reads_a_whole_stream(serve: Serve):
    served = await serve()
    body = {"text": "a b c", "sampling": {"maxTokens": 2}, "capture": {"layers": [1]}}
    status, out, _ = await buf_curl(served, "/steer.v1.GenerationService/Generate", body)
    assert status == 0
    kinds = [next(kind for kind in response if kind != "sequence") for response in objects(out)]
    assert kinds == [
        "started",
        "token",
        "token",
        "captureLabels",
        "captureChunk",
        "finished",
        "completed",
    ]


async def test_it_asks_for_rows_by_position(serve: Serve):
    served = await serve()
    capture = {
        "layers": [1],
        "positions": {"generated": True, "ranges": [{"first": -1, "last": -1}]},
        "site": "CAPTURE_SITE_BOTH",
        "dtype": "DTYPE_F32",
    }
    body = {"text": "a b c", "sampling": {"maxTokens": 3}, "capture": capture}
    status, out, _ = await buf_curl(served, "/steer.v1.GenerationService/Generate", body)
    assert status == 0
    responses = objects(out)
    [labels] = [response["captureLabels"] for response in responses if "captureLabels" in response]
    assert (labels["positions"], labels["isGenerated"]) == ([2, 3, 4], [False, True, True])
    headers = [response["captureChunk"]["header"] for response in responses if "captureChunk" in response]
    assert [header["site"] for header in headers] == ["CAPTURE_SITE_BEFORE", "CAPTURE_SITE_AFTER"]
    assert [header["spans"] for header in headers] == [[{"first": 2, "count": 3}]] * 2


async def test_it_reads_an_error_with_its_details(serve: Serve):
    served = await serve()
    status, _, err = await buf_curl(
        served, "/steer.v1.GenerationService/Generate", {"text": "a", "sampling": {"temperature": -1}}
    )
    assert status != 0
    assert "invalid_argument" in err
    assert "google.rpc.ErrorInfo" in err
    assert "google.rpc.BadRequest" in err
