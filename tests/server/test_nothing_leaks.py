"""Neither logs nor spans nor metadata show what a client keeps to itself: a run in which all of it is marked."""

import asyncio
import io
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest

from steer_service.core.errors import EngineFailed
from steer_service.core.log_lines import FORMATTERS
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.server.trace_endpoint import SERVICE_NAME, TRACES_PROTOCOL
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import capture_pb2, generation_pb2, tokenizer_pb2
from steer_service.wire.steering import steering_to_proto
from tests.server.capture_client import Begin, Client, all_of, asking
from tests.server.otlp_collector import collecting
from tests.server.served import bounded, text_request
from tests.server.test_tokens import entry

MARK = "MARKED"
BEARER = f"{MARK}-bearer-token"
VECTOR = np.full(8, 12345.678, np.float32)
"""Its number is the mark."""
TOKEN_ID = 31_337


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """All lines of every logger from `debug` on, in both forms."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers = [logging.StreamHandler(stream) for _ in FORMATTERS]
    for handler, form in zip(handlers, FORMATTERS.values(), strict=True):
        handler.setFormatter(form())
        root.addHandler(handler)
    level, ours = root.level, logging.getLogger("steer_service")
    root.setLevel(logging.INFO)
    ours.setLevel(logging.DEBUG)
    for name in (TRACES_PROTOCOL, SERVICE_NAME):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield stream
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)
    ours.setLevel(logging.NOTSET)


class Marked(Client):
    """A client whose every secret has the mark."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (
            ("authorization", f"Bearer {self.name}"),
            ("steer-client-id", f"{MARK}-client-id"),
            ("x-request-id", f"{MARK} not valid"),
            ("x-api-key", f"{MARK}-key"),
            ("traceparent", f"{MARK}"),
            ("tracestate", f"{MARK}=,{MARK} state"),
        )


def marked_request(**fields: Any) -> generation_pb2.GenerateRequest:
    steering = SteeringSpec({0: LayerSteeringSpec(operations=[AddSpec(VECTOR, 1.0)])})
    request = asking(text=f"{MARK} prompt", layers=[0], **fields)
    request.steering.CopyFrom(steering_to_proto(steering))
    request.sampling.stop.append(f"{MARK} stop")
    request.cache_salt = f"{MARK}-salt"
    return request


async def quietly(call: Any) -> None:
    with suppress(grpc.aio.AioRpcError):
        await bounded(all_of(call) if hasattr(call, "__aiter__") else call)


async def broken(_: int) -> None:
    raise KeyError(f"{MARK} text of an unexpected error")


async def run(client: Client) -> list[str]:
    """Calls that succeed, are refused and fail; returns the secrets that the server made."""
    served, held = client.served, await client.held(marked_request())
    await client.fetch(held.capture_id)
    opened = await served.capture.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=client.metadata)
    ids = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[TOKEN_ID] * 3))
    others = (
        served.generation.Generate(ids, metadata=client.metadata),
        served.generation.Generate(text_request(model=f"{MARK}-model"), metadata=client.metadata),
        served.generation.Generate(text_request(request_id=f"{MARK} not an id"), metadata=client.metadata),
        served.generation.Generate(marked_request(), metadata=(("authorization", f"Bearer {MARK}-wrong"),)),
        served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text=f"{MARK} text"), metadata=client.metadata),
        served.capture.FetchCapture(
            capture_pb2.FetchCaptureRequest(capture_id=f"{MARK}-capture"), metadata=client.metadata
        ),
        served.channel.unary_unary("/steer.v1.InfoService/GetModel")(b"\xff" + MARK.encode(), metadata=client.metadata),
    )
    for call in others:
        await quietly(call)
    served.backend.failure = EngineFailed(f"{MARK} text of a failure", reason="ABORTED")
    await quietly(served.generation.Generate(marked_request(), metadata=client.metadata))
    served.backend.failure, served.backend.step = None, broken
    await quietly(served.generation.Generate(marked_request(), metadata=client.metadata))
    return [held.capture_id, opened.segment_name, opened.challenge_token.hex()]


async def test_no_mark_is_in_a_log_line_a_span_or_a_series(begin: Begin, logged: io.StringIO, tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text(entry("alice", BEARER))
    with collecting() as collector:
        client = await begin(
            FakeBackend(), token_file=str(tmp_path / "tokens.toml"), otlp_traces_endpoint=collector.endpoint
        )
        server = client.served.server
        made = await run(Marked(client.served, BEARER))
        server.stop_now()
        await bounded(server.drain())
    await asyncio.sleep(0)

    spans = b"".join(span.raw for span in collector.spans).decode(errors="replace")
    everything = "\n".join((logged.getvalue(), spans, generate_latest(server.metrics.registry).decode()))
    assert len(collector.spans) >= 10
    reasons = {span.attributes.get("error.type", "") for span in collector.spans}
    assert reasons == {
        *("", "ABORTED", "INTERNAL", "MALFORMED"),
        *("UNKNOWN_MODEL", "UNKNOWN_CAPTURE", "BAD_REQUEST_ID"),
    }
    assert "KeyError at" in everything  # of the error that nobody expected, which is logged
    assert "alice" in everything
    secrets = [MARK, "12345.678", "12345.67", str(TOKEN_ID), *made]
    assert [secret for secret in secrets if secret in everything] == []


async def test_the_marks_would_be_found(logged: io.StringIO) -> None:
    logging.getLogger("steer_service.server.x").debug("a prompt: %s", f"{MARK} prompt")
    assert logged.getvalue().count(MARK) == len(FORMATTERS)
