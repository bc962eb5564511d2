"""Captured rows that are held in this process, in shared memory or on a server until they are released."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steer_service.core.arrays import HiddenArray, dtype_from_name
from steer_service.core.capture import CapturedRows, CaptureSite, Pooling, check_choosable
from steer_service.core.errors import NotFound, within
from steer_service.core.positions import PositionScope
from steer_service.core.spans import OPEN_END, Spans, count_rows

Progress = Callable[[int, int], None]
"""Called with (bytes received, total bytes) as rows arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureMetadata:
    """The facts about held rows that are known without reading them."""

    layers: tuple[int, ...]
    """Layers held, in the order asked for."""
    sites: tuple[CaptureSite, ...]
    """BEFORE, AFTER or both."""
    spans: Spans
    """Positions of the rows; of pooled ones, those that the one row was made of."""
    dtype: str
    """Dtype of the rows."""
    hidden_size: int
    """Elements of a row."""
    prompt_tokens: int
    """Tokens of the prompt; generated rows begin at this position."""
    sequence_rows: int
    """Rows of the whole sequence, captured or not: prompt tokens + generated tokens - 1.

    Those of the prompt for `max_tokens=0`."""
    pooling: Pooling = Pooling.NONE
    """Whether there is one row for all positions."""

    @property
    def row_count(self) -> int:
        """Rows of each layer at each site."""
        return self.pooling.row_count(count_rows(self.spans, OPEN_END))

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self.bytes_of(self.layers, self.spans)

    def bytes_of(self, layers: Sequence[int], spans: Spans) -> int:
        """Bytes of the rows of these layers at these positions, all sites together."""
        row_bytes = self.hidden_size * dtype_from_name(self.dtype).itemsize
        rows = self.pooling.row_count(count_rows(spans, OPEN_END))
        return len(set(layers)) * len(self.sites) * rows * row_bytes


class HeldCapture(ABC):
    """The captured rows of one output, in this process or on a server; its receiver releases it."""

    holds_memory = True
    """False if there is nothing to release."""

    def __init__(self, metadata: CaptureMetadata) -> None:
        self.metadata = metadata
        """Layers, sites, positions and dtype of the rows."""

    @abstractmethod
    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        """The rows, or those of chosen layers and positions, without labels.

        Raises InvalidRequest for rows that were not captured, NotFound after they were released or have expired.
        """

    @abstractmethod
    async def release(self) -> None:
        """Frees the memory; arrays that `rows` returned stay valid. Calling it again does nothing."""

    @abstractmethod
    def release_nowait(self) -> None:
        """Frees the memory without waiting for a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlace:
    """The offsets of the rows of each layer and site in a shared-memory segment."""

    name: str
    """Name of the segment."""
    size: int
    """Bytes of the segment."""
    offsets: dict[tuple[int, CaptureSite], int] = field(default_factory=dict)
    """(layer, site) -> byte at which the rows begin, a multiple of 64."""


def unknown_capture() -> NotFound:
    """The error for a capture that is not available; it is the same for every cause."""
    return NotFound(
        "it is unknown, released, expired or another client's", reason="UNKNOWN_CAPTURE", field="capture_id"
    )


def resolved(metadata: CaptureMetadata, positions: PositionScope | None) -> Spans | None:
    """The spans that `positions` select in the sequence of held rows; None for all of them.

    Raises InvalidRequest for positions beyond the sequence and of pooled rows. It does not check that the rows were
    captured.
    """
    check_choosable(metadata.pooling, positions)
    if positions is None:
        return None
    with within("positions"):
        return positions.resolve_within(metadata.prompt_tokens, metadata.sequence_rows)


def in_order(captured: CapturedRows) -> list[tuple[int, CaptureSite, HiddenArray]]:
    """Every array with its layer and site, in the order of delivery: by layer, and BEFORE first."""
    sites = ((CaptureSite.BEFORE, captured.before), (CaptureSite.AFTER, captured.after))
    return [(layer, site, arrays[layer]) for layer in captured.hidden for site, arrays in sites if layer in arrays]
