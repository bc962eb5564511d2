"""How captured rows travel: a header, chunks in order and an end with a checksum, for each block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, name_of_dtype
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import OPEN_END, Spans, count_rows
from steer_service.core.request import CaptureBlock
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

BlockMessage = capture_pb2.CaptureHeader | Chunk | capture_pb2.SharedMemoryRegion | capture_pb2.CaptureEnd


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


def block_to_proto(
    block: CaptureBlock, capture: int, max_chunk_bytes: int, skip_bytes: int = 0
) -> Iterator[BlockMessage]:
    """The messages of `block`, numbered `capture` within its stream, of which `skip_bytes` need not travel.

    Reads the rows only while it is iterated.
    """
    payload = np.ascontiguousarray(block.hidden).reshape(-1).view(np.uint8)
    yield _header(block, capture, capture_pb2.CAPTURE_DELIVERY_INLINE)
    checksum = crc32c.crc32c(payload[:skip_bytes])
    for offset in range(skip_bytes, payload.nbytes, max_chunk_bytes):
        data = payload[offset : offset + max_chunk_bytes].data
        checksum = crc32c.crc32c(data, checksum)
        yield Chunk(capture, offset, data)
    yield capture_pb2.CaptureEnd(capture=capture, total_bytes=payload.nbytes, crc32c=checksum)


def shared_block_to_proto(block: CaptureBlock, capture: int, offset: int, lease: Lease) -> Iterator[BlockMessage]:
    """The messages that hand out `block`, which lies at `offset` of the lease's segment; its rows are not read."""
    yield _header(block, capture, capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED)
    if block.hidden.size:
        yield capture_pb2.SharedMemoryRegion(
            capture=capture,
            lease_token=lease.token,
            segment_name=lease.segment_name,
            offset=offset,
            expires_at=timestamp_to_proto(lease.expires_at),
        )
    yield capture_pb2.CaptureEnd(capture=capture, total_bytes=block.hidden.nbytes)


def _header(block: CaptureBlock, capture: int, delivery: capture_pb2.CaptureDelivery) -> capture_pb2.CaptureHeader:
    return capture_pb2.CaptureHeader(
        capture=capture,
        output_index=block.output_index,
        layer=block.layer,
        site=site_to_proto(block.site),
        dtype=dtype_to_proto(name_of_dtype(block.hidden.dtype)),
        shape=block.hidden.shape,
        spans=spans_to_proto(block.spans),
        total_bytes=block.hidden.nbytes,
        delivery=delivery,
    )


@dataclass(slots=True, kw_only=True)
class _Arrival:
    """A block of which not all has come yet, or that has come before the stream broke off."""

    header: capture_pb2.CaptureHeader
    """What was announced."""
    site: CaptureSite
    """Its site."""
    spans: Spans
    """Positions of its rows."""
    dtype: np.dtype[Any]
    """Its element type."""
    payload: npt.NDArray[np.uint8]
    """Its bytes, filled from the front; none if they lie in shared memory."""
    received: int = 0
    """How many bytes have come."""
    checksum: int = 0
    """CRC-32C of those bytes."""
    region: capture_pb2.SharedMemoryRegion | None = None
    """Where in shared memory its bytes lie."""
    is_done: bool = False
    """All of it has come."""
    is_over: bool = False
    """Its end has come in this stream."""

    @property
    def is_shared(self) -> bool:
        """True if its bytes lie in shared memory."""
        return self.header.delivery == capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED


class BlockReader:
    """Puts the blocks of one stream together again; raises EngineFailed (BAD_STREAM) at the first broken rule.

    Of a stream that may be followed by others it remembers every block, otherwise only those under way.
    """

    def __init__(self, *, may_break: bool = False) -> None:
        self._may_break = may_break
        self._arrivals: dict[int, _Arrival] = {}
        self._kept: dict[int, _Arrival] = {}  # of a stream that broke off
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

    def header(self, header: capture_pb2.CaptureHeader) -> None:
        """Begins a block."""
        if header.capture != self._next_capture:
            raise bad_stream(f"capture {header.capture} begins where {self._next_capture} was expected")
        self._next_capture += 1
        kept = self._kept.pop(header.capture, None)
        if kept is not None and kept.header != header:
            raise bad_stream(f"capture {header.capture} is not the one that it was before the stream broke off")
        self._arrivals[header.capture] = kept or _arrival_from(header)

    def chunk(self, chunk: capture_pb2.CaptureChunk | Chunk) -> None:
        """Adds bytes to a block."""
        arrival = self._arrival(chunk.capture)
        if chunk.offset != arrival.received:
            raise bad_stream(f"capture {chunk.capture} goes on at byte {chunk.offset}, {arrival.received} have arrived")
        data = chunk.data
        end = chunk.offset + len(data)
        if end > arrival.payload.nbytes:
            raise bad_stream(f"capture {chunk.capture} has more than the {arrival.payload.nbytes} bytes announced")
        arrival.payload[chunk.offset : end] = np.frombuffer(data, dtype=np.uint8)
        arrival.received = end
        arrival.checksum = crc32c.crc32c(data, arrival.checksum)
        self.received_bytes += len(data)

    def region(self, region: capture_pb2.SharedMemoryRegion) -> None:
        """Says where in shared memory a block lies."""
        arrival = self._arrival(region.capture)
        if not arrival.is_shared or arrival.region is not None:
            raise bad_stream(f"capture {region.capture} lies in shared memory against what its header says, or twice")
        arrival.region = region

    def end(self, end: capture_pb2.CaptureEnd) -> CaptureBlock | SharedBlock | None:
        """Completes a block; None for one that was complete before the stream broke off."""
        arrival = self._arrivals.get(end.capture)
        if arrival is None or arrival.is_over:
            raise bad_stream(f"capture {end.capture} has no header, or has ended")
        if end.total_bytes != arrival.header.total_bytes:
            raise bad_stream(f"capture {end.capture} does not end with the bytes that it began with")
        arrival.is_over = True
        if not self._may_break:
            del self._arrivals[end.capture]
        if arrival.is_done:
            return None
        arrival.is_done = True
        if arrival.is_shared:
            return _shared_block_from(arrival)
        if arrival.received != arrival.payload.nbytes:
            raise bad_stream(
                f"capture {end.capture} ends after {arrival.received} bytes, {arrival.payload.nbytes} were announced"
            )
        if arrival.checksum != end.crc32c:
            raise bad_stream(f"capture {end.capture} has the wrong checksum")
        rows, arrival.payload = arrival.payload, np.empty(0, np.uint8)
        return CaptureBlock(
            output_index=arrival.header.output_index,
            layer=arrival.header.layer,
            site=arrival.site,
            spans=arrival.spans,
            hidden=rows.view(arrival.dtype).reshape(tuple(arrival.header.shape)),
        )

    def _arrival(self, capture: int) -> _Arrival:
        arrival = self._arrivals.get(capture)
        if arrival is None or arrival.is_done:
            raise bad_stream(f"capture {capture} has no header, or has ended")
        return arrival


def _shared_block_from(arrival: _Arrival) -> SharedBlock:
    header, region = arrival.header, arrival.region
    if region is None and header.total_bytes:
        raise bad_stream(f"capture {header.capture} lies in shared memory, but nothing says where")
    lease = Lease(
        token=region.lease_token if region is not None else b"",
        segment_name=region.segment_name if region is not None else "",
        expires_at=timestamp_from_proto(region.expires_at) if region is not None else 0.0,
    )
    return SharedBlock(
        output_index=header.output_index,
        layer=header.layer,
        site=arrival.site,
        spans=arrival.spans,
        dtype=name_of_dtype(arrival.dtype),
        shape=(header.shape[0], header.shape[1]),
        offset=region.offset if region is not None else 0,
        lease=lease,
    )


def _arrival_from(header: capture_pb2.CaptureHeader) -> _Arrival:
    try:
        dtype = DTYPES[dtype_from_proto(header.dtype)]
    except InvalidRequest as error:
        raise bad_stream(f"capture {header.capture}: {error.message}") from error
    site = site_from_proto(header.site)
    if site is None:
        raise bad_stream(f"capture {header.capture} has the unknown site {header.site}")
    if len(header.shape) != 2 or min(header.shape) < 0:
        raise bad_stream(f"capture {header.capture} has shape {list(header.shape)}, expected [rows, hidden_size]")
    spans = spans_from_proto(header.spans)
    if spans is None or count_rows(spans, OPEN_END) != header.shape[0]:
        raise bad_stream(f"capture {header.capture} has {header.shape[0]} rows, which its spans contradict")
    if header.total_bytes != math.prod(header.shape) * dtype.itemsize:
        raise bad_stream(f"capture {header.capture} announces {header.total_bytes} bytes, which its shape contradicts")
    is_inline = header.delivery == capture_pb2.CAPTURE_DELIVERY_INLINE
    if not is_inline and header.delivery != capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED:
        raise bad_stream(f"capture {header.capture} is delivered in the unknown way {header.delivery}")
    payload = np.empty(header.total_bytes if is_inline else 0, dtype=np.uint8)
    return _Arrival(header=header, site=site, spans=spans, dtype=dtype, payload=payload)
