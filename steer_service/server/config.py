"""How the server listens and what it accepts; the one place where its environment is read."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from steer_service.core.errors import InvalidRequest
from steer_service.shm.segments import SegmentDirectory, segment_directory

ENVIRONMENT_PREFIX = "STEERLLM_"

MAX_RESPONSE_BYTES = 4 * 1024 * 1024
"""What any gRPC client accepts without being told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that can be chosen about the server; field `x` is also the environment variable `STEERLLM_X`."""

    address: str = "127.0.0.1:50051"
    """`host:port`, where port 0 picks a free one, or `unix:/path`."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Bytes of one request at most; a full program of a large model takes some MiB."""
    max_concurrent_requests: int = 1024
    """Requests that run or wait at once; more are refused."""
    grace_s: float = 30.0
    """Seconds that running requests are given to finish when the server stops."""
    retry_after_s: float = 1.0
    """Delay that refused callers are told to wait, in seconds."""
    send_timeout_s: float = 5.0
    """Seconds after which a stream is ended whose reader takes nothing although much waits; 0 for never."""
    shared_memory: int = 1
    """0: captures are never handed out in shared memory."""
    shm_ttl: float = 600.0
    """Seconds after which a held capture, or a lease of shared memory, that nobody uses is freed."""
    shm_dir: str = "/dev/shm"
    """Directory in memory in which captures lie."""
    shm_mode: str = "600"
    """Permissions of captures in shared memory, in octal."""
    shm_group: str = ""
    """Group of captures in shared memory, by name or number; "" for this process's."""
    vector_store_bytes: int = 256 * 1024 * 1024
    """Bytes of steering vectors that are kept for requests to name by digest; 0: none are."""
    client_vector_bytes: int = 64 * 1024 * 1024
    """Bytes of them that one client may have."""
    metrics_port: int = 0
    """Port on which Prometheus reads metrics over HTTP; 0 for none."""
    metrics_host: str = "127.0.0.1"
    """Interface of that port."""

    def __post_init__(self) -> None:
        for name in ("max_message_bytes", "max_concurrent_requests"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{getattr(self, name)} is not positive", field=name)
        for name in ("vector_store_bytes", "client_vector_bytes"):
            if getattr(self, name) < 0:
                raise InvalidRequest(f"{getattr(self, name)} is negative", field=name)
        for name in ("grace_s", "retry_after_s", "shm_ttl", "send_timeout_s"):
            if not 0 <= getattr(self, name) < 1e6:  # also refuses NaN
                raise InvalidRequest(f"{getattr(self, name)} is outside 0..1000000 seconds", field=name)

    @property
    def segments(self) -> SegmentDirectory:
        """Where captures lie, and who may read them; raises InvalidRequest for what cannot be."""
        return segment_directory(self.shm_dir, self.shm_mode, self.shm_group)

    @property
    def most_vector_bytes(self) -> int:
        """Bytes of vectors that one client can have stored; 0 if none are."""
        return min(self.vector_store_bytes, self.client_vector_bytes)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The defaults, and over them what the environment says; raises InvalidRequest for what is not a number."""
        given: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = ENVIRONMENT_PREFIX + field.name.upper()
            if variable in environment:
                given[field.name] = _parsed(environment[variable], type(field.default), variable)
        return cls(**given)

    def channel_options(self) -> tuple[tuple[str, int], ...]:
        """The settings of the gRPC server."""
        return (
            ("grpc.so_reuseport", 0),  # otherwise a second server silently shares the port
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
            ("grpc.max_concurrent_streams", 1024),
            # Above these, gRPC cancels calls at random before any code of ours sees them.
            ("grpc.server.max_pending_requests", 16384),
            ("grpc.server.max_pending_requests_hard_limit", 16384),
            # Clients ping every 10-30 s while a long prompt is computed and nothing is sent.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.max_connection_age_ms", 3_600_000),
            ("grpc.max_connection_age_grace_ms", 3_600_000),
        )


def _parsed(text: str, kind: type[Any], variable: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not a number", field=variable) from None
