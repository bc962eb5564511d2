"""How captured rows travel: a header, chunks in order and an end with a checksum, for each block."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import DTYPES, name_of_dtype
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import InvalidRequest
from steer_service.core.positions import OPEN_END, Spans, count_rows
from steer_service.core.request import CaptureBlock
from steer_service.wire import capture_pb2
from steer_service.wire.capture import site_from_proto, site_to_proto
from steer_service.wire.fields import bad_stream
from steer_service.wire.positions import spans_from_proto, spans_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

DEFAULT_CHUNK_BYTES = 256 * 1024
"""The size at which one stream is fastest."""
MAX_CHUNK_BYTES = 1024 * 1024
"""Keeps every message below the 4 MiB that any gRPC client accepts."""

BlockMessage = capture_pb2.CaptureHeader | capture_pb2.CaptureChunk | capture_pb2.CaptureEnd


def block_to_proto(block: CaptureBlock, capture: int, max_chunk_bytes: int) -> Iterator[BlockMessage]:
    """The messages of `block`, numbered `capture` within its stream; reads the rows only while it is iterated."""
    payload = np.ascontiguousarray(block.hidden).reshape(-1).view(np.uint8)
    yield capture_pb2.CaptureHeader(
        capture=capture,
        output_index=block.output_index,
        layer=block.layer,
        site=site_to_proto(block.site),
        dtype=dtype_to_proto(name_of_dtype(block.hidden.dtype)),
        shape=block.hidden.shape,
        spans=spans_to_proto(block.spans),
        total_bytes=payload.nbytes,
        delivery=capture_pb2.CAPTURE_DELIVERY_INLINE,
    )
    checksum = 0
    for offset in range(0, payload.nbytes, max_chunk_bytes):
        data = payload[offset : offset + max_chunk_bytes].tobytes()
        checksum = google_crc32c.extend(checksum, data)
        yield capture_pb2.CaptureChunk(capture=capture, offset=offset, data=data)
    yield capture_pb2.CaptureEnd(capture=capture, total_bytes=payload.nbytes, crc32c=checksum)


@dataclass(slots=True, kw_only=True)
class _Arrival:
    """A block of which not all bytes have come yet."""

    header: capture_pb2.CaptureHeader
    """What was announced."""
    site: CaptureSite
    """Its site."""
    spans: Spans
    """Positions of its rows."""
    dtype: np.dtype[Any]
    """Its element type."""
    payload: npt.NDArray[np.uint8]
    """Its bytes, filled from the front."""
    received: int = 0
    """How many bytes have come."""
    checksum: int = 0
    """CRC-32C of those bytes."""


class BlockReader:
    """Puts the blocks of one stream together again; raises EngineFailed (BAD_STREAM) at the first broken rule."""

    def __init__(self) -> None:
        self._arrivals: dict[int, _Arrival] = {}
        self._next_capture = 0

    @property
    def is_empty(self) -> bool:
        """True if no block is incomplete."""
        return not self._arrivals

    def header(self, header: capture_pb2.CaptureHeader) -> None:
        """Begins a block."""
        if header.capture != self._next_capture:
            raise bad_stream(f"capture {header.capture} begins where {self._next_capture} was expected")
        self._next_capture += 1
        self._arrivals[header.capture] = _arrival_from(header)

    def chunk(self, chunk: capture_pb2.CaptureChunk) -> None:
        """Adds bytes to a block."""
        arrival = self._arrival(chunk.capture)
        if chunk.offset != arrival.received:
            raise bad_stream(f"capture {chunk.capture} goes on at byte {chunk.offset}, {arrival.received} have arrived")
        end = chunk.offset + len(chunk.data)
        if end > arrival.payload.nbytes:
            raise bad_stream(f"capture {chunk.capture} has more than the {arrival.payload.nbytes} bytes announced")
        data = chunk.data
        arrival.payload[chunk.offset : end] = np.frombuffer(data, dtype=np.uint8)
        arrival.received = end
        arrival.checksum = google_crc32c.extend(arrival.checksum, data)

    def end(self, end: capture_pb2.CaptureEnd) -> CaptureBlock:
        """Completes a block."""
        arrival = self._arrival(end.capture)
        del self._arrivals[end.capture]
        if not arrival.received == arrival.payload.nbytes == end.total_bytes:
            raise bad_stream(
                f"capture {end.capture} ends after {arrival.received} bytes, {arrival.payload.nbytes} were announced"
            )
        if arrival.checksum != end.crc32c:
            raise bad_stream(f"capture {end.capture} has the wrong checksum")
        return CaptureBlock(
            output_index=arrival.header.output_index,
            layer=arrival.header.layer,
            site=arrival.site,
            spans=arrival.spans,
            hidden=arrival.payload.view(arrival.dtype).reshape(tuple(arrival.header.shape)),
        )

    def _arrival(self, capture: int) -> _Arrival:
        try:
            return self._arrivals[capture]
        except KeyError:
            raise bad_stream(f"capture {capture} has no header, or has ended") from None


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
    payload = np.empty(header.total_bytes, dtype=np.uint8)
    return _Arrival(header=header, site=site, spans=spans, dtype=dtype, payload=payload)
