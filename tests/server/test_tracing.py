"""Spans of calls, as a collector of OpenTelemetry receives them over a real connection."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from steer_service.core.errors import EngineFailed
from steer_service.server import tracing
from steer_service.server.trace_endpoint import SERVICE_NAME, TRACES_PROTOCOL
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import generation_pb2, info_pb2
from tests.server.capture_client import all_of, asking
from tests.server.otlp_collector import Collector, Received, Spans, collecting, collecting_over_http
from tests.server.served import Gate, Serve, Served, bounded, text_request
from tests.server.test_tokens import entry

GENERATE = "steer.v1.GenerationService/Generate"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-01")
SERVER_KIND = 2


@pytest.fixture(autouse=True)
def standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a server with traces sets, so that they are gone after the test."""
    for name in (TRACES_PROTOCOL, SERVICE_NAME):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


class Traced:
    """A server that traces, and what it sent when it was stopped."""

    def __init__(self, served: Served, collector: Collector) -> None:
        self.served = served
        self._collector = collector

    async def generate(self, request: Any = None, *metadata: tuple[str, str], **options: Any) -> Any:
        call = self.served.generation.Generate(request or text_request(), metadata=metadata, **options)
        return await bounded(all_of(call))

    async def spans(self) -> Spans:
        self.served.server.stop_now()
        await bounded(self.served.server.drain())
        return self._collector.spans

    async def span(self) -> Received:
        [span] = [span for span in await self.spans() if span.name == GENERATE]
        return span


@pytest.fixture
async def traced(serve: Serve, collector: Collector) -> Traced:
    return Traced(await serve(FakeBackend(), otlp_traces_endpoint=collector.endpoint), collector)


async def test_a_generation_is_a_span_by_the_conventions(traced: Traced) -> None:
    request = asking(layers=[0], max_tokens=4)
    request.request_id, request.sampling.temperature, request.sampling.top_p = "mine", 0.5, 0.25
    await traced.generate(request, ("x-request-id", "edge-1"))

    span = await traced.span()
    assert (span.kind, span.error, span.parent_id) == (SERVER_KIND, False, "")
    assert span.resource["service.name"] == "steerllm"
    times = {name for name in span.attributes if name.endswith("_s")}
    assert times == {"steerllm.queue_wait_s", "steerllm.first_token_s"}
    assert all(span.attributes.pop(name) >= 0 for name in times)
    assert span.attributes.pop("steerllm.client").startswith("~")
    assert span.attributes.pop("steerllm.instance") == span.resource["service.instance.id"]
    assert span.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "steer.v1.GenerationService",
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
        "gen_ai.provider.name": "steerllm",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "fake",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "steerllm.cached_tokens": 0,
        "steerllm.steered_rows": 0,
        "steerllm.captured_bytes": 6 * 8 * 4,
        "steerllm.x_request_id": "edge-1",
    }


async def test_the_span_is_a_child_of_the_callers_and_the_engine_gets_it_as_parent(traced: Traced) -> None:
    await traced.generate(None, SAMPLED, ("tracestate", "vendor=value"))
    [request] = [one for one in traced.served.backend.requests if one.request_id != "warm-up"]
    span = await traced.span()
    assert (span.trace_id, span.parent_id, span.state) == (TRACE, PARENT, "vendor=value")
    assert dict(request.trace_headers) == {
        "traceparent": f"00-{TRACE}-{span.span_id}-01",
        "tracestate": "vendor=value",
    }


async def test_a_caller_that_is_not_sampled_has_no_span(traced: Traced) -> None:
    await traced.generate(None, ("traceparent", f"00-{TRACE}-{PARENT}-00"))
    [request] = [one for one in traced.served.backend.requests if one.request_id != "warm-up"]
    assert dict(request.trace_headers)["traceparent"].startswith(f"00-{TRACE}-")
    assert dict(request.trace_headers)["traceparent"].endswith("-00")
    assert await traced.spans() == []


BAD_PARENTS = {
    "no hexadecimal": ("traceparent", "00-xyz-abc-01"),
    "all zero": ("traceparent", f"00-{'0' * 32}-{PARENT}-01"),
    "a version too high": ("traceparent", f"ff-{TRACE}-{PARENT}-01"),
    "empty": ("traceparent", ""),
    "long": ("traceparent", "0" * 4000),
}


@pytest.mark.parametrize("metadata", BAD_PARENTS.values(), ids=BAD_PARENTS)
async def test_a_parent_that_is_not_valid_is_ignored(
    traced: Traced, metadata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert await traced.generate(None, metadata, ("tracestate", "not valid,=,a=b=c"))
    span = await traced.span()
    assert (span.parent_id, span.state) == ("", "")
    assert span.trace_id != TRACE
    assert "not valid" not in caplog.text


async def test_a_state_that_is_not_valid_is_ignored_and_not_logged(
    traced: Traced, caplog: pytest.LogCaptureFixture
) -> None:
    await traced.generate(None, SAMPLED, ("tracestate", "Not Valid"))
    assert ((span := await traced.span()).parent_id, span.state) == (PARENT, "")
    assert "Not Valid" not in caplog.text


async def ended(call: Any) -> None:
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await bounded(all_of(call))


async def refused_before_it_is_read(served: Served) -> None:
    await ended(served.generation.Generate(text_request(), metadata=(("steer-client-id", "not valid!"),)))


async def refused(served: Served) -> None:
    await ended(served.generation.Generate(text_request(text="")))


async def failed(served: Served) -> None:
    served.backend.failure, served.backend.fail_at = EngineFailed("x", reason="ABORTED"), 2
    await ended(served.generation.Generate(text_request()))


async def broken(served: Served) -> None:
    async def step(_: int) -> None:
        raise KeyError("a secret of the prompt")

    served.backend.step = step
    await ended(served.generation.Generate(text_request()))


async def held(served: Served) -> Any:
    gate = served.backend.step = Gate()
    call = served.generation.Generate(text_request())
    await bounded(gate.reached.wait())
    return call


async def gone(served: Served) -> None:
    call = await held(served)
    call.cancel()
    await bounded(served.backend.wait_idle())
    await bounded(served.server._admission.wait_idle())


async def cancelled(served: Served) -> None:
    call = await held(served)
    started = (await bounded(call.read())).started
    await served.generation.Cancel(generation_pb2.CancelRequest(cancel_token=started.cancel_token))


async def stopped(served: Served) -> None:
    await held(served)


async def past_its_deadline(served: Served) -> None:
    served.backend.step = Gate()
    await ended(served.generation.Generate(text_request(), timeout=0.2))
    await bounded(served.server._admission.wait_idle())


ENDS = {
    refused_before_it_is_read: ("BAD_CLIENT_ID", grpc.StatusCode.INVALID_ARGUMENT, False),
    refused: ("EMPTY_PROMPT", grpc.StatusCode.INVALID_ARGUMENT, False),
    failed: ("ABORTED", grpc.StatusCode.INTERNAL, True),
    broken: ("INTERNAL", grpc.StatusCode.INTERNAL, True),
    gone: ("CLIENT_GONE", grpc.StatusCode.CANCELLED, False),
    cancelled: ("CANCELLED", grpc.StatusCode.CANCELLED, False),
    stopped: ("DRAINING", grpc.StatusCode.UNAVAILABLE, True),
    past_its_deadline: ("DEADLINE_EXCEEDED", grpc.StatusCode.DEADLINE_EXCEEDED, True),
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_the_span_of_a_call_ends_however_it_ends(traced: Traced, end: Any) -> None:
    reason, code, is_error = ENDS[end]
    await end(traced.served)
    span = await traced.span()
    found = span.attributes["error.type"], span.attributes["rpc.grpc.status_code"], span.error
    assert found == (reason, code.value[0], is_error)
    assert b"secret" not in span.raw


async def test_a_call_without_a_valid_token_has_no_span(serve: Serve, collector: Collector, tmp_path: Path) -> None:
    """Anyone can cause it, and name the trace that it belongs to."""
    (tmp_path / "tokens.toml").write_text(entry("alice", "alices"))
    served = await serve(token_file=str(tmp_path / "tokens.toml"), otlp_traces_endpoint=collector.endpoint)
    await ended(served.generation.Generate(text_request(), metadata=(("authorization", "Bearer wrong"),)))
    alice = (("authorization", "Bearer alices"),)
    await bounded(all_of(served.generation.Generate(text_request(), metadata=alice)))
    span = await Traced(served, collector).span()
    assert "error.type" not in span.attributes


async def test_other_methods_have_spans_and_health_checks_have_none(traced: Traced) -> None:
    await traced.served.health.Check(health_pb2.HealthCheckRequest())
    await traced.served.info.GetModel(info_pb2.GetModelRequest())
    assert [span.name for span in await traced.spans()] == ["steer.v1.InfoService/GetModel"]


async def test_spans_are_sent_over_http_too(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACES_PROTOCOL, "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    with collecting_over_http() as collector:
        served = await serve(otlp_traces_endpoint=f"{collector.endpoint}/v1/traces")
        traced = Traced(served, collector)
        await traced.generate()
        assert (await traced.span()).attributes["gen_ai.usage.output_tokens"] == 4


async def test_a_collector_that_does_not_answer_delays_neither_requests_nor_the_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.5)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    with socket.socket() as silent:  # connections wait in its backlog for ever
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        served = await serve(otlp_traces_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        for _ in range(30):  # more than are kept
            await served.generate(text_request())
        served.server.stop_now()
        await bounded(served.server.drain())


WITHOUT = """
import asyncio, sys
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from steer_client import AsyncSteerClient

async def main():
    server = SteerServer(ServerConfig(address="127.0.0.1:0"))
    await server.listen()
    await server.open(FakeBackend())
    async with AsyncSteerClient(server.address) as client:
        await client.generate("one two", max_tokens=2)
    server.stop_now()
    await server.drain()

asyncio.run(main())
print(*[name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_a_server_without_an_endpoint_imports_nothing_of_opentelemetry() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, env=os.environ)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
