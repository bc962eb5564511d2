"""The server's settings, and the environment variables that set them."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from steer_service.core.environment import PREFIX
from steer_service.core.errors import InvalidRequest
from steer_service.core.setting_rules import NUMBERS, WORDS, check_word
from steer_service.server.bind import SocketPermissions
from steer_service.server.callers import ProxyRules
from steer_service.server.certificates import CertificateFiles
from steer_service.server.instance import check_name
from steer_service.server.trusted_proxy import objective_priorities, trusted_proxy
from steer_service.shm.segments import SegmentDirectory, group_id, segment_directory

MAX_RESPONSE_BYTES = 4 * 1024 * 1024
"""Bytes of one response at most: the default limit of gRPC clients."""


STREAMS_BESIDES = 8192
"""Streams of one connection beyond those of its requests: fetches, health checks, cancels and refusals.

A new connection may open thousands at once before it learns of a limit, and loses those beyond it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server's settings; field `x` is also the environment variable `STEERLLM_X`. Raises InvalidRequest."""

    address: str = "127.0.0.1:50051"
    """`host:port`, where port 0 picks a free one, or `unix:/path`."""
    instance: str = ""
    """Name of this server among those behind a balancer, see instance.py; "" for a random one."""
    health_address: str = ""
    """A further address, like `address`, that serves health checks alone, in a thread of its own; "" for none."""
    listen_when_ready: int = 0
    """1: accept connections on `address` only once the engine has completed its first generation, for TCP probes."""
    token_file: str = ""
    """File of the clients' bearer tokens, see tokens.py: a call needs one of them. "" for none."""
    tls_cert: str = ""
    """PEM file with the certificate of the address; "" for no TLS."""
    tls_key: str = ""
    """PEM file with its private key."""
    tls_client_ca: str = ""
    """PEM file with the authorities of clients' certificates, without one of which no client connects; "" asks for
    none."""
    trusted_proxy: str = ""
    """Peers that may name the client for which they call, see trusted_proxy.py: `loopback`, `unix`, addresses, networks
    and `certificate:NAME`, between commas. "" for none."""
    objectives: str = ""
    """Priorities of the objectives that such a peer may name, such as `chat=0,batch=10`; a lower one comes first."""
    uds_mode: str = "600"
    """Permissions of a Unix socket, in octal: whoever may write to it may call."""
    uds_group: str = ""
    """Group of a Unix socket, by name or number; "" for this process's."""
    insecure: int = 0
    """1: listen without TLS on an address that other machines reach."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Bytes of one request at most; a full program of a large model takes some MiB."""
    max_concurrent_requests: int = 1024
    """Requests that run or wait at once; more are refused."""
    max_running_requests: int = 0
    """Requests that the engine has at once; the others wait, fairly between clients. 0: a few more than it computes."""
    max_client_requests: int = 0
    """Requests of one client that run or wait at once; 0: no limit of its own."""
    max_client_fetches: int = 64
    """Captures that one client fetches at once."""
    max_client_sessions: int = 64
    """Shared-memory sessions that one client has at once."""
    max_queued_bytes: int = 256 * 1024 * 1024
    """Bytes of requests that wait at once."""
    max_queued_tokens: int = 4 * 1024 * 1024
    """Prompt tokens of requests that wait at once; a text counts a quarter of its bytes."""
    max_deadline_s: float = 3600.0
    """Seconds that a request may take, also if its client sets a later deadline or none."""
    grace_s: float = 30.0
    """Seconds that running requests have to finish when the server stops."""
    retry_after_s: float = 1.0
    """Seconds after which a refused client may retry; sent with the refusal."""
    max_restarts: int = 5
    """How often the engine is started again within `restart_window_s` after it died; then the server exits."""
    restart_window_s: float = 600.0
    """Seconds after which a restart is no longer counted."""
    step_timeout_s: float = 0.0
    """The engine hangs if no step completes for this many seconds while requests run. 0: 60, more if steps are long."""
    send_timeout_s: float = 30.0
    """End a response stream, with a status, whose client has read nothing for this many seconds; 0 for never."""
    lame_duck_s: float = 0.0
    """Seconds for which a stopping server still accepts requests, while its health checks report NOT_SERVING."""
    prefix_isolation: str = "auto"
    """Whether clients reuse each other's prompts in the prefix cache. `none`: they do. `client`: they do not. `auto`:
    authenticated clients do not."""
    heartbeat_s: float = 15.0
    """Send a heartbeat on a response stream of Generate on which nothing else was sent for this long; 0 for never."""
    shared_memory: int = 1
    """1: clients on this host may receive captures in shared memory. 0: they may not."""
    shm_ttl: float = 600.0
    """Free a held capture or a lease of shared memory this many seconds after its last use."""
    shm_dir: str = "/dev/shm"
    """Directory, on a file system in memory, for the segments that hold captures."""
    shm_mode: str = "600"
    """Permissions of captures in shared memory, in octal."""
    shm_group: str = ""
    """Group of captures in shared memory, by name or number; "" for this process's."""
    vector_store_bytes: int = 256 * 1024 * 1024
    """Bytes of steering vectors that are stored for requests to name by digest; 0: none are stored."""
    client_vector_bytes: int = 64 * 1024 * 1024
    """Bytes of stored vectors that one client may have."""
    metrics_port: int = 0
    """HTTP port that serves metrics to Prometheus; 0 for none."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics port is bound to."""
    otlp_traces_endpoint: str = ""
    """Where spans are sent over OTLP, `host:port` or a URL; "" for nowhere."""
    log_level: str = "warning"
    """Least level of the lines that are logged, one of LEVELS."""
    log_format: str = "text"
    """`text`, or `json` for one JSON object per line."""

    def __post_init__(self) -> None:
        for name, rule in NUMBERS.items():
            rule.check(name, getattr(self, name))
        if self.instance:
            check_name(self.instance)
        for name, other in (("tls_key", "tls_cert"), ("tls_cert", "tls_key"), ("tls_client_ca", "tls_cert")):
            if getattr(self, name) and not getattr(self, other):
                raise InvalidRequest(f"it needs {other}", field=name)
        for name in WORDS:
            object.__setattr__(self, name, check_word(name, getattr(self, name)))
        _ = self.proxy_rules, self.socket_permissions

    @property
    def segments(self) -> SegmentDirectory:
        """The directory and permissions of captures; raises InvalidRequest if the settings are not valid."""
        return segment_directory(self.shm_dir, self.shm_mode, self.shm_group)

    @property
    def proxy_rules(self) -> ProxyRules:
        """Whose word about their clients counts; raises InvalidRequest if the settings are not valid."""
        return ProxyRules(proxy=trusted_proxy(self.trusted_proxy), priorities=objective_priorities(self.objectives))

    @property
    def socket_permissions(self) -> SocketPermissions:
        """Of a Unix socket; raises InvalidRequest if the settings are not valid."""
        return SocketPermissions(mode=int(self.uds_mode, 8), group=group_id(self.uds_group, "uds_group"))

    @property
    def certificates(self) -> CertificateFiles | None:
        """The files of the certificate; None without TLS."""
        if not self.tls_cert:
            return None
        return CertificateFiles(cert=self.tls_cert, key=self.tls_key, client_ca=self.tls_client_ca)

    @property
    def most_vector_bytes(self) -> int:
        """Bytes of vectors that one client can store; 0 if none are stored."""
        return min(self.vector_store_bytes, self.client_vector_bytes)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The defaults, overridden by environment variables; raises InvalidRequest for values that are not valid."""
        given: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = PREFIX + field.name.upper()
            if variable in environment:
                text = environment[variable]
                given[field.name] = NUMBERS[field.name].read(variable, text) if field.name in NUMBERS else text
        try:
            return cls(**given)
        except InvalidRequest as error:
            error.field = PREFIX + error.field.upper()
            raise

    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """Options for `grpc.aio.server`."""
        return (
            ("grpc.so_reuseport", 0),  # otherwise a second server silently shares the port
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
            # Above this limit calls wait in the client, also health checks: it must be out of reach of our own limits.
            ("grpc.max_concurrent_streams", 2 * self.max_concurrent_requests + STREAMS_BESIDES),
            # Above these limits, gRPC cancels calls at random before our code sees them.
            ("grpc.server.max_pending_requests", 16384),
            ("grpc.server.max_pending_requests_hard_limit", 16384),
            # Clients ping every 10-30 s while a long prompt is computed and no response is sent.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.max_connection_age_ms", 3_600_000),
            ("grpc.max_connection_age_grace_ms", 3_600_000),
        )
