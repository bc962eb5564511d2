"""Metrics for Prometheus: bytes of captures by what happened to them, and the engine's proof at its start."""

from collections.abc import Iterable, Iterator
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from steer_service.core.start_proof import StartProof
from steer_service.wire.chunks import ChunkResponse

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


class ServerMetrics:
    """Counts bytes of captures and shows the engine's proof, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """The registry that Prometheus reads."""
        meanings = "; ".join(f"{event}: {meaning}" for event, meaning in CAPTURE_EVENTS.items())
        self._http: WSGIServer | None = None
        counter = Counter(
            "steerllm_capture_bytes", f"Bytes of captures. {meanings}.", ["event"], registry=self.registry
        )
        # Create every label now, so that a counter without events reads 0 and is not missing.
        self._bytes = {event: counter.labels(event) for event in CAPTURE_EVENTS}
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

    def listen(self, port: int, host: str) -> None:
        """Serves the metrics over HTTP until `close`; raises OSError if the port is taken."""
        self._http, _ = start_http_server(port, host, registry=self.registry)

    def close(self) -> None:
        """Stops serving the metrics, if `listen` was called."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
