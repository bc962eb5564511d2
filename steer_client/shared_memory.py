"""Captures in memory shared with the server: a proof per connection that it is shared, and the mapping of segments."""

import asyncio
import contextlib
import errno
import math
import mmap
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from steer_client.channel import ClientConfig, call_metadata
from steer_client.connection_errors import error_from_call
from steer_client.open_calls import ends_with
from steer_client.other_instances import reaching
from steer_service.core.arrays import dtype_from_name
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import EngineFailed, OtherInstance, Overloaded
from steer_service.core.mapping import MMAP_WITHOUT_FD
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.wire.blocks import SharedBlock
from steer_service.wire.capture_pb2 import (
    ConfirmSharedMemoryRequest,
    ConfirmSharedMemoryResponse,
    OpenSharedMemoryRequest,
)
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub

NONCE_BYTES = 32

SEGMENT_PREFIX = "steerllm-"
"""Prefix of the names of all segments."""

RETRY_S = 60.0
"""Seconds before the next attempt, if the memory of a server could not be read or it shares none."""

NOT_SHARED = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)
"""Status of a server that offers no shared memory. Other statuses may pass: it starts, stops or is busy."""

TEMPORARY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Status of a server that is unreachable or has no room. Without the proof the request would fail for good."""

FULL = {
    errno.EMFILE: "this process has as many files open as it may (ulimit -n)",
    errno.ENFILE: "this machine has as many files open as it may (fs.file-max)",
    errno.ENOMEM: "this process has as much mapped as it may (vm.max_map_count)",
}
"""Errors that mean that this process has no room for another segment -> the limit and its name."""

MADV_POPULATE_READ = 22
"""From Linux's mman.h (5.14): maps all pages for reading at once, which costs less than page by page."""


class SharedMemorySession:
    """The proof that this process shares the memory of a channel's server; made when it is first needed."""

    def __init__(self, channel: grpc.aio.Channel, config: ClientConfig) -> None:
        self._channel = channel
        self._stub = CaptureServiceStub(channel)  # type: ignore[no-untyped-call]
        self._config = config
        self.loop = asyncio.get_running_loop()
        """The loop of the channel."""
        self._opening = asyncio.Lock()
        self._token = b""
        self.instance = ""
        """The server that the session is with; "" without a session, or if there is but one."""
        self._open_session: asyncio.Task[None] | None = None
        self._refused_until = 0.0

    async def token(self, *, is_required: bool) -> bytes:
        """The session's token; b"" if the memory is not shared, which the server then reports for the request.

        Raises a SteerError if no server is reachable. If the memory `is_required`, raises Overloaded if there is no
        room for the proof at present, and OtherInstance if the balancer sends the proof to another server.
        """
        async with self._opening:
            if not self._token and time.monotonic() >= self._refused_until:
                try:
                    self._token = await self._open()
                except Overloaded:
                    if is_required:
                        raise
                except OtherInstance:
                    if is_required:
                        raise
                    return self._refused()  # not with every request: a proof that fails costs ten calls
            return self._token

    def _refused(self) -> bytes:
        """No token, and no further attempt for `RETRY_S`."""
        self._refused_until = time.monotonic() + RETRY_S
        return b""

    async def _open(self) -> bytes:
        if not (hasattr(os, "O_NOFOLLOW") and hasattr(mmap, "MAP_PRIVATE")):  # Windows
            return self._refused()
        about = {"timeout": self._config.unary_timeout_s, "metadata": call_metadata(self._config)}
        try:
            challenge = await self._stub.OpenSharedMemory(OpenSharedMemoryRequest(), **about)
        except grpc.RpcError as error:  # the response to the request will have the reason
            self._check_not_temporary(error)
            return self._refused() if error.code() in NOT_SHARED else b""
        try:
            nonce = _read(Path(self._config.shm_dir), challenge.segment_name)
        except OSError as error:
            _check_not_full(error)
            return self._refused()
        request = ConfirmSharedMemoryRequest(challenge_token=challenge.challenge_token, nonce=nonce)
        self.instance = challenge.instance
        return await reaching(lambda: self._confirm(request))

    async def _confirm(self, request: ConfirmSharedMemoryRequest) -> bytes:
        """The token of a new session; b"" if the server gives none. Raises OtherInstance, and temporary errors."""
        metadata = call_metadata(self._config, self.instance)
        call = ends_with(self._channel, self._stub.ConfirmSharedMemory(request, metadata=metadata))
        try:
            first = await asyncio.wait_for(call.read(), self._config.unary_timeout_s)
        except (grpc.RpcError, TimeoutError) as error:
            call.cancel()
            self._check_not_temporary(error)
            return b""
        if not isinstance(first, ConfirmSharedMemoryResponse):  # the end of the response stream
            return b""
        self._open_session = asyncio.ensure_future(self._last(call))
        return bytes(first.session_token)

    def _check_not_temporary(self, error: Exception) -> None:
        """Raises the SteerError of a failure that is temporary, or of a call that reached another server."""
        if isinstance(error, grpc.RpcError):
            translated = error_from_call(error, self._config)
            may_pass = error.code() in TEMPORARY or translated.reason == "CONNECTION_LOST"
            if may_pass or isinstance(translated, OtherInstance):
                raise translated from error

    async def ended(self) -> None:
        """Returns when the session of the running loop has ended, after its channel was closed."""
        last = self._open_session
        if last is not None and last.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([last])

    def end_later(self) -> None:
        """Ends the session without waiting for it; any thread may call it."""
        last = self._open_session
        if last is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed, and the session has ended with it
                self.loop.call_soon_threadsafe(last.cancel)

    async def _last(self, call: Any) -> None:
        """Reads the session's response stream to its end, after which another session may start."""
        try:
            with contextlib.suppress(grpc.RpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
        finally:
            self._token, self.instance = b"", ""
            call.cancel()


class MappedRows:
    """The rows of one output in a segment of the server, without a copy.

    The mapping is private: writing to its arrays changes them for this process alone.
    """

    def __init__(self, directory: Path, blocks: Sequence[SharedBlock]) -> None:
        self._memory: mmap.mmap | None = None
        name = next((block.lease.segment_name for block in blocks if block.lease.segment_name), "")
        if name:
            size = max(block.offset + _nbytes(block) for block in blocks)
            self._memory = _map(directory, name, size)
        self.captured = CapturedRows(
            before=self._arrays(blocks, CaptureSite.BEFORE),
            after=self._arrays(blocks, CaptureSite.AFTER),
            spans=blocks[0].spans,
            pooling=blocks[0].pooling,
        )
        """Views of the mapping, which lives as long as they do."""

    def populate(self) -> None:
        """Maps all pages at once; without it each is mapped when it is first read."""
        if self._memory is not None:
            with contextlib.suppress(OSError):  # an older kernel
                self._memory.madvise(MADV_POPULATE_READ)

    def _arrays(self, blocks: Sequence[SharedBlock], site: CaptureSite) -> Mapping[int, npt.NDArray[Any]]:
        return {block.layer: self._array(block) for block in blocks if block.site is site}

    def _array(self, block: SharedBlock) -> npt.NDArray[Any]:
        dtype = dtype_from_name(block.dtype)
        if self._memory is None:
            return np.empty(block.shape, dtype)
        return np.ndarray(block.shape, dtype, self._memory, block.offset)


def metadata_of_blocks(blocks: Sequence[SharedBlock], prompt_tokens: int, sequence_rows: int) -> CaptureMetadata:
    """The metadata of an output's rows; raises EngineFailed (BAD_STREAM) if its blocks contradict each other."""
    first = blocks[0]
    facts = {(block.dtype, block.shape, block.spans, block.pooling, block.lease) for block in blocks}
    if len(facts) > 1:
        raise EngineFailed("the captures of one output differ in their rows", reason="BAD_STREAM")
    return CaptureMetadata(
        layers=tuple(dict.fromkeys(block.layer for block in blocks)),
        sites=tuple(dict.fromkeys(block.site for block in blocks)),
        spans=first.spans,
        dtype=first.dtype,
        hidden_size=first.shape[1],
        prompt_tokens=prompt_tokens,
        sequence_rows=sequence_rows,
        pooling=first.pooling,
    )


def _nbytes(block: SharedBlock) -> int:
    return math.prod(block.shape) * dtype_from_name(block.dtype).itemsize


def _open(directory: Path, name: str) -> int:
    """A descriptor for reading; raises OSError, without waiting, unless it is a plain file in the directory."""
    if "/" in name or not name.startswith(SEGMENT_PREFIX):  # a server must not choose any other file
        raise FileNotFoundError("not the name of a segment")
    descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError("not a segment")
    return descriptor


def _read(directory: Path, name: str) -> bytes:
    descriptor = _open(directory, name)
    try:
        return os.read(descriptor, NONCE_BYTES)
    finally:
        os.close(descriptor)


def _map(directory: Path, name: str, size: int) -> mmap.mmap:
    try:
        return _mapped(_open(directory, name), size)
    except OSError as error:
        _check_not_full(error)
        raise EngineFailed("the shared memory of the capture is gone", reason="CAPTURE_LOST") from error


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """The file's first `size` bytes; closes the descriptor."""
    try:
        if os.fstat(descriptor).st_size < size:
            raise EngineFailed("the shared memory of the capture is too short", reason="CAPTURE_LOST")
        return mmap.mmap(
            descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, **MMAP_WITHOUT_FD
        )
    finally:
        os.close(descriptor)


def _check_not_full(error: OSError) -> None:
    """Raises Overloaded if `error` means that this process has no room for another segment."""
    if error.errno in FULL:
        raise Overloaded(
            f"{FULL[error.errno]}, and a mapped capture counts until its handle and its arrays are gone: "
            "release some, or raise that limit",
            reason="TOO_MANY_MAPPED",
        ) from error
