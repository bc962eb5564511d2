"""The rows of one output, read from the marks and captures that the workers wrote to its region."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.errors import InvalidRequest
from steer_service.core.layer_change import LayerChange, layer_change
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.engine.region import CAPTURED, COMPUTED, REUSED, STEERED, Region
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.output_events import RowMask
from steer_service.shm.segments import Segment


class RegionRows:
    """`runtime.output_events.OutputRows` of an output on vLLM."""

    def __init__(
        self, region: Region | None, steered_layers: tuple[int, ...], release: Callable[[Segment], None]
    ) -> None:
        """`region`: None for an output without steering and captures. `release`: frees a region's segment."""
        self.region = region
        self.steered_layers = steered_layers
        self.cached_tokens = 0
        """Prompt tokens that vLLM reused from the prefix cache."""
        self.for_pooled: Region | None = None
        """Takes the pooled rows of an output whose captures are stored."""
        self._release = release
        self._stored: Region | None = None
        self._checked = 0

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the regions."""
        return sum(region.layout.size for region in (self.region, self.for_pooled) if region is not None)

    def is_steered(self, rows: int) -> RowMask:
        """Rows that every pipeline stage steered."""
        return self._has(STEERED, rows)

    def is_reused(self, rows: int) -> RowMask:
        """Rows that were reused from the prefix cache and not computed later, after a preemption."""
        return self._has(REUSED, rows) & ~self._has(COMPUTED, rows)

    def is_captured(self, rows: int) -> RowMask:
        """Rows that every pipeline stage captured."""
        return self._has(CAPTURED, rows)

    def reused_count(self, rows: int) -> int:
        """The number of rows from the prefix cache; without a region it is vLLM's own count."""
        return int(self.is_reused(rows)[:rows].sum()) if self.region is not None else self.cached_tokens

    def changes(self, rows: int) -> tuple[LayerChange, ...]:
        """The changes at each steered layer of the first `rows` rows; 0 for an output that never ran."""
        if self.region is None:
            return tuple(LayerChange(layer=layer) for layer in self.steered_layers)
        return tuple(layer_change(layer, self.region.changes(layer)[:rows]) for layer in self.steered_layers)

    def read(self, layer: int, site: CaptureSite, first: int, end: int) -> npt.NDArray[Any]:
        """A view of captured rows."""
        assert self.region is not None
        return self.region.rows(site, layer)[first:end]

    def store(self, metadata: CaptureMetadata, pooled: CapturedRows | None) -> LocalCapture:
        """The captured rows in their region, which the caller now owns; pooled ones have a region of their own."""
        if pooled is None:
            region = self.region
            assert region is not None
            captured = region.captured(metadata.spans)
        else:
            region = self.for_pooled
            assert region is not None
            captured = region.put(pooled)
        self._stored = region
        release = partial(self._release, region.segment)
        return LocalCapture(metadata, captured, release=release, segment=region.place)

    def release_unless_stored(self, region: Region) -> None:
        """Frees the segment of one of its regions, unless it belongs to the caller of `store`."""
        if region is not self._stored:
            self._release(region.segment)

    def check_finite(self, rows: int, *, prefix_failed: bool, again: bool = False) -> None:
        """Raises InvalidRequest if steering left a row that is not finite among the first `rows`.

        Rows that an earlier call has looked at are looked at `again` only.
        `prefix_failed`: the same program has failed since this output's cache salt was made; reused rows may be bad.
        """
        assert self.region is not None
        position = self.region.first_non_finite(0 if again else self._checked, rows)
        self._checked = rows
        if position is not None:
            raise _not_finite(
                f"the residual stream was not finite at position {position}, under steering{self._steered()}; lower "
                "the scale, or use smaller vectors"
            )
        if prefix_failed and self.region.count(REUSED, rows):
            raise _not_finite("a prefix shared with another request under the same steering was not finite")

    def _steered(self) -> str:
        """The layers that may have made a row infinite; which of them did is not marked."""
        if not self.steered_layers:
            return ""
        first, last = min(self.steered_layers), max(self.steered_layers)
        return f" after layer {first}" if first == last else f" after layers {first}..{last}"

    def _has(self, bit: int, rows: int) -> RowMask:
        return self.region.has(bit) if self.region is not None else np.zeros(rows, np.bool_)


def _not_finite(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="STEERING_NONFINITE", field="steering")
