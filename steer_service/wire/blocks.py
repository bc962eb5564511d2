"""Captured rows on the wire: chunks, of which the first has a header and the last a checksum, or shared memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import crc32c
import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, name_of_dtype
from steer_service.core.capture import CaptureSite, Pooling
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import CaptureBlock
from steer_service.core.spans import OPEN_END, Spans, count_rows
from steer_service.wire import capture_pb2
from steer_service.wire.capture import pooling_from_proto, pooling_to_proto, site_from_proto, site_to_proto
from steer_service.wire.chunks import Chunk
from steer_service.wire.fields import (
    bad_stream,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
)
from steer_service.wire.positions import spans_from_proto, spans_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

DEFAULT_CHUNK_BYTES = 256 * 1024
"""Bytes of rows per chunk; the size at which one response stream is fastest."""
MAX_CHUNK_BYTES = 1024 * 1024
"""Bytes of rows per chunk at most; keeps every message below the 4 MiB that any gRPC client accepts."""

KEEP_GIL = 0
"""Argument with which `crc32c` keeps the GIL: waiting for it takes longer than the checksum of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to read the rows of one output in shared memory."""

    token: bytes
    """The token that releases it."""
    segment_name: str
    """Name of the segment that holds the rows."""
    expires_at: float
    """When it expires, in seconds since 1970, by the server's clock."""
    expires_in_s: float
    """Seconds from the message until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBlock:
    """A block whose rows are in shared memory."""

    output_index: int
    """Index of the output, from 0."""
    layer: int
    """Layer index, 0-based."""
    site: CaptureSite
    """Before or after steering."""
    spans: Spans
    """Positions of the rows."""
    dtype: str
    """Dtype, such as "bfloat16"."""
    shape: tuple[int, int]
    """[rows, hidden_size]."""
    offset: int
    """Byte in the segment at which the rows begin."""
    lease: Lease
    """The right to read them."""
    pooling: Pooling = Pooling.NONE
    """Whether there is one row for all positions."""


def chunks_of(block: CaptureBlock, capture: int, max_chunk_bytes: int, skip_bytes: int = 0) -> Iterator[Chunk]:
    """The chunks of `block`, without its first `skip_bytes`; at least one, which may be empty.

    `capture` is the number of the block within its response stream. The rows are read only while this is iterated.
    """
    payload = np.ascontiguousarray(block.hidden).reshape(-1).view(np.uint8).data
    header: capture_pb2.CaptureHeader | None = _header(block)
    checksum = crc32c.crc32c(payload[:skip_bytes])
    for offset in range(skip_bytes, payload.nbytes, max_chunk_bytes) or (skip_bytes,):
        data = payload[offset : offset + max_chunk_bytes]
        checksum = crc32c.crc32c(data, checksum, KEEP_GIL)
        is_last = offset + len(data) == payload.nbytes
        yield Chunk(capture, offset, header, checksum if is_last else None, data)
        header = None


def region_to_proto(block: CaptureBlock, capture: int, offset: int, lease: Lease) -> capture_pb2.SharedMemoryRegion:
    """The message that hands out `block`, which begins at byte `offset` of the segment; its rows are not read."""
    if not block.hidden.size:
        return capture_pb2.SharedMemoryRegion(capture=capture, header=_header(block))
    return capture_pb2.SharedMemoryRegion(
        capture=capture,
        header=_header(block),
        lease_token=lease.token,
        segment_name=lease.segment_name,
        offset=offset,
        expires_at=timestamp_to_proto(lease.expires_at),
        expires_in=duration_to_proto(lease.expires_in_s),
    )


def _header(block: CaptureBlock) -> capture_pb2.CaptureHeader:
    header = capture_pb2.CaptureHeader(
        output_index=block.output_index,
        layer=block.layer,
        site=site_to_proto(block.site),
        dtype=dtype_to_proto(name_of_dtype(block.hidden.dtype)),
        shape=block.hidden.shape,
        total_bytes=block.hidden.nbytes,
        pooling=pooling_to_proto(block.pooling),
    )
    header.MergeFrom(_with_spans(block.spans))
    return header


@lru_cache(maxsize=4)
def _with_spans(spans: Spans) -> capture_pb2.CaptureHeader:
    """A header that has spans and nothing else: all layers and sites of an output have the same, perhaps thousands."""
    return capture_pb2.CaptureHeader(spans=spans_to_proto(spans))


@dataclass(frozen=True, slots=True)
class _Header:
    """A checked header and its converted fields."""

    message: capture_pb2.CaptureHeader
    """The header as a message."""
    site: CaptureSite
    """The rows' site."""
    spans: Spans
    """The rows' positions."""
    dtype: np.dtype[Any]
    """The rows' dtype."""
    pooling: Pooling
    """Whether there is one row for all positions."""

    @classmethod
    def of(cls, message: capture_pb2.CaptureHeader, capture: int) -> Self:
        """Converts a header; raises EngineFailed (BAD_STREAM) if it is not valid."""
        try:
            dtype = DTYPES[dtype_from_proto(message.dtype)]
        except InvalidRequest as error:
            raise bad_stream(f"capture {capture}: {error.message}") from error
        site = site_from_proto(message.site)
        if site is None:
            raise bad_stream(f"capture {capture} has the unknown site {message.site}")
        if len(message.shape) != 2 or min(message.shape) < 0:
            raise bad_stream(f"capture {capture} has shape {list(message.shape)}, expected [rows, hidden_size]")
        spans, pooling = spans_from_proto(message.spans), pooling_from_proto(message.pooling)
        if pooling is None:
            raise bad_stream(f"capture {capture} has the unknown pooling {message.pooling}")
        if spans is None or pooling.row_count(count_rows(spans, OPEN_END)) != message.shape[0]:
            raise bad_stream(f"capture {capture} has {message.shape[0]} rows, but its spans have another number")
        if message.total_bytes != math.prod(message.shape) * dtype.itemsize:
            raise bad_stream(
                f"capture {capture} announces {message.total_bytes} bytes, but its shape has another number"
            )
        return cls(message, site, spans, dtype, pooling)


@dataclass(slots=True)
class IncomingBlock:
    """A block that is incomplete, or that was received before the response stream broke off."""

    header: _Header
    """Its header."""
    payload: npt.NDArray[np.uint8]
    """Its bytes, filled from the front; empty once the block was returned."""
    received: int = 0
    """Bytes received so far."""
    checksum: int = 0
    """CRC-32C of those bytes."""
    is_complete: bool = False
    """All bytes have been received, and the block was returned."""
    has_ended: bool = False
    """Its last chunk has been received in this response stream."""


class BlockReader:
    """Joins the chunks of a response stream to blocks; raises EngineFailed (BAD_STREAM) at the first broken rule.

    `may_break`: the response stream may break off and be resumed, so that every block is remembered. Default: only
    incomplete blocks are.
    """

    def __init__(self, *, may_break: bool = False) -> None:
        self._may_break = may_break
        self._blocks: dict[int, IncomingBlock] = {}  # of this response stream
        self._kept: dict[int, IncomingBlock] = {}  # of a response stream that broke off
        self._next_capture = 0
        self.received_bytes = 0
        """Bytes of rows received, all blocks together."""

    @property
    def is_empty(self) -> bool:
        """True if no block is incomplete, neither of this response stream nor of one that broke off."""
        kept, current = self._kept.values(), self._blocks.values()
        return all(block.is_complete for block in kept) and all(block.has_ended for block in current)

    def begin_again(self) -> None:
        """Prepares for a response stream that skips `received_bytes`, after one that broke off."""
        self._kept, self._blocks, self._next_capture = {**self._kept, **self._blocks}, {}, 0
        for block in self._kept.values():
            block.has_ended = False

    def chunk(self, chunk: Chunk) -> CaptureBlock | None:
        """Adds a chunk; returns the block that it completes, unless that block was returned before."""
        if chunk.header is not None:
            self._begin(chunk.capture, chunk.header)
        block = self._blocks.get(chunk.capture)
        if block is None or block.has_ended:
            raise bad_stream(f"capture {chunk.capture} has no header or has ended")
        if chunk.offset != block.received:
            raise bad_stream(
                f"capture {chunk.capture} continues at byte {chunk.offset}, but {block.received} were received"
            )
        end, total = chunk.offset + len(chunk.data), block.header.message.total_bytes
        if end > total:
            raise bad_stream(f"capture {chunk.capture} has more than the {total} bytes announced")
        if chunk.data:
            block.payload.data[chunk.offset : end] = chunk.data
            block.received = end
            block.checksum = crc32c.crc32c(chunk.data, block.checksum, KEEP_GIL)
            self.received_bytes += len(chunk.data)
        return None if chunk.crc32c is None else self._end(chunk.capture, block, chunk.crc32c)

    def region(self, region: capture_pb2.SharedMemoryRegion) -> SharedBlock:
        """The block that a region of shared memory holds."""
        self._count(region.capture)
        header = _Header.of(region.header, region.capture)
        if header.message.total_bytes and not region.segment_name:
            raise bad_stream(f"capture {region.capture} is in shared memory, but the segment is not named")
        return SharedBlock(
            output_index=header.message.output_index,
            layer=header.message.layer,
            site=header.site,
            spans=header.spans,
            dtype=name_of_dtype(header.dtype),
            pooling=header.pooling,
            shape=(header.message.shape[0], header.message.shape[1]),
            offset=region.offset,
            lease=Lease(
                token=region.lease_token,
                segment_name=region.segment_name,
                expires_at=timestamp_from_proto(region.expires_at),
                expires_in_s=duration_from_proto(region.expires_in),
            ),
        )

    def _begin(self, capture: int, header: capture_pb2.CaptureHeader) -> None:
        self._count(capture)
        kept = self._kept.pop(capture, None)
        if kept is not None and kept.header.message != header:
            raise bad_stream(f"capture {capture} has another header than before the response stream broke off")
        self._blocks[capture] = kept or IncomingBlock(
            _Header.of(header, capture), np.empty(header.total_bytes, np.uint8)
        )

    def _count(self, capture: int) -> None:
        if capture != self._next_capture:
            raise bad_stream(f"capture {capture} begins, but {self._next_capture} was expected")
        self._next_capture += 1

    def _end(self, capture: int, block: IncomingBlock, checksum: int) -> CaptureBlock | None:
        header = block.header.message
        if block.received != header.total_bytes:
            raise bad_stream(
                f"capture {capture} ends after {block.received} bytes, {header.total_bytes} were announced"
            )
        if block.checksum != checksum:
            raise bad_stream(f"capture {capture} has the wrong checksum")
        block.has_ended = True
        if not self._may_break:
            del self._blocks[capture]
        if block.is_complete:
            return None
        block.is_complete = True
        rows, block.payload = block.payload, np.empty(0, np.uint8)
        return CaptureBlock(
            output_index=header.output_index,
            layer=header.layer,
            site=block.header.site,
            spans=block.header.spans,
            pooling=block.header.pooling,
            hidden=rows.view(block.header.dtype).reshape(tuple(header.shape)),
        )
