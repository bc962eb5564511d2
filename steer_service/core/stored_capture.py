"""Captured rows that lie somewhere until somebody releases them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from steer_service.core.arrays import HiddenArray, dtype_from_name
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import NotFound, within
from steer_service.core.positions import OPEN_END, PositionScope, Spans, count_rows

Progress = Callable[[int, int], None]
"""Called with (bytes that have come, bytes of all) as rows come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureMetadata:
    """What is known of held rows without reading them."""

    layers: tuple[int, ...]
    """Layers held, in the order asked for."""
    sites: tuple[CaptureSite, ...]
    """BEFORE, AFTER or both."""
    spans: Spans
    """Positions of the rows."""
    dtype: str
    """Element type of the rows."""
    hidden_size: int
    """Width of a row."""
    prompt_tokens: int
    """Tokens of the prompt, after which positions of generated rows begin."""
    sequence_rows: int
    """Rows of the whole sequence, captured or not: prompt tokens + generated tokens - 1."""

    @property
    def row_count(self) -> int:
        """Rows of each layer at each site."""
        return count_rows(self.spans, OPEN_END)

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return self.bytes_of(self.layers, self.spans)

    def bytes_of(self, layers: Sequence[int], spans: Spans) -> int:
        """Bytes of some layers' rows at some positions."""
        row_bytes = self.hidden_size * dtype_from_name(self.dtype).itemsize
        return len(set(layers)) * len(self.sites) * count_rows(spans, OPEN_END) * row_bytes


class HeldCapture(ABC):
    """The captured rows of one output, in this process or on a server; whoever got it releases it."""

    holds_memory = True
    """False if there is nothing to release."""

    def __init__(self, metadata: CaptureMetadata) -> None:
        self.metadata = metadata
        """What is held."""

    @abstractmethod
    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        """The rows, or those of chosen layers and positions, without labels.

        Raises InvalidRequest for what was not captured, NotFound once it is released or too old.
        """

    @abstractmethod
    async def release(self) -> None:
        """Gives the memory back; what `rows` returned stays valid. Calling it again does nothing."""

    @abstractmethod
    def release_nowait(self) -> None:
        """The same as far as that is possible without waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPlace:
    """Where in a shared-memory segment the rows of each layer and site lie."""

    name: str
    """The segment."""
    size: int
    """Its bytes."""
    offsets: dict[tuple[int, CaptureSite], int] = field(default_factory=dict)
    """(layer, site) -> byte at which its rows begin, a multiple of 64."""


def unknown_capture() -> NotFound:
    """What a capture is that cannot be had, whatever the cause."""
    return NotFound(
        "it is unknown, released, expired or another client's", reason="UNKNOWN_CAPTURE", field="capture_id"
    )


def resolved(metadata: CaptureMetadata, positions: PositionScope | None) -> Spans | None:
    """The spans that `positions` mean in the sequence of held rows; None for all of them.

    Raises InvalidRequest beyond the sequence. Whether what is meant was captured is not looked at.
    """
    if positions is None:
        return None
    with within("positions"):
        return positions.resolve_within(metadata.prompt_tokens, metadata.sequence_rows)


def in_order(captured: CapturedRows) -> list[tuple[int, CaptureSite, HiddenArray]]:
    """Every array with its layer and site, in the order in which they are delivered: by layer, before first."""
    sites = ((CaptureSite.BEFORE, captured.before), (CaptureSite.AFTER, captured.after))
    return [(layer, site, arrays[layer]) for layer in captured.hidden for site, arrays in sites if layer in arrays]
