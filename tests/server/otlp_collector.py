"""A collector of OpenTelemetry: it takes spans over a real connection and decodes them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Spans = list["Received"]


@dataclass(frozen=True)
class Received:
    """One span, as it came."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    error: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]
    raw: bytes


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What has arrived, in order."""

    def __init__(self) -> None:
        self.spans: Spans = []
        self.arrived = threading.Condition()
        self.endpoint = ""

    def Export(self, request: Any, context: Any) -> Any:
        received = [
            _received(span, _values(group.resource.attributes))
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self.arrived:
            self.spans += received
            self.arrived.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        """Returns when spans have arrived for which `condition` holds; blocks."""
        with self.arrived:
            assert self.arrived.wait_for(condition, timeout_s), [span.name for span in self.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that speaks OTLP over gRPC."""
    collector = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield collector
        finally:
            server.stop(0).wait()


@contextmanager
def collecting_over_http() -> Iterator[Collector]:
    """A collector that speaks OTLP over HTTP, in protobuf."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers.get("Content-Encoding", "identity") == "identity"
            collector.Export(trace_service_pb2.ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _received(span: Span, resource: dict[str, Any]) -> Received:
    return Received(
        name=span.name,
        kind=span.kind,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        error=span.status.code == 2,
        attributes=_values(span.attributes),
        resource=resource,
        raw=span.SerializeToString(),
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
