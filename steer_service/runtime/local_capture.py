"""Captured rows in memory of this process."""

from collections.abc import Callable, Sequence

import numpy as np

from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.positions import PositionScope
from steer_service.core.stored_capture import (
    CaptureMetadata,
    HeldCapture,
    Progress,
    SegmentPlace,
    resolved,
    unknown_capture,
)


class LocalCapture(HeldCapture):
    """Rows in memory of this process: inline captures, a region of the engine, or a mapped segment."""

    def __init__(
        self,
        metadata: CaptureMetadata,
        captured: CapturedRows,
        *,
        release: Callable[[], None] | None = None,
        segment: SegmentPlace | None = None,
    ) -> None:
        super().__init__(metadata)
        self.captured = captured
        """Views of the memory."""
        self.segment = segment
        """The place of the rows in shared memory, for a server that shares them; None if they cannot be shared."""
        self.holds_memory = release is not None
        self._release = release

    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        """Views of the rows; they are copied only if the chosen rows are not contiguous."""
        if self.holds_memory and self._release is None:
            raise unknown_capture()
        chosen = self.captured.select(layers, resolved(self.metadata, positions))
        if progress is not None:
            progress(chosen.nbytes, chosen.nbytes)
        return chosen

    async def release(self) -> None:
        """Frees the memory."""
        self.release_nowait()

    def release_nowait(self) -> None:
        """Frees the memory."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        self.release_nowait()  # the event that carried it may be dropped before a caller receives it


def metadata_of(
    captured: CapturedRows, layers: Sequence[int], prompt_tokens: int, sequence_rows: int
) -> CaptureMetadata:
    """The metadata of these rows; `layers` in the requested order."""
    sites = ((CaptureSite.BEFORE, captured.before), (CaptureSite.AFTER, captured.after))
    sample = next(iter(captured.hidden.values()), np.empty((0, 0), np.float32))
    return CaptureMetadata(
        layers=tuple(layers),
        sites=tuple(site for site, arrays in sites if arrays),
        spans=captured.spans,
        dtype=name_of_dtype(sample.dtype),
        hidden_size=sample.shape[1],
        prompt_tokens=prompt_tokens,
        sequence_rows=sequence_rows,
        pooling=captured.pooling,
    )
