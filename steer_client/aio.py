"""The client for asynchronous programs: generate, chat, stream and submit over a gRPC channel."""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack
from weakref import finalize

import grpc
from google.protobuf.message import Message

from steer_client.capture_handles import RemoteCapture, shared_capture
from steer_client.channel import (
    ClientConfig,
    ClientOptions,
    LoopChannels,
    call_metadata,
    fetch_on,
    generate_on,
)
from steer_client.connection_errors import error_from_call
from steer_client.facts import fetch_model_info, fetch_model_info_async, fetch_server_info, unary_limit
from steer_client.open_calls import ends_with
from steer_client.other_instances import events_reaching, reaching
from steer_client.readiness import READY_TIMEOUT_S, wait_until_ready
from steer_client.shared_memory import SharedMemorySession
from steer_client.uploaded_vectors import UploadedVectors
from steer_client.watched_calls import WatchedCall, cancel_count, stream_limit, timeout_of
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery
from steer_service.core.errors import MissingVectors, OtherInstance, SteerError, closed_error
from steer_service.core.events import CaptureHeld, Completed, Event, OutputFinished, Started
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.server_info import ServerInfo
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.deadline import CallLimit, call_deadline
from steer_service.runtime.process_bound import ProcessBound
from steer_service.wire import generation_pb2
from steer_service.wire.blocks import SharedBlock
from steer_service.wire.capture import delivery_to_proto
from steer_service.wire.capture_pb2 import CAPTURE_DELIVERY_INLINE, FetchCaptureRequest, ReleaseCaptureRequest
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.channels import DEFAULT_ADDRESS
from steer_service.wire.events import WireEvent, events_from_responses
from steer_service.wire.field_paths import name_layer
from steer_service.wire.stored_capture import StoredCaptureNotice
from steer_service.wire.tokenizer_pb2_grpc import TokenizerServiceStub
from steer_service.wire.tokens import (
    detokenize_to_proto,
    render_to_proto,
    rendered_from_proto,
    tokenize_to_proto,
    tokenized_from_proto,
)

Asked = TypeVar("Asked", GenerateRequest, RenderRequest)
"""A request with a prompt."""

STAYS_ON_SERVER = frozenset(delivery_to_proto(delivery) for delivery in CaptureDelivery) - {CAPTURE_DELIVERY_INLINE}
"""Deliveries whose captures stay on the server, or in its shared memory, until they are released."""


class AsyncSteerClient(ProcessBound, SteeringCalls):
    """A model served by `steer serve`, with the calls of an engine in this process.

    It connects at the first call; one client may serve several event loops. Every method raises a SteerError: the one
    that the server raised, or EngineFailed with reason UNREACHABLE, TLS_FAILED, CONNECTION_LOST or CLOSED.

    `address` is `host:port`, or `unix:` and a path. The options, with their defaults:

    * `timeout_s`: seconds that a generation may take, with its wait in the queue (no limit).
    * `silence_timeout_s`: seconds without a response or a heartbeat in a generation or a fetch (60; None: no limit).
    * `unary_timeout_s`: seconds that any other call may take (10).
    * `max_concurrency`: prompts of one call that are in flight at most (256; None: all).
    * `client_id`: the secret that owns its captures (random). A client with the same one may fetch and release them.
    * `token`, `credentials`: a bearer token, and TLS as from `tls_credentials` (neither).
    * `shm_dir`: the directory where this process sees the memory that it may share with the server (`/dev/shm`).
    * `metadata`, `channel_options`, `interceptors`: gRPC's, added to the client's own.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._config = ClientConfig.of(address, options)
        self._channels = LoopChannels(self._config)
        self._sessions: dict[grpc.aio.Channel, SharedMemorySession] = {}
        self._uploaded_vectors = UploadedVectors()
        self._releasing: set[asyncio.Task[None]] = set()
        self._info: ModelInfo | None = None
        finalize(self, _end_sessions, self._sessions, os.getpid()).atexit = False

    @classmethod
    async def connect(
        cls,
        address: str = DEFAULT_ADDRESS,
        *,
        connect_timeout_s: float | None = None,
        **options: Unpack[ClientOptions],
    ) -> Self:
        """A client, with the options of the class, that has reached its server and knows its model.

        It takes at most `connect_timeout_s` (default: the client's `unary_timeout_s`). Raises EngineFailed if there is
        no server; `wait_until_ready` waits for one.
        """
        client = cls(address, **options)
        try:
            async with call_deadline(connect_timeout_s, "connect"):
                await client.load_info()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def address(self) -> str:
        """The address of the server."""
        return self._config.address

    @property
    def info(self) -> ModelInfo:
        """Facts about the model; the first use blocks until the server responds, unless `connect` made the client."""
        if self._info is None:
            if self._channels.is_closed:
                raise closed_error("the client")
            self._info = fetch_model_info(self._config)
        return self._info

    @property
    def default_concurrency(self) -> int | None:
        """Prompts of one call that are in flight at most: the client's `max_concurrency`."""
        return self._config.max_concurrency

    @property
    def default_timeout_s(self) -> float | None:
        """Seconds of each generation of a call without a `timeout_s`: the client's `timeout_s`."""
        return self._config.timeout_s

    async def load_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Facts about the model; asks the server at the first use. Raises a SteerError if it does not answer."""
        if self._info is None:
            async with call_deadline(timeout_s, "load_info"):
                self._info = await fetch_model_info_async(self._config, self._channels.for_running_loop())
        return self._info

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Facts about the server, asked anew each time: its version, limits and features. It need not be ready."""
        async with call_deadline(timeout_s, "server_info"):
            return await fetch_server_info(self._config, self._channels.for_running_loop())

    async def wait_until_ready(self, *, timeout_s: float = READY_TIMEOUT_S) -> ModelInfo:
        """Waits until the server listens, is SERVING and has its model; returns the facts about the model.

        Raises DeadlineExceeded after `timeout_s`, with what was wrong last. Raises at once what waiting does not mend,
        such as TLS_FAILED and Unauthenticated.
        """
        self._info = await wait_until_ready(self._config, self._channels.for_running_loop(), timeout_s)
        return self._info

    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yields the events of one request; closing the iterator cancels the request on the server.

        Vectors that the server stores are named and not sent again. If one was evicted, the client sends the request
        again with all vectors.
        """
        return self.submit_within(request, None)

    async def submit_within(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """`submit` with a deadline, which the server knows; None: the client's own `timeout_s`.

        The time begins when the first event is asked for. Raises DeadlineExceeded when it is over.
        """
        limit = stream_limit(self._config, "the generation", timeout_s)
        channel = self._channels.for_running_loop()
        request, server = await self._with_session(await self._cut(request), channel)

        def send(message: generation_pb2.GenerateRequest, instance: str) -> AsyncGenerator[Event, None]:
            return events_reaching(lambda: self._responses(message, channel, limit, server or instance))

        async with aclosing(self._uploaded_vectors.send(request, send)) as events:
            async for event in events:
                yield event

    async def _responses(
        self, message: generation_pb2.GenerateRequest, channel: grpc.aio.Channel, limit: CallLimit, instance: str
    ) -> AsyncGenerator[Event, None]:
        calls = _CaptureRpcs(self)
        if message.capture.delivery in STAYS_ON_SERVER:
            message.capture.release_token = secrets.token_bytes(16)
        rpc = generate_on(channel)(message, timeout=timeout_of(limit), metadata=call_metadata(self._config, instance))
        call = WatchedCall(ends_with(channel, rpc), self._config, limit.call)
        refusal: SteerError | None = None
        has_events, completed, arrivals = False, None, _CaptureAssembler(self._config.shm_dir, calls)
        try:
            async with aclosing(events_from_responses(call)) as received:
                async for one in received:
                    has_events = True
                    for event in arrivals.events(one):
                        if isinstance(event, Completed):
                            completed = event  # is yielded only once the response stream has ended without an error
                        else:
                            yield event
        except grpc.RpcError as error:
            refusal = translated = error_from_call(
                error, self._config, has_events=has_events, limit=limit, elapsed_s=call.elapsed_s
            )
            name_layer(translated, [entry.layer for entry in message.steering.layers])
            raise translated from error
        except asyncio.CancelledError:
            self._check_not_closed_meanwhile()
            raise
        finally:
            call.cancel()
            may_be_stored = completed is None and not isinstance(refusal, OtherInstance | MissingVectors)
            if may_be_stored and message.capture.release_token:  # captures that were never read
                released = ReleaseCaptureRequest(release_token=message.capture.release_token)
                calls.release_later(released, arrivals.instance or instance)
        assert completed is not None, "events_from_responses raises if it is missing"
        yield completed

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """A prompt as the model gets it; a whole text by the RPC Tokenize, others by Render."""
        if isinstance(request.prompt, TextPrompt) and request.truncate_prompt_tokens is None:
            return tokenized_from_proto(await self._read("Tokenize", tokenize_to_proto(request)), request)
        request = await self._cut(request)
        return rendered_from_proto(await self._read("Render", render_to_proto(request)), request)

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens."""
        response = await self._read("Detokenize", detokenize_to_proto(request))
        return str(response.text)

    async def _read(self, method: str, message: Message) -> Any:
        """The response of a method of TokenizerService."""
        stub = TokenizerServiceStub(self._channels.for_running_loop())  # type: ignore[no-untyped-call]
        limit = unary_limit(self._config, method.lower())
        try:
            return await getattr(stub, method)(message, timeout=timeout_of(limit), metadata=call_metadata(self._config))
        except grpc.RpcError as error:
            raise error_from_call(error, self._config, limit=limit) from error
        except asyncio.CancelledError:
            self._check_not_closed_meanwhile()
            raise

    async def close(self) -> None:
        """Cancels running calls, ends leases of shared memory and closes the connection; again: does nothing."""
        sessions = list(self._sessions.values())
        try:
            await self._wait_releasing()  # releases of lost handles reach the server before the connection closes
        finally:  # also if the caller is cancelled meanwhile
            await self._channels.close()
            await self._wait_releasing()  # of handles that were lost meanwhile
        for session in sessions:
            await session.ended()

    async def _cut(self, request: Asked) -> Asked:
        """The request without token ids that `truncate_prompt_tokens` cuts off: a message has no place for all."""
        prompt = request.prompt
        if request.truncate_prompt_tokens is None or not isinstance(prompt, TokenPrompt):
            return request
        most = (await self.load_info()).max_model_len
        if len(prompt.token_ids) <= most:
            return request
        return replace(request, prompt=TokenPrompt(token_ids=prompt.token_ids[-most:]))

    async def _with_session(self, request: GenerateRequest, channel: grpc.aio.Channel) -> tuple[GenerateRequest, str]:
        """The request with the proof that memory is shared, if it asks for shared memory and there is a proof.

        Also the server that knows the proof; "" for any.
        """
        capture = request.capture
        if capture is None or not capture.delivery.is_shared or capture.shared_memory_session:
            return request, ""
        session = self._session(channel)
        try:
            token = await session.token(is_required=capture.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED)
        except asyncio.CancelledError:
            self._check_not_closed_meanwhile()
            raise
        server = session.instance if token else ""
        return replace(request, capture=replace(capture, shared_memory_session=token)), server

    def _session(self, channel: grpc.aio.Channel) -> SharedMemorySession:
        if channel not in self._sessions:
            for one in [known for known, session in list(self._sessions.items()) if session.loop.is_closed()]:
                self._sessions.pop(one, None)
            self._sessions[channel] = SharedMemorySession(channel, self._config)
        return self._sessions[channel]

    def _check_not_closed_meanwhile(self) -> None:
        """Raises EngineFailed (CLOSED) if `close` cancelled the call, and not the owner of its task."""
        if self._channels.is_closed and not cancel_count():
            raise closed_error("the client") from None

    async def _wait_releasing(self) -> None:
        here = asyncio.get_running_loop()
        releasing = [task for task in tuple(self._releasing) if task.get_loop() is here]
        if releasing:
            await asyncio.wait(releasing, timeout=self._config.unary_timeout_s)

    def _keep(self, releasing: "asyncio.Task[None]") -> None:
        self._releasing.add(releasing)  # the loop itself holds tasks only weakly
        releasing.add_done_callback(self._releasing.discard)

    def __repr__(self) -> str:
        return f"AsyncSteerClient({self._shown})"

    @property
    def _shown(self) -> str:
        """The address, cut to fit on a line, and whether the client is closed."""
        return repr(self.address if len(self.address) <= 80 else f"{self.address[:80]}...") + (
            ", closed" if self._channels.is_closed else ""
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _end_sessions(sessions: dict[grpc.aio.Channel, SharedMemorySession], process: int) -> None:
    """Ends the sessions of a client that nobody has closed, whose channels they keep open; any thread may call it."""
    if os.getpid() == process:
        for session in sessions.values():
            session.end_later()


class _CaptureRpcs:
    """The RPCs of a client for its captures, from any event loop; see `capture_handles.CaptureCalls`."""

    def __init__(self, client: AsyncSteerClient) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()  # releases the captures of handles that are lost in other threads
        self._process = os.getpid()  # which alone releases them: a forked one has handles that it never asked for

    @property
    def _stub(self) -> Any:
        return CaptureServiceStub(self._client._channels.for_running_loop())  # type: ignore[no-untyped-call]

    def limit(self) -> CallLimit:
        """The limit of a fetch that begins now."""
        return stream_limit(self._client._config, "fetch")

    def fetch(self, request: FetchCaptureRequest, instance: str, limit: CallLimit) -> WatchedCall:
        """The FetchCapture call whose responses hold the rows; `instance`: the server that has them."""
        config, channel = self._client._config, self._client._channels.for_running_loop()
        call = fetch_on(channel)(request, timeout=timeout_of(limit), metadata=call_metadata(config, instance))
        return WatchedCall(ends_with(channel, call), config, limit.call)

    async def release(self, request: ReleaseCaptureRequest, instance: str) -> None:
        """Frees captures; closing the client has freed them already."""
        config = self._client._config
        if self._client._channels.is_closed or os.getpid() != self._process:
            return  # the leases ended with the connection, and held captures expire

        limit = unary_limit(config, "close")

        async def once() -> None:
            about = {"timeout": timeout_of(limit), "metadata": call_metadata(config, instance)}
            try:
                await self._stub.ReleaseCapture(request, **about)
            except grpc.aio.UsageError:
                return  # the garbage collector has found the client, and closed its channel, before the handle
            except grpc.RpcError as error:
                raise self.error(error, limit) from error

        await reaching(once)

    def release_later(self, request: ReleaseCaptureRequest, instance: str) -> None:
        if os.getpid() != self._process:
            return
        running = _running_loop()
        if running is not None and (running is self._loop or self._loop.is_closed()):
            self._begin_release(request, instance)
            return
        with suppress(RuntimeError):  # its loop is closed and none runs here: the capture expires on the server
            self._loop.call_soon_threadsafe(self._begin_release, request, instance)

    def _begin_release(self, request: ReleaseCaptureRequest, instance: str) -> None:
        self._client._keep(asyncio.get_running_loop().create_task(self._release_quietly(request, instance)))

    async def _release_quietly(self, request: ReleaseCaptureRequest, instance: str) -> None:
        with suppress(SteerError):
            await self.release(request, instance)

    def error(self, error: grpc.RpcError, limit: CallLimit) -> SteerError:
        return error_from_call(error, self._client._config, has_events=True, limit=limit)

    def check_not_closed_meanwhile(self) -> None:
        self._client._check_not_closed_meanwhile()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _CaptureAssembler:
    """Turns the notices of held captures in a response stream into captures that a caller can fetch and release."""

    def __init__(self, shm_dir: str, calls: _CaptureRpcs) -> None:
        self._shm_dir = Path(shm_dir)
        self._calls = calls
        self.instance = ""
        """The server that runs the request; "" before it said so."""
        self._prompt_tokens = 0
        self._shared: dict[int, list[SharedBlock]] = {}

    def events(self, event: WireEvent) -> Iterator[Event]:
        """The events for the caller that `event` completes; none for a part of a shared capture."""
        match event:
            case StoredCaptureNotice():
                yield CaptureHeld(output_index=event.output_index, held=RemoteCapture(event, self._calls))
            case SharedBlock():
                self._shared.setdefault(event.output_index, []).append(event)
            case OutputFinished():
                blocks = self._shared.get(event.output_index)
                if blocks:
                    rows = event.receipt.rows_total
                    held = shared_capture(blocks, self._prompt_tokens, rows, self._shm_dir, self.instance, self._calls)
                    del self._shared[event.output_index]
                    yield CaptureHeld(output_index=event.output_index, held=held)
                yield event
            case Started():
                self._prompt_tokens, self.instance = len(event.prompt_token_ids), event.instance
                yield event
            case _:
                yield event
