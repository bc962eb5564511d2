"""Where a fake backend's held rows lie: segments like those of an engine, in a directory of the test."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.stored_capture import SegmentPlace, in_order
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory

ALIGNMENT = 64


class Arena:
    """`FakeBackend(place=Arena(folder))` puts what it holds into segments there."""

    def __init__(self, folder: Path, budget_bytes: int = 1 << 30) -> None:
        self.folder = folder
        self.pool = SegmentPool(budget_bytes, SegmentDirectory(path=folder))

    @property
    def segments(self) -> list[Path]:
        """The segments that have a name."""
        return sorted(self.folder.glob("steerllm-*"))

    def __call__(self, captured: CapturedRows) -> tuple[CapturedRows, SegmentPlace, Callable[[], None]]:
        offsets: dict[tuple[int, CaptureSite], int] = {}
        size = ALIGNMENT  # the first rows do not begin where the segment does
        for layer, site, rows in in_order(captured):
            offsets[layer, site] = size
            size += -(-rows.nbytes // ALIGNMENT) * ALIGNMENT
        segment = self.pool.acquire(size)
        placed: dict[CaptureSite, dict[int, np.ndarray]] = {site: {} for site in CaptureSite}
        for layer, site, rows in in_order(captured):
            placed[site][layer] = np.ndarray(rows.shape, rows.dtype, segment.memory, offsets[layer, site])
            placed[site][layer][:] = rows
        there = replace(captured, before=placed[CaptureSite.BEFORE], after=placed[CaptureSite.AFTER])
        place = SegmentPlace(name=segment.name, size=size, offsets=offsets)
        return there, place, lambda: self.pool.release(segment)
