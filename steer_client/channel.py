"""How a client reaches its server: the address, the options of the channel and the metadata of every call."""

import asyncio
import base64
import functools
import json
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypedDict

import grpc

from steer_client.forks import check_grpc_usable, note_closed, note_open
from steer_client.open_calls import close_channel
from steer_service.core.errors import closed_error
from steer_service.core.field_checks import check_identifier, check_timeout
from steer_service.runtime.forks import keep_for_ever, tell_after_fork
from steer_service.runtime.many_prompts import check_concurrency
from steer_service.wire.capture_pb2 import FetchCaptureRequest
from steer_service.wire.channels import (
    DEFAULT_ADDRESS,
    bearer_metadata,
    check_address,
    check_bearer_token,
    is_this_machine,
)
from steer_service.wire.chunks import fetch_response_from_bytes, generate_response_from_bytes
from steer_service.wire.generation_pb2 import GenerateRequest

CLIENT_NAME = "steerllm-python"
"""Sent to servers as `steer-client-name`."""

MAX_RECEIVE_BYTES = 16 << 20
"""Largest message from the server, which stays below 4 MiB unless a prompt has millions of tokens."""

SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],  # every method: a request is retried only if the server sent no response
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
"""Retries for all methods. No hedging: a generation that runs twice costs twice. No waitForReady: without a server the
error would be a deadline that passed."""


class ClientOptions(TypedDict, total=False):
    """Keywords of a client, the fields of ClientConfig; without `client_id`, it is random."""

    timeout_s: float | None
    silence_timeout_s: float | None
    unary_timeout_s: float
    max_concurrency: int | None
    client_id: str | None
    shm_dir: str
    token: str
    credentials: grpc.ChannelCredentials | None
    metadata: Sequence[tuple[str, str | bytes]]
    channel_options: Sequence[tuple[str, str | int]]
    interceptors: Sequence[grpc.aio.ClientInterceptor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """The options of a client."""

    address: str = DEFAULT_ADDRESS
    """`host:port`, or `unix:` and a path."""
    timeout_s: float | None = None
    """Seconds a generation may take, including its wait in the queue; None: no limit."""
    silence_timeout_s: float | None = 60.0
    """Seconds for which a server may be silent in a generation or fetch, without a response or a heartbeat; None: no
    limit. Servers send a heartbeat every 15 s (`STEERLLM_HEARTBEAT_S`), also to requests that wait."""
    unary_timeout_s: float = 10.0
    """Seconds any other call may take."""
    max_concurrency: int | None = 256
    """Prompts of one call that are in flight at most; None: all. vLLM computes so many at once by default."""
    client_id: str = field(repr=False)
    """A secret that owns the captures of this client; a client with the same secret may fetch and release them."""
    shm_dir: str = "/dev/shm"
    """Directory where this process sees the memory that it may share with the server."""
    token: str = field(default="", repr=False)
    """Bearer token that is sent with every call, without spaces and line ends around it; "" for none. Without TLS,
    whoever sees the connection can read it."""
    credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    """Of a connection with TLS, such as `tls_credentials()`; None: no TLS."""
    metadata: Sequence[tuple[str, str | bytes]] = field(default=(), repr=False)
    """Metadata of every call, beside the client's own; keys are in lower case."""
    channel_options: Sequence[tuple[str, str | int]] = ()
    """gRPC's options of a connection, in place of the client's own of the same names."""
    interceptors: Sequence[grpc.aio.ClientInterceptor] = field(default=(), repr=False)
    """gRPC's interceptors of every call that is made in an event loop: of all but those behind `info`."""

    @classmethod
    def of(cls, address: str, options: ClientOptions) -> "ClientConfig":
        """The configuration of a client; raises InvalidRequest, which names the option."""
        given: dict[str, Any] = dict(options)
        unknown = set(given) - set(ClientOptions.__annotations__)
        if unknown:
            raise TypeError(f"{sorted(unknown)[0]!r} is not an option of a client")
        if "token" in given:
            given["token"] = given["token"].strip()  # of a file that was read, the line end
        return cls(address=address, **{**given, "client_id": given.get("client_id") or random_client_id()})

    def __post_init__(self) -> None:
        check_address(self.address)
        check_identifier(self.client_id, "client_id")
        check_bearer_token(self.token)
        check_concurrency(self.max_concurrency)
        for name in ("timeout_s", "silence_timeout_s", "unary_timeout_s"):
            value = getattr(self, name)
            if value is not None:
                check_timeout(value, name)


class LoopChannels:
    """One channel per event loop, opened at its first call: a grpc.aio channel serves one loop only."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._channels: dict[asyncio.AbstractEventLoop, grpc.aio.Channel] = {}
        self._closed = False
        self._lock = threading.RLock()
        """Held to change `_channels`: loops may be in several threads."""
        tell_after_fork(self)

    def after_fork(self) -> None:
        """Leaves the parent's channels alone: to free them here would close the connections of the parent."""
        for channel in self._channels.values():
            keep_for_ever(channel)
        self._channels = {}
        self._lock = threading.RLock()  # a thread of the parent may have held the other one

    def for_running_loop(self) -> grpc.aio.Channel:
        """The channel of the running loop; raises EngineFailed after `close`, and FORKED after a fork."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._closed:
                raise closed_error("the client")
            if loop not in self._channels:
                self._channels = {known: channel for known, channel in self._channels.items() if not known.is_closed()}
                self._channels[loop] = _channel(self._config)
                note_open(self)
            return self._channels[loop]

    @property
    def is_closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    async def close(self) -> None:
        """Closes the channels of all loops and cancels their calls; calling it again does nothing."""
        with self._lock:
            self._closed = True
            note_closed(self)
            channels, self._channels = self._channels, {}
        for loop, channel in channels.items():
            if loop is asyncio.get_running_loop():
                await close_channel(channel)
            else:
                _close_in(loop, channel)


_closing: set[asyncio.Task[None]] = set()


def _close_in(loop: asyncio.AbstractEventLoop, channel: grpc.aio.Channel) -> None:
    """Closes the channel of another loop there; if that ends first, the channel ends with it."""

    def begin() -> None:
        task = loop.create_task(close_channel(channel))
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    with suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(begin)


def channel_options(address: str) -> list[tuple[str, str | int]]:
    """The options of every channel to `address`."""
    return [
        ("grpc.primary_user_agent", f"{CLIENT_NAME}/{client_version()}"),
        ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        (
            "grpc.http2.max_pings_without_data",
            0,
        ),  # also watches the connection during a long prefill, which sends no data
        ("grpc.max_reconnect_backoff_ms", 5_000),  # gRPC's own 2 minutes would outlast the outage
        ("grpc.use_local_subchannel_pool", 1),  # a new client does not inherit the backoff of an older one
        ("grpc.enable_http_proxy", 0 if is_this_machine(address) else 1),
    ]


def _options_of(config: ClientConfig) -> list[tuple[str, str | int]]:
    return [*{**dict(channel_options(config.address)), **dict(config.channel_options)}.items()]


def _channel(config: ClientConfig) -> grpc.aio.Channel:
    check_grpc_usable()
    options, interceptors = _options_of(config), list(config.interceptors)
    if config.credentials is None:
        return grpc.aio.insecure_channel(config.address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(config.address, config.credentials, options=options, interceptors=interceptors)


def blocking_channel(config: ClientConfig) -> grpc.Channel:
    """A channel for a caller without an event loop."""
    check_grpc_usable()
    if config.credentials is None:
        return grpc.insecure_channel(config.address, options=_options_of(config))
    return grpc.secure_channel(config.address, config.credentials, options=_options_of(config))


def random_client_id() -> str:
    """A random secret of 192 bits."""
    return secrets.token_urlsafe(24)


def call_metadata(config: ClientConfig, instance: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """The metadata of every call, which names the server that it needs if that is one of several."""
    pinned = (("steer-instance", base64.b64encode(instance.encode()).decode()),) if instance else ()
    return (
        *config.metadata,
        *bearer_metadata(config.token),
        *pinned,
        ("steer-client-name", CLIENT_NAME),
        ("steer-client-version", client_version()),
        ("steer-client-id", config.client_id),
    )


@functools.cache  # every call sends it, and it is read from a file
def client_version() -> str:
    """Version of the installed distribution; "0" in a source tree."""
    try:
        return metadata.version("steerllm")
    except metadata.PackageNotFoundError:
        return "0"


def generate_on(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamMultiCallable:
    """The RPC Generate on `channel`; unlike with the stub, capture chunks are not copied into messages."""
    return channel.unary_stream(
        "/steer.v1.GenerationService/Generate",
        request_serializer=GenerateRequest.SerializeToString,
        response_deserializer=generate_response_from_bytes,
    )


def fetch_on(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamMultiCallable:
    """The RPC FetchCapture on `channel`; capture chunks are not copied into messages."""
    return channel.unary_stream(
        "/steer.v1.CaptureService/FetchCapture",
        request_serializer=FetchCaptureRequest.SerializeToString,
        response_deserializer=fetch_response_from_bytes,
    )
