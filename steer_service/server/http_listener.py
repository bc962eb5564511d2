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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from steer_service.server.health import Health
from steer_service.server.pulse import Pulse

READ_TIMEOUT_S = 10.0
"""Seconds within which a request must have arrived."""


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
            timeout = READ_TIMEOUT_S

            def do_GET(self) -> None:
                status, kind, body = listener.answer(self.path.partition("?")[0], self.headers.get("accept", ""))
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: a probe comes every few seconds."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            address_family = _family_of(host)

        self._http = Server((host, port), Handler)
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


def _family_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
