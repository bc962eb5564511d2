"""The region of one output in shared memory: marks of what was done to each row, captured rows, and recorded changes.

A region with captured rows or changes is a segment of its own. One that has marks only is a block of the mark memory,
see mark_memory.py.

The API server process creates the region before the request starts, and the worker maps it when the request is
scheduled. The place of a row depends on its site, layer and position only. A row that is recomputed after a preemption
is therefore written to the same place.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.layer_change import CHANGE_COLUMNS
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import Spans, count_rows
from steer_service.core.stored_capture import SegmentPlace
from steer_service.shm.segments import Segment

STEERED = 1
CAPTURED = 2
NON_FINITE = 4
REUSED = 8
COMPUTED = 16

ALIGNMENT = 64
"""Bytes; a cache line, and what array libraries expect."""

CHANGE_BYTES = 4 * CHANGE_COLUMNS
"""Bytes of what is recorded of one row's change at one layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionLayout:
    """The layout of a region. The API server process and the worker compute it from the same fields."""

    stages: int
    """Number of pipeline stages; each has marks of its own."""
    rows: int
    """Largest number of rows of the output: prompt tokens + max_tokens - 1."""
    sites: tuple[CaptureSite, ...]
    """BEFORE, AFTER or both, in the order of the layout."""
    layers: tuple[int, ...]
    """Captured layers, in the order of the layout; may be empty."""
    captured: SpanTable
    """Captured positions; their rows are consecutive."""
    hidden_size: int
    """Number of elements of a row."""
    dtype: str
    """Dtype of captured rows."""
    reported: tuple[int, ...] = ()
    """Layers whose changes are recorded for the receipt, in the order of the layout."""

    @property
    def captured_rows(self) -> int:
        """Largest number of captured rows, at each layer and site."""
        return self.captured.count(self.rows)

    @property
    def array_bytes(self) -> int:
        """Bytes of one layer's rows at one site, with the padding after them."""
        return _aligned(self.captured_rows * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden_size * dtype_from_name(self.dtype).itemsize

    def bytes_of(self, rows: int) -> int:
        """Bytes of `rows` captured rows at all layers and sites."""
        return rows * len(self.layers) * len(self.sites) * self.row_bytes

    @property
    def data_offset(self) -> int:
        """Offset of the captured rows, in bytes."""
        return _aligned(self.stages * self.rows)

    @property
    def size(self) -> int:
        """Bytes of the whole region."""
        return self.changes_offset + len(self.reported) * self.rows * CHANGE_BYTES

    @property
    def changes_offset(self) -> int:
        """Offset of the recorded changes, in bytes; a multiple of ALIGNMENT."""
        return self.data_offset + len(self.sites) * len(self.layers) * self.array_bytes

    def offset(self, site: CaptureSite, layer: int) -> int:
        """Offset of the rows of one captured layer at one site, in bytes; a multiple of ALIGNMENT."""
        number = self.sites.index(site) * len(self.layers) + self.layers.index(layer)
        return self.data_offset + number * self.array_bytes


class Region:
    """A mapped region, in the API server process or in a worker."""

    def __init__(self, layout: RegionLayout, segment: Segment, offset: int = 0) -> None:
        """`offset`: of the region in the segment, in bytes; 0 for a region with captured rows."""
        self.layout = layout
        """The layout of the region."""
        self.segment = segment
        """The segment that holds the region."""
        self.name = segment.name
        """The segment's name, for the worker."""
        self.offset = offset
        """Offset of the region in the segment, in bytes."""
        bytes_ = np.frombuffer(segment.memory, np.uint8, layout.size, offset)
        marks = bytes_[: layout.stages * layout.rows]
        self.marks_ST: npt.NDArray[np.uint8] = marks.reshape(layout.stages, layout.rows)
        """Shape [stages, rows]. COMPUTED, STEERED, CAPTURED and NON_FINITE bits are set after a row's forward pass. The
        REUSED bit is set if a step skipped the row because its keys and values were in the prefix cache."""
        self._bytes = bytes_

    def rows(self, site: CaptureSite, layer: int) -> npt.NDArray[Any]:
        """The captured rows of a layer at a site, shape [captured rows, hidden_size]."""
        layout = self.layout
        dtype = dtype_from_name(layout.dtype)
        shape = layout.captured_rows, layout.hidden_size
        return np.ndarray(shape, dtype, self._bytes, layout.offset(site, layer))

    def changes(self, layer: int) -> npt.NDArray[np.float32]:
        """What was recorded of the rows of a reported layer, shape [rows, CHANGE_COLUMNS]; see `core.layer_change`."""
        layout = self.layout
        offset = layout.changes_offset + layout.reported.index(layer) * layout.rows * CHANGE_BYTES
        return np.ndarray((layout.rows, CHANGE_COLUMNS), np.float32, self._bytes, offset)

    def captured(self, spans: Spans) -> CapturedRows:
        """Views of all rows that were captured; `spans`: their positions."""
        count = count_rows(spans, self.layout.rows)
        before, after = (
            {layer: self.rows(site, layer)[:count] for layer in self.layout.layers if site in self.layout.sites}
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        return CapturedRows(before=before, after=after, spans=spans)

    def put(self, captured: CapturedRows) -> CapturedRows:
        """Copies rows of the layers and sites of the layout into the region, and returns them as views of it."""
        before, after = (
            {layer: self.rows(site, layer)[: len(rows)] for layer, rows in arrays.items()}
            for site, arrays in ((CaptureSite.BEFORE, captured.before), (CaptureSite.AFTER, captured.after))
        )
        for mine, theirs in ((before, captured.before), (after, captured.after)):
            for layer, rows in theirs.items():
                mine[layer][:] = rows
        return replace(captured, before=before, after=after)

    @property
    def place(self) -> SegmentPlace:
        """The segment and the offsets of the captured rows, for a client that maps them."""
        pairs = itertools.product(self.layout.layers, self.layout.sites)
        offsets = {(layer, site): self.layout.offset(site, layer) for layer, site in pairs}
        return SegmentPlace(name=self.name, size=self.segment.size, offsets=offsets)

    def addresses(self, site: CaptureSite, layer_count: int, held: frozenset[int]) -> npt.NDArray[np.int64]:
        """Address of each layer's first row, shape [layer_count]; 0 if the layer is not captured or not in `held`."""
        addresses = np.zeros(layer_count, np.int64)
        if site in self.layout.sites and self.layout.layers:
            first, start = self.layout.offset(site, self.layout.layers[0]), self._bytes.ctypes.data
            for number, layer in enumerate(self.layout.layers):
                if layer in held:
                    addresses[layer] = start + first + number * self.layout.array_bytes
        return addresses

    def mark(self, stage: int, first: int, bits: npt.NDArray[np.uint8]) -> None:
        """Sets `bits` for consecutive rows from `first`. Rows beyond the region are dropped; marks stay."""
        last = min(first + len(bits), self.layout.rows)
        if first < last:
            self.marks_ST[stage, first:last] |= bits[: last - first]

    def has(self, bit: int) -> npt.NDArray[np.bool_]:
        """Which rows have `bit` (or one of several bits) on every stage, shape [rows]."""
        return np.bitwise_and.reduce(self.marks_ST & bit, axis=0).astype(bool)

    def count(self, bit: int, rows: int) -> int:
        """The number of rows with `bit` among the first `rows` rows."""
        return int(self.has(bit)[:rows].sum())

    def first_non_finite(self, start: int, rows: int) -> int | None:
        """The first position in `start..rows` at which a steered row was not finite on any stage."""
        bad = (self.marks_ST[:, start:rows] & NON_FINITE).any(axis=0)
        return start + int(bad.argmax()) if bad.any() else None


def region_name(segment: str, offset: int) -> str:
    """A name that no other region has at the same time."""
    return f"{segment}+{offset}"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
