"""Spans of calls for OpenTelemetry, by its conventions for RPCs and for generative AI.

Imported by servers that trace, and by no other. The instrumentation of OpenTelemetry's own is not used: it would wrap
each handler, at a cost for every response, and knows neither our errors nor what a generation did.
"""

import asyncio
import importlib.metadata
import logging
import threading
from contextlib import suppress
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from steer_service.core.prompt import ChatPrompt
from steer_service.server.call_record import CallRecord, GenerationRecord, Metadata, TraceHeaders
from steer_service.server.trace_endpoint import HTTP, share_with_engine, traces_protocol

FLUSH_S = 5.0
"""Seconds that a stopping server takes to send its last spans, at most."""

MOST_STATE_CHARACTERS = 512
"""Characters of `tracestate` that are passed on, as W3C's specification demands at least."""

NOT_TRACED = "grpc."
"""Methods of services that begin so have no spans: health checks and reflection."""

SERVERS_FAULT = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes that make the span of a server one of an error, by OpenTelemetry's conventions for gRPC."""

Attribute = str | int | float | list[str]

_propagator = TraceContextTextMapPropagator()


class CallSpan:
    """The span of one call."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.trace_id = format_trace_id(span.get_span_context().trace_id)
        """Of its trace, 32 hexadecimal digits."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(span, Context()))
        self.headers: TraceHeaders = tuple(carrier.items())
        """W3C trace context of what the call causes in the engine."""

    def end(self, call: CallRecord) -> None:
        """Ends it with what is known of the call."""
        if self._span.is_recording():
            self._span.set_attributes(_of_call(call))
            if call.generation is not None:
                self._span.set_attributes(_of_generation(call.generation))
            if call.code in SERVERS_FAULT:
                self._span.set_status(Status(StatusCode.ERROR, call.reason))
        self._span.end()


class Tracing:
    """Begins the spans of a server and sends them in a thread of its own; drops them if nobody takes them."""

    def __init__(self, endpoint: str, instance_id: str) -> None:
        """Raises ModuleNotFoundError if OpenTelemetry's exporter of the chosen protocol is not installed."""
        # It warns of each bad `tracestate`, and quotes it.
        logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)
        share_with_engine()
        version = importlib.metadata.version("steerllm")
        resource = Resource.create({"service.instance.id": instance_id, "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = _exporter(endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("steerllm", version)
        self._instance_id = instance_id

    def begin(self, method: str, metadata: Metadata) -> CallSpan | None:
        """The span of a call that begins now, a child of the span that its metadata name; None for health checks."""
        if method.startswith(NOT_TRACED):
            return None
        service, _, name = method.partition("/")
        attributes = {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": name,
            "steerllm.instance": self._instance_id,
        }
        span = self._tracer.start_span(method, _parent_of(metadata), SpanKind.SERVER, attributes)
        return CallSpan(span)

    async def close(self) -> None:
        """Sends what is left, vLLM's last spans of this process too, but gives up after FLUSH_S."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            engines = trace.get_tracer_provider()
            if isinstance(engines, TracerProvider):
                engines.shutdown()
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, daemon=True, name="steer-last-spans").start()
        try:
            await asyncio.wait_for(sent.wait(), FLUSH_S)
        except TimeoutError:
            self._exporter.shutdown()  # ends the attempt that `send` waits for


def _exporter(endpoint: str) -> SpanExporter:
    """The same as vLLM's: without TLS unless the endpoint is an https URL."""
    if traces_protocol() == HTTP:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(endpoint=endpoint, insecure=True)


def _parent_of(metadata: Metadata) -> Context:
    """The context in `traceparent` and `tracestate`; none for one that is not valid or is given twice."""
    given = [value for key, value in metadata if key == "traceparent"]
    if len(given) != 1 or not isinstance(given[0], str):
        return Context()
    carrier = {"traceparent": given[0]}
    state = ",".join(value for key, value in metadata if key == "tracestate" and isinstance(value, str))
    if 0 < len(state) <= MOST_STATE_CHARACTERS:
        carrier["tracestate"] = state
    return _propagator.extract(carrier, Context())


def _of_call(call: CallRecord) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "rpc.grpc.status_code": call.code.value[0],
        "steerllm.x_request_id": call.x_request_id,
    }
    if call.client:
        attributes["steerllm.client"] = call.client
    if call.reason:
        attributes["error.type"] = call.reason
    return attributes


def _of_generation(done: GenerationRecord) -> dict[str, Attribute]:
    found: dict[str, Any] = {"gen_ai.provider.name": "steerllm", "steerllm.queue_wait_s": done.queue_wait_s}
    if done.request is not None:
        found |= {
            "gen_ai.operation.name": "chat" if isinstance(done.request.prompt, ChatPrompt) else "text_completion",
            "gen_ai.response.id": done.request.request_id,
            "gen_ai.response.finish_reasons": done.finish_reasons or None,
            "gen_ai.usage.input_tokens": done.prompt_tokens,
            "gen_ai.usage.output_tokens": done.generated_tokens,
            "steerllm.cached_tokens": done.cached_tokens,
            "steerllm.steered_rows": done.steered_rows,
            "steerllm.captured_bytes": done.captured_bytes,
            "steerllm.first_token_s": done.first_token_s,
        }
    if done.sampling is not None:
        found |= {
            "gen_ai.request.model": done.model,
            "gen_ai.response.model": done.model,
            "gen_ai.request.max_tokens": done.sampling.max_tokens,
            "gen_ai.request.temperature": done.sampling.temperature,
            "gen_ai.request.top_p": done.sampling.top_p,
            "gen_ai.request.top_k": done.sampling.top_k,
            "gen_ai.request.choice.count": done.sampling.n,
        }
    return {name: value for name, value in found.items() if value is not None}
