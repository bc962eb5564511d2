"""Captured rows of one output, and handles of them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steer_service.core.capture import CapturedRows, MessageBoundary, RowLabels
from steer_service.core.positions import PositionScope
from steer_service.core.stored_capture import HeldCapture, Progress, resolved
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.local_capture import LocalCapture, metadata_of

ROWS = {
    2: np.arange(12, dtype=np.float32).reshape(6, 2),
    0: -np.arange(12, dtype=np.float32).reshape(6, 2),
}
SIX = CapturedRows(after=ROWS, spans=((0, 6),))
CHAT = (MessageBoundary("user", "Hello", 0, 3), MessageBoundary("assistant", "Hi", 3, 5))
LABELS = RowLabels(
    positions=range(6), token_ids=range(10, 16), is_generated=[False] * 5 + [True], is_steered=[True] * 6
)
LIMIT_S = 5


class Source(HeldCapture):
    """Held rows, after a prompt of five tokens, that count what is asked of them; each failure is raised once."""

    def __init__(self, *failures: Exception, captured: CapturedRows = SIX, holds_memory: bool = True) -> None:
        super().__init__(metadata_of(captured, list(captured.hidden), prompt_tokens=5, sequence_rows=6))
        self.captured = captured
        self.failures = list(failures)
        self.holds_memory = holds_memory
        self.fetched = 0
        self.released = 0
        self.abandoned = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        self.go.set()

    async def rows(
        self,
        layers: Sequence[int] | None = None,
        positions: PositionScope | None = None,
        progress: Progress | None = None,
    ) -> CapturedRows:
        self.fetched += 1
        total = self.metadata.total_bytes
        try:
            for here in (0, total // 2, total):
                await self.go.wait()
                if progress is not None:
                    progress(here, total)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop(0)
        return self.captured.select(layers, resolved(self.metadata, positions))

    async def release(self) -> None:
        self.released += 1
        if self.failures:
            raise self.failures.pop(0)

    def release_nowait(self) -> None:
        self.abandoned += 1


def handle(held: HeldCapture, boundaries: Any = CHAT, labels: RowLabels | None = None) -> CaptureHandle:
    return CaptureHandle(
        request_id="r1", layer_indices=held.metadata.layers, held=held, labels=labels, message_boundaries=boundaries
    )


def here(captured: CapturedRows = SIX, **options: Any) -> CaptureHandle:
    """A handle of rows that came with the answer, after a prompt of five tokens."""
    return handle(
        LocalCapture(metadata_of(captured, list(captured.hidden), prompt_tokens=5, sequence_rows=6), captured),
        **options,
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)
