"""Captures that a client may fetch and release: held on the server, or in memory shared with it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy.typing as npt

from steer_client.other_instances import ATTEMPTS
from steer_client.shared_memory import MappedRows, metadata_of_blocks
from steer_client.watched_calls import WatchedCall
from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CapturedRows, CaptureSite, chosen_layers
from steer_service.core.errors import EngineFailed, OtherInstance, SteerError
from steer_service.core.events import CaptureBlock
from steer_service.core.positions import PositionScope
from steer_service.core.spans import Spans
from steer_service.core.stored_capture import CaptureMetadata, HeldCapture, Progress, resolved
from steer_service.runtime.deadline import CallLimit
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.process_bound import BoundCapture
from steer_service.wire.blocks import SharedBlock
from steer_service.wire.capture_pb2 import FetchCaptureRequest, ReleaseCaptureRequest
from steer_service.wire.positions import scope_to_proto
from steer_service.wire.stored_capture import FetchReader, StoredCaptureNotice

FETCH_ATTEMPTS = 4
"""Response streams in a row that may bring nothing; the count begins anew with one that brings bytes."""

FETCH_PAUSE_S = 0.2
"""Seconds before the next response stream, doubled after each further one in a row that brought nothing."""

RESUMABLE = frozenset({"CONNECTION_LOST", "SLOW_READER"})
"""Reasons of errors after which a fetch is resumed, besides those of a server that is UNAVAILABLE."""


class CaptureCalls(Protocol):
    """The RPCs of a client for its captures."""

    def limit(self) -> CallLimit:
        """The limit of a fetch that begins now, with all response streams that it takes."""

    def fetch(self, request: FetchCaptureRequest, instance: str, limit: CallLimit) -> WatchedCall:
        """Opens a response stream of FetchCapture; `instance`: the server that has the capture."""

    async def release(self, request: ReleaseCaptureRequest, instance: str) -> None:
        """Calls ReleaseCapture; raises a SteerError."""

    def release_later(self, request: ReleaseCaptureRequest, instance: str) -> None:
        """Calls ReleaseCapture in the background and ignores errors."""

    def error(self, error: grpc.RpcError, limit: CallLimit) -> SteerError:
        """The SteerError for a failed call."""

    def check_not_closed_meanwhile(self) -> None:
        """Raises EngineFailed if a call was cancelled because the client was closed."""


class RemoteCapture(BoundCapture, HeldCapture):
    """Captures of one output that are held on the server."""

    def __init__(self, notice: StoredCaptureNotice, calls: CaptureCalls) -> None:
        super().__init__(notice.metadata)
        self._id = notice.capture_id
        self._instance = notice.instance
        self._calls = calls

    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        """Fetches the rows; a broken response stream, or one that was read too slowly, is resumed where it ended."""
        spans = resolved(self.metadata, positions)
        wanted = chosen_layers(self.metadata.layers, layers), self.metadata.spans if spans is None else spans
        if not wanted[0]:  # the server takes no layers as all layers
            return CapturedRows(spans=wanted[1], pooling=self.metadata.pooling)
        request = FetchCaptureRequest(capture_id=self._id, layers=wanted[0], positions=scope_to_proto(positions))
        total = self.metadata.bytes_of(*wanted)
        reader, blocks, limit = FetchReader(), list[CaptureBlock](), self._calls.limit()
        failures = 0  # response streams in a row that brought nothing
        while True:
            request.skip_bytes = reader.received_bytes
            call = self._calls.fetch(request, self._instance, limit)
            try:
                async for response in call:
                    block = reader.block(response)
                    if block is not None:
                        blocks.append(block)
                    if progress is not None:
                        progress(reader.received_bytes, total)
                reader.check_complete()
                return self._complete(blocks, *wanted)
            except grpc.RpcError as error:
                translated = self._calls.error(error, limit)
                failures = 0 if reader.received_bytes > request.skip_bytes else failures + 1
                may_resume = error.code() == grpc.StatusCode.UNAVAILABLE or translated.reason in RESUMABLE
                is_elsewhere = isinstance(translated, OtherInstance)
                if not (may_resume or is_elsewhere) or failures >= (ATTEMPTS if is_elsewhere else FETCH_ATTEMPTS):
                    raise translated from error
                reader.begin_again()
                if may_resume:
                    await asyncio.sleep(FETCH_PAUSE_S * 2 ** max(failures - 1, 0))
            except asyncio.CancelledError:
                self._calls.check_not_closed_meanwhile()
                raise
            finally:
                call.cancel()

    def _complete(self, blocks: Sequence[CaptureBlock], layers: Sequence[int], spans: Spans) -> CapturedRows:
        """The blocks together; raises EngineFailed unless each requested block was received exactly once."""
        parts: dict[CaptureSite, dict[int, npt.NDArray[Any]]] = {CaptureSite.BEFORE: {}, CaptureSite.AFTER: {}}
        for block in blocks:
            kind = name_of_dtype(block.hidden.dtype), block.hidden.shape[1]
            if (block.spans, block.pooling) != (spans, self.metadata.pooling) or kind != (
                self.metadata.dtype,
                self.metadata.hidden_size,
            ):
                raise EngineFailed(f"layer {block.layer} has other rows than requested", reason="INCOMPLETE")
            parts[block.site][block.layer] = block.hidden
        came = sorted((block.layer, block.site.value) for block in blocks)
        if came != sorted((layer, site.value) for layer in set(layers) for site in self.metadata.sites):
            raise EngineFailed(f"received the layers and sites {came}, others were requested", reason="INCOMPLETE")
        before, after = parts[CaptureSite.BEFORE], parts[CaptureSite.AFTER]
        return CapturedRows(before=before, after=after, spans=spans, pooling=self.metadata.pooling)

    async def release(self) -> None:
        """Releases the capture on the server."""
        await self._calls.release(ReleaseCaptureRequest(capture_id=self._id), self._instance)

    def release_nowait(self) -> None:
        """Releases the capture without waiting for the response."""
        self._calls.release_later(ReleaseCaptureRequest(capture_id=self._id), self._instance)


class SharedCapture(BoundCapture, LocalCapture):
    """Captures of one output in mapped shared memory."""

    def __init__(
        self, metadata: CaptureMetadata, mapped: MappedRows, lease_token: bytes, instance: str, calls: CaptureCalls
    ) -> None:
        request = ReleaseCaptureRequest(lease_token=lease_token)
        self._instance = instance
        self._request = request
        self._calls = calls
        self._mapped = mapped
        super().__init__(metadata, mapped.captured, release=lambda: calls.release_later(request, instance))

    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        """Views of the mapping."""
        if layers is None and positions is None:
            await asyncio.to_thread(self._mapped.populate)
        return await super().rows(layers, positions, progress)

    async def release(self) -> None:
        """Ends the lease; the mapping stays valid."""
        later, self._release = self._release, None
        if later is not None:
            try:
                await self._calls.release(self._request, self._instance)
            except BaseException:
                self._release = later
                raise


def shared_capture(
    blocks: Sequence[SharedBlock],
    prompt_tokens: int,
    sequence_rows: int,
    directory: Path,
    instance: str,
    calls: CaptureCalls,
) -> SharedCapture:
    """The captures of one output, all of whose blocks are given; raises EngineFailed if they cannot be mapped.

    `instance`: the server that has the segment.
    """
    metadata = metadata_of_blocks(blocks, prompt_tokens, sequence_rows)
    return SharedCapture(metadata, MappedRows(directory, blocks), blocks[0].lease.token, instance, calls)
