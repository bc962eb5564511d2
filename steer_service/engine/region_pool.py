"""Reserves shared memory for outputs before they start, and frees it afterwards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, Pooling
from steer_service.core.span_table import SpanTable
from steer_service.core.spans import EVERYWHERE
from steer_service.engine.mark_memory import MarkMemory
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.region import Region, RegionLayout
from steer_service.engine.remote_workers import RemoteRegions
from steer_service.ops.program import Program
from steer_service.runtime.prepare import PreparedRequest
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import Segment

LARGE_SEGMENT = 16 << 20
"""Bytes above which a segment is created in a thread: the system zeroes its memory at a few GB/s."""


class RegionPool:
    """The regions of all outputs."""

    def __init__(self, segments: SegmentPool, marks: MarkMemory, info: ModelInfo, stages: int) -> None:
        self.segments = segments
        """The shared memory of regions with captured rows or recorded changes."""
        self.marks = marks
        """The shared memory of regions that have marks only."""
        self.remote: RemoteRegions | None = None
        """Set if a worker does not share this process's memory."""
        self.lags = False
        """True if a token may be visible before an earlier pipeline stage has marked its row."""
        self._info = info
        self._stages = stages

    def check(self, prepared: PreparedRequest) -> None:
        """Raises OverBudget if the regions of all outputs could never be reserved together."""
        of_pooled, layout = self._layout_of_pooled(prepared), self._layout_of(prepared)
        if _has_rows(layout):
            size = layout.size + (of_pooled.size if of_pooled is not None else 0)
            self.segments.check(size * len(prepared.outputs), prepared.request.client_id)

    @asynccontextmanager
    async def reserve(self, prepared: PreparedRequest, program: Program | None) -> AsyncIterator[RegionRows]:
        """The rows of one output, with a region if anything is steered or captured.

        At the block's end the region is freed, unless its rows were stored. Raises OverBudget and Overloaded.
        """
        layers = tuple(program.layers) if program is not None else ()
        if program is None and prepared.capture is None:
            yield RegionRows(None, layers, self.segments.release)
            return
        layout, client_id = self._layout_of(prepared), prepared.request.client_id
        offset = await self.marks.acquire(layout.size, client_id) if not _has_rows(layout) else None
        async with AsyncExitStack() as stack:
            if offset is not None:
                stack.callback(self.marks.release, offset)
                region = Region(layout, self.marks.segment, offset)
            else:
                region = Region(layout, await self._acquire(layout.size, client_id))
            if self.remote is not None:
                stack.callback(self.remote.free, region)
            rows = RegionRows(region, layers, self.segments.release)
            if offset is None:
                stack.callback(rows.release_unless_stored, region)
            of_pooled = self._layout_of_pooled(prepared)
            if of_pooled is not None:
                rows.for_pooled = Region(of_pooled, self.segments.acquire(of_pooled.size, client_id))
                stack.callback(rows.release_unless_stored, rows.for_pooled)
            yield rows

    def _layout_of(self, prepared: PreparedRequest) -> RegionLayout:
        capture, steering = prepared.capture, prepared.steering
        return RegionLayout(
            stages=self._stages,
            rows=prepared.rows.limit,
            sites=capture.site.parts if capture is not None else (),
            layers=capture.layers if capture is not None else (),
            captured=prepared.rows.captured_table,
            hidden_size=self._info.hidden_size,
            dtype=(capture.dtype if capture is not None else None) or self._info.dtype,
            reported=tuple(steering.active_layers()) if steering is not None and steering.report_change else (),
        )

    def _layout_of_pooled(self, prepared: PreparedRequest) -> RegionLayout | None:
        """The layout of the pooled rows of an output, if they are stored; None for rows that are sent inline."""
        capture = prepared.capture
        if capture is None or capture.pooling is Pooling.NONE or capture.delivery is CaptureDelivery.INLINE:
            return None
        layout = self._layout_of(prepared)
        dtype = capture.pooling.dtype_of(layout.dtype)
        return replace(layout, stages=1, rows=1, captured=SpanTable.of(EVERYWHERE), dtype=dtype, reported=())

    async def _acquire(self, size: int, client_id: str) -> Segment:
        if size < LARGE_SEGMENT:
            return self.segments.acquire(size, client_id)
        creating = asyncio.ensure_future(asyncio.to_thread(self.segments.acquire, size, client_id))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            creating.add_done_callback(self._release_unwanted)
            raise

    def _release_unwanted(self, creating: "asyncio.Future[Segment]") -> None:
        if not creating.cancelled() and creating.exception() is None:
            self.segments.release(creating.result())


def _has_rows(layout: RegionLayout) -> bool:
    """True if the region has more than marks."""
    return bool(layout.layers or layout.reported)
