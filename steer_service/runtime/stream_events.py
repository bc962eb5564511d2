"""The events of one request as callers of `stream_events` see them, with a handle for the captures of each output."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from steer_service.core.capture import CapturedRows
from steer_service.core.events import CaptureBlock, CaptureHeld, CaptureLabels, Event, OutputFinished
from steer_service.core.prompt import ChatPrompt
from steer_service.core.request import GenerateRequest
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.results import ResponseCollector, handle_of

Handle = TypeVar("Handle")
"""CaptureHandle, or SyncCaptureHandle where a blocking client made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCaptured(Generic[Handle]):
    """The captures of one output are complete; the next event of the output is its OutputFinished."""

    output_index: int
    """Which of the n outputs, from 0."""
    handle: Handle
    """What fetches and releases the rows; the receiver of the event closes it."""


StreamEvent = Event | OutputCaptured[Handle]
"""What `stream_events` yields; of a live capture also CaptureLabels and CaptureBlock, and never CaptureHeld."""


async def with_handles(
    events: AsyncGenerator[Event, None], request: GenerateRequest
) -> AsyncGenerator[StreamEvent[CaptureHandle], None]:
    """The `events` of `request`, in which captures are handles; a live capture stays as it is, as float32 copies.

    Captures whose handle nobody received are released.
    """
    is_captured = request.capture is not None and not request.capture.is_live
    collected = ResponseCollector()
    try:
        async with aclosing(events):
            async for event in events:
                if not is_captured:
                    yield _kept(event)
                    continue
                collected.add(event)
                if isinstance(event, OutputFinished):
                    output = collected.generation.outputs[event.output_index]
                    is_chat = isinstance(request.prompt, ChatPrompt)
                    handle = handle_of(collected.generation, output, is_chat=is_chat)
                    output.held, output.captured = None, CapturedRows()  # the handle has them
                    yield OutputCaptured(output_index=event.output_index, handle=handle)
                if not isinstance(event, CaptureLabels | CaptureBlock | CaptureHeld):
                    yield event
    finally:
        collected.generation.release_nowait()


def _kept(event: Event) -> Event:
    """A block of a live capture with an array of its own, float32; any other event as it is."""
    if not isinstance(event, CaptureBlock):
        return event
    return replace(event, hidden=event.hidden.astype(np.float32))
