"""How captured rows travel: in chunks, of which the first says what they are and the last has their checksum."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import crc32c
import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, name_of_dtype
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import CaptureBlock
from steer_service.core.positions import OPEN_END, Spans, count_rows
from steer_service.wire import capture_pb2
from steer_service.wire.capture import site_from_proto, site_to_proto
from steer_service.wire.chunks import Chunk
from steer_service.wire.fields import bad_stream, timestamp_from_proto, timestamp_to_proto
from steer_service.wire.positions import spans_from_proto, spans_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

DEFAULT_CHUNK_BYTES = 256 * 1024
"""The size at which one stream is fastest."""
MAX_CHUNK_BYTES = 1024 * 1024
"""Keeps every message below the 4 MiB that any gRPC client accepts."""

KEEP_GIL = 0
"""What tells `crc32c` so: to get the lock back from gRPC's threads takes longer than the checksum of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to read the rows of one output in shared memory."""

    token: bytes
    """What ends it."""
    segment_name: str
    """Where they lie."""
    expires_at: float
    """When it ends, in seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBlock:
    """A block whose rows lie in shared memory."""

    output_index: int
    """Which of the n outputs, from 0."""
    layer: int
    """Layer index, 0-based."""
    site: CaptureSite
    """Before or after steering."""
    spans: Spans
    """Positions of the rows."""
    dtype: str
    """Element type."""
    shape: tuple[int, int]
    """[rows, hidden_size]."""
    offset: int
    """Byte of the segment at which the rows begin."""
    lease: Lease
    """The right to read them."""


def chunks_of(block: CaptureBlock, capture: int, max_chunk_bytes: int, skip_bytes: int = 0) -> Iterator[Chunk]:
    """The chunks of `block`, numbered `capture` within its stream, of which `skip_bytes` need not travel.

    There is one at least. Reads the rows only while it is iterated.
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
    """The message that hands out `block`, which lies at `offset` of the lease's segment; its rows are not read."""
    if not block.hidden.size:
        return capture_pb2.SharedMemoryRegion(capture=capture, header=_header(block))
    return capture_pb2.SharedMemoryRegion(
        capture=capture,
        header=_header(block),
        lease_token=lease.token,
        segment_name=lease.segment_name,
        offset=offset,
        expires_at=timestamp_to_proto(lease.expires_at),
    )


def _header(block: CaptureBlock) -> capture_pb2.CaptureHeader:
    return capture_pb2.CaptureHeader(
        output_index=block.output_index,
        layer=block.layer,
        site=site_to_proto(block.site),
        dtype=dtype_to_proto(name_of_dtype(block.hidden.dtype)),
        shape=block.hidden.shape,
        spans=spans_to_proto(block.spans),
        total_bytes=block.hidden.nbytes,
    )


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a header says, checked."""

    header: capture_pb2.CaptureHeader
    """It."""
    site: CaptureSite
    """The rows' site."""
    spans: Spans
    """Their positions."""
    dtype: np.dtype[Any]
    """Their element type."""

    @classmethod
    def of(cls, header: capture_pb2.CaptureHeader, capture: int) -> Self:
        """Raises EngineFailed (BAD_STREAM) if it cannot be."""
        try:
            dtype = DTYPES[dtype_from_proto(header.dtype)]
        except InvalidRequest as error:
            raise bad_stream(f"capture {capture}: {error.message}") from error
        site = site_from_proto(header.site)
        if site is None:
            raise bad_stream(f"capture {capture} has the unknown site {header.site}")
        if len(header.shape) != 2 or min(header.shape) < 0:
            raise bad_stream(f"capture {capture} has shape {list(header.shape)}, expected [rows, hidden_size]")
        spans = spans_from_proto(header.spans)
        if spans is None or count_rows(spans, OPEN_END) != header.shape[0]:
            raise bad_stream(f"capture {capture} has {header.shape[0]} rows, which its spans contradict")
        if header.total_bytes != math.prod(header.shape) * dtype.itemsize:
            raise bad_stream(f"capture {capture} announces {header.total_bytes} bytes, which its shape contradicts")
        return cls(header, site, spans, dtype)


@dataclass(slots=True)
class IncomingBlock:
    """A block of which not all has come yet, or that has come before the stream broke off."""

    kind: _Kind
    """What was announced."""
    payload: npt.NDArray[np.uint8]
    """Its bytes, filled from the front; none any more once it is done."""
    received: int = 0
    """How many bytes have come."""
    checksum: int = 0
    """CRC-32C of those bytes."""
    is_done: bool = False
    """All of it has come."""
    is_over: bool = False
    """Its last chunk has come in this stream."""


class BlockReader:
    """Puts the blocks of one stream together again; raises EngineFailed (BAD_STREAM) at the first broken rule.

    Of a stream that may be followed by others it remembers every block, otherwise only those under way.
    """

    def __init__(self, *, may_break: bool = False) -> None:
        self._may_break = may_break
        self._arrivals: dict[int, IncomingBlock] = {}
        self._kept: dict[int, IncomingBlock] = {}  # of a stream that broke off
        self._next_capture = 0
        self.received_bytes = 0
        """Bytes of rows that have come, all blocks together."""

    @property
    def is_empty(self) -> bool:
        """True if no block is incomplete, nor any that a stream which broke off had begun."""
        begun, over = self._kept.values(), self._arrivals.values()
        return all(arrival.is_done for arrival in begun) and all(arrival.is_over for arrival in over)

    def begin_again(self) -> None:
        """A stream that broke off is followed by another one, which skips `received_bytes`."""
        self._kept, self._arrivals, self._next_capture = {**self._kept, **self._arrivals}, {}, 0
        for arrival in self._kept.values():
            arrival.is_over = False

    def chunk(self, chunk: Chunk) -> CaptureBlock | None:
        """Adds bytes; the block that they complete, but for one that was complete before the stream broke off."""
        if chunk.header is not None:
            self._begin(chunk.capture, chunk.header)
        arrival = self._arrivals.get(chunk.capture)
        if arrival is None or arrival.is_over:
            raise bad_stream(f"capture {chunk.capture} has no header, or has ended")
        if chunk.offset != arrival.received:
            raise bad_stream(f"capture {chunk.capture} goes on at byte {chunk.offset}, {arrival.received} have arrived")
        end, total = chunk.offset + len(chunk.data), arrival.kind.header.total_bytes
        if end > total:
            raise bad_stream(f"capture {chunk.capture} has more than the {total} bytes announced")
        if chunk.data:
            arrival.payload.data[chunk.offset : end] = chunk.data
            arrival.received = end
            arrival.checksum = crc32c.crc32c(chunk.data, arrival.checksum, KEEP_GIL)
            self.received_bytes += len(chunk.data)
        return None if chunk.crc32c is None else self._end(chunk.capture, arrival, chunk.crc32c)

    def region(self, region: capture_pb2.SharedMemoryRegion) -> SharedBlock:
        """A block that lies in shared memory."""
        self._count(region.capture)
        kind = _Kind.of(region.header, region.capture)
        if kind.header.total_bytes and not region.segment_name:
            raise bad_stream(f"capture {region.capture} lies in shared memory, but nothing says where")
        return SharedBlock(
            output_index=kind.header.output_index,
            layer=kind.header.layer,
            site=kind.site,
            spans=kind.spans,
            dtype=name_of_dtype(kind.dtype),
            shape=(kind.header.shape[0], kind.header.shape[1]),
            offset=region.offset,
            lease=Lease(
                token=region.lease_token,
                segment_name=region.segment_name,
                expires_at=timestamp_from_proto(region.expires_at),
            ),
        )

    def _begin(self, capture: int, header: capture_pb2.CaptureHeader) -> None:
        self._count(capture)
        kept = self._kept.pop(capture, None)
        if kept is not None and kept.kind.header != header:
            raise bad_stream(f"capture {capture} is not the one that it was before the stream broke off")
        self._arrivals[capture] = kept or IncomingBlock(
            _Kind.of(header, capture), np.empty(header.total_bytes, np.uint8)
        )

    def _count(self, capture: int) -> None:
        if capture != self._next_capture:
            raise bad_stream(f"capture {capture} begins where {self._next_capture} was expected")
        self._next_capture += 1

    def _end(self, capture: int, arrival: IncomingBlock, checksum: int) -> CaptureBlock | None:
        header = arrival.kind.header
        if arrival.received != header.total_bytes:
            raise bad_stream(
                f"capture {capture} ends after {arrival.received} bytes, {header.total_bytes} were announced"
            )
        if arrival.checksum != checksum:
            raise bad_stream(f"capture {capture} has the wrong checksum")
        arrival.is_over = True
        if not self._may_break:
            del self._arrivals[capture]
        if arrival.is_done:
            return None
        arrival.is_done = True
        rows, arrival.payload = arrival.payload, np.empty(0, np.uint8)
        return CaptureBlock(
            output_index=header.output_index,
            layer=header.layer,
            site=arrival.kind.site,
            spans=arrival.kind.spans,
            hidden=rows.view(arrival.kind.dtype).reshape(tuple(header.shape)),
        )
