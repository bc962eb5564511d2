"""The HTTP port of operators: metrics for Prometheus, and probes of an orchestrator that has no gRPC.

| path | answer |
|---|---|
| `/metrics` | all series |
| `/health` | 200 while the server's event loop runs, also while the model loads; else 503: restart the process |
| `/ready` | 200 while requests are served; else 503: send none |

It has threads of its own, so that no answer waits while thousands of calls arrive.
"""

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from steer_service.server.health import Health
from steer_service.server.pulse import Pulse

TIMEOUT_S = 10.0
"""Seconds that a connection may take, from its first byte to its last."""

MAX_CONNECTIONS = 64
"""Connections at once, with a thread each; others are closed."""


class HttpListener:
    """Serves the paths above."""

    def __init__(self, registry: CollectorRegistry, health: Health, pulse: Pulse) -> None:
        self._registry = registry
        self._health = health
        self._pulse = pulse
        self._http: ThreadingHTTPServer | None = None

    def listen(self, port: int, host: str) -> None:
        """Listens until `close`; raises OSError if the port is taken."""
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, body = listener.answer(self.path.partition("?")[0], self.headers.get("accept", ""))
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: a probe comes every few seconds."""

        self._http = _Server(_family_of(host), (host, port), Handler)
        threading.Thread(target=self._http.serve_forever, name="steer-http", daemon=True).start()

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return 200, kind, encode(self._registry)
        is_fine = not self._pulse.is_stale
        if path == "/ready":
            is_fine = is_fine and self._health.status == health_pb2.HealthCheckResponse.SERVING
        elif path != "/health":
            return 404, "text/plain; charset=utf-8", b"/metrics, /health and /ready are here\n"
        return (200, "text/plain; charset=utf-8", b"ok\n") if is_fine else (503, "text/plain; charset=utf-8", b"no\n")

    def close(self) -> None:
        """Ends what `listen` began."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()


class _Server(ThreadingHTTPServer):
    """Has a limited number of connections, each for a limited time: this port needs no credentials."""

    daemon_threads = True

    def __init__(self, family: int, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family
        self._opened: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """False, upon which it is closed, for a connection beyond the limit."""
        with self._lock:
            if len(self._opened) >= MAX_CONNECTIONS:
                return False
            self._opened[request] = time.monotonic()
        return True

    def service_actions(self) -> None:
        """Ends connections that have had their time; is called twice a second."""
        with self._lock:
            late = [request for request, since in self._opened.items() if time.monotonic() - since > TIMEOUT_S]
        for request in late:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        """Forgets the connection."""
        with self._lock:
            self._opened.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that breaks off is no event."""


def _family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
