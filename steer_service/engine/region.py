"""The region of one output in shared memory: marks of what was done to each row, then the captured rows.

The front end creates it before the request starts; the worker maps it when it learns the request. A row's place
depends on its site, layer and position only, so that recomputing a row after preemption writes the same place again.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.positions import Spans, count_rows
from steer_service.core.stored_capture import SegmentPlace
from steer_service.shm.segments import Segment

STEERED = 1
CAPTURED = 2
NON_FINITE = 4
REUSED = 8
COMPUTED = 16

ALIGNMENT = 64
"""Bytes; a cache line, and what array libraries expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionLayout:
    """Where things lie in a region; both sides compute it from the same few numbers."""

    stages: int
    """Pipeline stages: each marks the rows on its own."""
    rows: int
    """Rows of the output at most: prompt tokens + max_tokens - 1."""
    sites: tuple[CaptureSite, ...]
    """BEFORE, AFTER or both, in the order in which they lie."""
    layers: tuple[int, ...]
    """Captured layers, in the order in which they lie; may be empty."""
    captured: Spans
    """Captured positions; their rows lie one after the other."""
    hidden_size: int
    """Width of a row."""
    dtype: str
    """Element type of captured rows."""

    @property
    def captured_rows(self) -> int:
        """Rows captured at most, at each layer and site."""
        return count_rows(self.captured, self.rows)

    @property
    def array_bytes(self) -> int:
        """Bytes of one layer's rows at one site, and of what is left free behind them."""
        return _aligned(self.captured_rows * self.row_bytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.hidden_size * dtype_from_name(self.dtype).itemsize

    def bytes_of(self, rows: int) -> int:
        """Bytes of so many captured rows at all layers and sites."""
        return rows * len(self.layers) * len(self.sites) * self.row_bytes

    @property
    def data_offset(self) -> int:
        """Where captured rows begin."""
        return _aligned(self.stages * self.rows)

    @property
    def size(self) -> int:
        """Bytes of the whole region."""
        return self.data_offset + len(self.sites) * len(self.layers) * self.array_bytes

    def offset(self, site: CaptureSite, layer: int) -> int:
        """Where the rows of a captured layer begin at one of the sites; a multiple of ALIGNMENT."""
        number = self.sites.index(site) * len(self.layers) + self.layers.index(layer)
        return self.data_offset + number * self.array_bytes


class Region:
    """A mapped region, seen by the front end or by a worker."""

    def __init__(self, layout: RegionLayout, segment: Segment) -> None:
        self.layout = layout
        """Where things lie."""
        self.segment = segment
        """What it lies in."""
        self.name = segment.name
        """The segment's name, for the worker."""
        bytes_ = np.frombuffer(segment.memory, dtype=np.uint8)
        marks = bytes_[: layout.stages * layout.rows]
        self.marks_ST: npt.NDArray[np.uint8] = marks.reshape(layout.stages, layout.rows)
        """Shape [stages, rows]: COMPUTED, STEERED, CAPTURED and NON_FINITE bits, set after a row's forward pass, and
        REUSED where a step passed rows over whose keys and values lay in the prefix cache."""
        self._bytes = bytes_

    def rows(self, site: CaptureSite, layer: int) -> npt.NDArray[Any]:
        """The captured rows of a layer at a site, shape [captured rows, hidden_size]."""
        layout = self.layout
        dtype = dtype_from_name(layout.dtype)
        shape = layout.captured_rows, layout.hidden_size
        return np.ndarray(shape, dtype, self._bytes, layout.offset(site, layer))

    def captured(self, spans: Spans) -> CapturedRows:
        """Views of all rows that were captured, which have the positions of `spans`."""
        count = count_rows(spans, self.layout.rows)
        before, after = (
            {layer: self.rows(site, layer)[:count] for layer in self.layout.layers if site in self.layout.sites}
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        return CapturedRows(before=before, after=after, spans=spans)

    @property
    def place(self) -> SegmentPlace:
        """Where its rows lie, for whoever hands them on."""
        pairs = itertools.product(self.layout.layers, self.layout.sites)
        offsets = {(layer, site): self.layout.offset(site, layer) for layer, site in pairs}
        return SegmentPlace(name=self.name, size=self.segment.size, offsets=offsets)

    def addresses(self, site: CaptureSite, layer_count: int, held: frozenset[int]) -> npt.NDArray[np.int64]:
        """Address of the first row of each of the model's layers; 0 for what is not captured or not held here."""
        addresses = np.zeros(layer_count, np.int64)
        if site in self.layout.sites and self.layout.layers:
            first, start = self.layout.offset(site, self.layout.layers[0]), self._bytes.ctypes.data
            for number, layer in enumerate(self.layout.layers):
                if layer in held:
                    addresses[layer] = start + first + number * self.layout.array_bytes
        return addresses

    def mark(self, stage: int, first: int, bits: npt.NDArray[np.uint8]) -> None:
        """Sets `bits` for consecutive rows from `first`; rows beyond the region are dropped, a mark is never undone."""
        last = min(first + len(bits), self.layout.rows)
        if first < last:
            self.marks_ST[stage, first:last] |= bits[: last - first]

    def has(self, bit: int) -> npt.NDArray[np.bool_]:
        """Which rows carry `bit` (or one of several) on every stage, shape [rows]."""
        return np.bitwise_and.reduce(self.marks_ST & bit, axis=0).astype(bool)

    def count(self, bit: int, rows: int) -> int:
        """How many of the first `rows` rows it `has`."""
        return int(self.has(bit)[:rows].sum())

    def first_non_finite(self, start: int, rows: int) -> int | None:
        """The first position in `start..rows` at which a steered row was not finite on any stage."""
        bad = (self.marks_ST[:, start:rows] & NON_FINITE).any(axis=0)
        return start + int(bad.argmax()) if bad.any() else None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
