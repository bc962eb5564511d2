"""Captures held on the server: the notice of them, and the response stream that fetches them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import CaptureBlock
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.wire import capture_pb2
from steer_service.wire.blocks import BlockReader, chunks_of
from steer_service.wire.capture import pooling_from_proto, pooling_to_proto, site_to_proto, sites_from_proto
from steer_service.wire.chunks import ChunkResponse, chunk_from_proto
from steer_service.wire.fields import (
    bad_stream,
    duration_from_proto,
    duration_to_proto,
    timestamp_from_proto,
    timestamp_to_proto,
    unreadable,
    wrong_sequence,
)
from steer_service.wire.positions import spans_from_proto, spans_to_proto
from steer_service.wire.tensors import dtype_from_proto, dtype_to_proto

FetchResponse = capture_pb2.FetchCaptureResponse | ChunkResponse
"""A response of FetchCapture; large chunks have a type of their own, which saves copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCaptureNotice:
    """The notice that an output's captures are held on the server."""

    capture_id: str
    """The id that fetches and releases them."""
    output_index: int
    """Index of the output, from 0."""
    metadata: CaptureMetadata
    """Their layers, sites, positions, dtype and sizes."""
    expires_at: float
    """When the server frees them unless they are used, in seconds since 1970, by the server's clock."""
    expires_in_s: float
    """Seconds from the message until then."""
    instance: str = ""
    """The server that holds them; "" if it did not say."""


def held_to_proto(notice: StoredCaptureNotice) -> capture_pb2.CaptureHeld:
    """`notice` as a message."""
    metadata = notice.metadata
    return capture_pb2.CaptureHeld(
        capture_id=notice.capture_id,
        output_index=notice.output_index,
        layers=metadata.layers,
        rows=metadata.row_count,
        total_bytes=metadata.total_bytes,
        expires_at=timestamp_to_proto(notice.expires_at),
        spans=spans_to_proto(metadata.spans),
        site=site_to_proto(metadata.sites[0] if len(metadata.sites) == 1 else CaptureSite.BOTH),
        dtype=dtype_to_proto(metadata.dtype),
        hidden_size=metadata.hidden_size,
        pooling=pooling_to_proto(metadata.pooling),
        expires_in=duration_to_proto(notice.expires_in_s),
        instance=notice.instance,
    )


def held_from_proto(message: capture_pb2.CaptureHeld, prompt_tokens: int, sequence_rows: int) -> StoredCaptureNotice:
    """The notice in a message; raises EngineFailed (BAD_STREAM) if it is not valid.

    `prompt_tokens` and `sequence_rows` describe the sequence that was captured.
    """
    spans, sites = spans_from_proto(message.spans), sites_from_proto(message.site)
    pooling = pooling_from_proto(message.pooling)
    if spans is None or sites is None or pooling is None:
        raise bad_stream("the spans, the site or the pooling of a held capture are not valid")
    try:
        dtype = dtype_from_proto(message.dtype)
    except InvalidRequest as error:
        raise bad_stream(f"a held capture: {error.message}") from error
    metadata = CaptureMetadata(
        layers=tuple(message.layers),
        sites=sites,
        spans=spans,
        dtype=dtype,
        hidden_size=message.hidden_size,
        prompt_tokens=prompt_tokens,
        sequence_rows=sequence_rows,
        pooling=pooling,
    )
    if (metadata.row_count, metadata.total_bytes) != (message.rows, message.total_bytes):
        raise bad_stream(f"a held capture has {message.total_bytes} bytes, {metadata.total_bytes} were expected")
    return StoredCaptureNotice(
        capture_id=message.capture_id,
        output_index=message.output_index,
        metadata=metadata,
        expires_at=timestamp_from_proto(message.expires_at),
        expires_in_s=duration_from_proto(message.expires_in),
        instance=message.instance,
    )


def fetch_to_proto(
    blocks: Iterable[CaptureBlock], max_chunk_bytes: int, skip_bytes: int = 0
) -> Iterator[ChunkResponse]:
    """The responses that send `blocks` without their first `skip_bytes`; rows are read only while this is iterated."""
    sequence = 0
    for capture, block in enumerate(blocks):
        skipped = min(skip_bytes, block.hidden.nbytes)
        skip_bytes -= skipped
        for chunk in chunks_of(block, capture, max_chunk_bytes, skipped):
            yield ChunkResponse(sequence, chunk)
            sequence += 1


class FetchReader:
    """Joins the responses of FetchCapture to blocks, over several calls if response streams break off."""

    def __init__(self) -> None:
        self._blocks = BlockReader(may_break=True)
        self._sequence = 0

    @property
    def received_bytes(self) -> int:
        """Bytes of rows received so far, which the next call skips."""
        return self._blocks.received_bytes

    def begin_again(self) -> None:
        """Prepares for a response stream that skips `received_bytes`, after one that broke off."""
        self._sequence = 0
        self._blocks.begin_again()

    def block(self, response: FetchResponse | None) -> CaptureBlock | None:
        """The block that `response` completes, if any; raises EngineFailed (BAD_STREAM) for a broken rule.

        gRPC yields None for a message that it cannot read.
        """
        if response is None:
            raise unreadable()
        if response.sequence != self._sequence:
            raise wrong_sequence(response.sequence, self._sequence)
        self._sequence += 1
        if isinstance(response, ChunkResponse):
            return self._blocks.chunk(response.chunk)
        if response.HasField("capture_chunk"):
            return self._blocks.chunk(chunk_from_proto(response.capture_chunk))
        return None  # a kind that a later revision added

    def check_complete(self) -> None:
        """Raises EngineFailed (BAD_STREAM) if a block is incomplete."""
        if not self._blocks.is_empty:
            raise bad_stream("the response stream ended before the capture was complete")
