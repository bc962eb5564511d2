"""The server's own series for Prometheus: what it counts. Others are in state_series.py and engine_series.py."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from steer_service.core.start_proof import StartProof
from steer_service.server.token_latency import TokenLatency
from steer_service.wire.chunks import ChunkResponse
from steer_service.wire.status_codes import CODES

R = TypeVar("R")

CAPTURE_EVENTS = {
    "reserved": "memory reserved for admitted requests",
    "written": "rows captured",
    "delivered": "rows sent or handed out in shared memory, counted each time that they are fetched",
    "released": "rows freed by their client or at the end of their session",
    "expired": "rows freed because no client used them in time",
    "refused": "memory requested beyond a budget",
}
"""What can happen to bytes of captures, and how the metric describes it."""


FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

QUEUE_BUCKETS_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

OK = "OK"
"""The code of requests that did not end with an error."""


class ServerMetrics:
    """Counts what the server does, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """The registry that Prometheus reads."""
        meanings = "; ".join(f"{event}: {meaning}" for event, meaning in CAPTURE_EVENTS.items())
        counter = Counter(
            "steerllm_capture_bytes", f"Bytes of captures. {meanings}.", ["event"], registry=self.registry
        )
        # Create every label now, so that a counter without events reads 0 and is not missing.
        self._bytes = {event: counter.labels(event) for event in CAPTURE_EVENTS}
        self.steered_rows = Counter(
            "steerllm_steered_rows",
            "Rows (tokens that were fed to the model) of complete outputs to which steering was applied.",
            registry=self.registry,
        )
        """Rows of complete outputs that were steered."""
        self.restarts = Counter(
            "steerllm_engine_restarts", "Starts of the engine after it died.", registry=self.registry
        )
        """Restarts of the engine."""
        self.first_token_s = Histogram(
            "steerllm_time_to_first_token_seconds",
            "From the arrival of a request to its first tokens, with its wait in the server's queue.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        """Seconds to the first tokens of each request."""
        self.queue_wait_s = Histogram(
            "steerllm_queue_wait_seconds",
            "From the arrival of a request to its place in the engine, of requests that got one.",
            buckets=QUEUE_BUCKETS_S,
            registry=self.registry,
        )
        """Seconds that each request waited for its place."""
        self.token_latency = TokenLatency()
        """Seconds between two responses with tokens of one output."""
        self.registry.register(self.token_latency)
        finished = Counter(
            "steerllm_requests_finished",
            "Requests of Generate that have ended, by code, refused ones included; CANCELLED: also those whose client "
            "left. Calls without valid credentials are not counted.",
            ["code"],
            registry=self.registry,
        )
        self._finished = {code: finished.labels(code) for code in (OK, *(code.name for code in CODES))}
        self._requests = Gauge(
            "steerllm_requests",
            "Requests by where they are: running, or in the server's queue.",
            ["state"],
            registry=self.registry,
        )
        self._proof_seconds = Gauge(
            "steerllm_start_proof_seconds",
            "Seconds in which the engine proved steering and capture at its last start; 0 before.",
            registry=self.registry,
        )
        self._memory = Gauge(
            "steerllm_capture_staging_bytes",
            "Memory of each worker for captured rows on their way from a GPU, of the device and pinned on the host.",
            ["memory"],
            registry=self.registry,
        )
        self._proof = Info("steerllm_start_proof", "What the engine proved at its last start.", registry=self.registry)

    def count_finished(self, code: grpc.StatusCode) -> None:
        """Counts a request that has ended with `code`."""
        self._finished[code.name].inc()

    def count(self, event: str, count: int) -> None:
        """Adds `count` bytes to one of CAPTURE_EVENTS."""
        self._bytes[event].inc(count)

    def show_proof(self, proof: StartProof) -> None:
        """Shows what the engine that is now open has proven."""
        self._proof_seconds.set(proof.seconds)
        self._memory.labels("device").set(proof.staging_bytes)
        self._memory.labels("pinned").set(proof.pinned_bytes)
        self._proof.info(
            {
                "device": proof.device,
                "step_classes": ", ".join(proof.step_classes),
                "kernel_rows": str(proof.kernel_rows),
                "kernel_error": f"{proof.kernel_error:.3g}",
                "is_exact": str(proof.is_exact).lower(),
            }
        )

    def counted(self, responses: Iterable[R]) -> Iterator[R]:
        """Yields `responses`, and counts the rows of each as delivered after it was sent."""
        for response in responses:
            yield response
            if isinstance(response, ChunkResponse):
                self.count("delivered", len(response.chunk.data))

    def total(self, event: str) -> int:
        """Bytes counted so far for one of CAPTURE_EVENTS."""
        return int(self.registry.get_sample_value("steerllm_capture_bytes_total", {"event": event}) or 0)

    def show_requests(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Shows how many requests run and wait, whenever Prometheus asks; both are called in another thread."""
        self._requests.labels("running").set_function(running)
        self._requests.labels("waiting").set_function(waiting)
