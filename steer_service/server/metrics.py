"""What operators can count: bytes of captures, by what became of them."""

from collections.abc import Iterator
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, start_http_server

from steer_service.wire.chunks import ChunkResponse

R = TypeVar("R")

CAPTURE_EVENTS = {
    "reserved": "memory set aside for requests that were admitted",
    "written": "rows captured",
    "delivered": "rows sent, or handed out in shared memory; rows that are fetched twice count twice",
    "released": "rows freed by their clients, or with their session",
    "expired": "rows freed because nobody used them in time",
    "refused": "memory asked for by requests that were over a budget",
}
"""What happens to bytes of captures."""


class CaptureMetrics:
    """Counts bytes of captures, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """What an exporter reads."""
        said = "; ".join(f"{event}: {words}" for event, words in CAPTURE_EVENTS.items())
        self._http: WSGIServer | None = None
        counter = Counter("steerllm_capture_bytes", f"Bytes of captures. {said}.", ["event"], registry=self.registry)
        # All of them at once: a counter that stands at 0 is not one that is missing.
        self._bytes = {event: counter.labels(event) for event in CAPTURE_EVENTS}

    def count(self, event: str, count: int) -> None:
        """Adds `count` bytes to one of CAPTURE_EVENTS."""
        self._bytes[event].inc(count)

    def counted(self, responses: Iterator[R]) -> Iterator[R]:
        """Those messages; counts the rows in each as delivered once it was sent."""
        for response in responses:
            yield response
            if isinstance(response, ChunkResponse):
                self.count("delivered", len(response.chunk.data))

    def total(self, event: str) -> int:
        """Bytes counted for an event so far."""
        return int(self.registry.get_sample_value("steerllm_capture_bytes_total", {"event": event}) or 0)

    def listen(self, port: int, host: str) -> None:
        """Serves the metrics over HTTP until `close`; raises OSError if the port is taken."""
        self._http, _ = start_http_server(port, host, registry=self.registry)

    def close(self) -> None:
        """Ends what `listen` began, if it did."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
