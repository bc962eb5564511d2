"""A backend that yields exactly the events that a test scripts."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CaptureSite, MessageBoundary, SharedMemoryFallback
from steer_service.core.events import (
    CaptureBlock,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.runtime.calls import SteeringCalls

LIMIT_S = 5
INFO = ModelInfo(
    name="scripted",
    architecture="Script",
    layer_count=4,
    hidden_size=2,
    vocab_size=100,
    max_model_len=64,
    dtype="float32",
    max_programs=1,
    max_operations=8,
    max_operations_per_layer=8,
)


class Scripted(SteeringCalls):
    """Answers each prompt with its own script; an exception in a script is raised, an Event waited for.

    Without scripts it answers as a backend does that did all it was asked for.
    """

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.requests: list[GenerateRequest] = []
        self.closed: list[int] = []
        """Numbers of the requests whose generator has ended, in the order in which they did."""

    @property
    def info(self) -> ModelInfo:
        return INFO

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        raise AssertionError("it has no tokenizer")

    async def text_of(self, request: DetokenizeRequest) -> str:
        raise AssertionError("it has no tokenizer")

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        number = len(self.requests)
        self.requests.append(request)
        try:
            for item in self.scripts[number] if self.scripts else honest_answer(request):
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
        finally:
            for _ in range(10 * (number + 1)):
                await asyncio.sleep(0)  # cleaning up takes turns of the loop, as it does over a network
            self.closed.append(number)

    async def close(self) -> None:
        pass


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0)


def started(
    n: int = 1,
    boundaries: tuple[MessageBoundary, ...] = (),
    delivery: CaptureDelivery | None = None,
    fallback: SharedMemoryFallback | None = None,
) -> Started:
    return Started(
        request_id="r1",
        prompt_token_ids=(7, 8),
        sampling=SamplingOptions(n=n),
        message_boundaries=boundaries,
        capture_delivery=delivery,
        shared_memory_fallback=fallback,
    )


def capturing(n: int = 1, boundaries: tuple[MessageBoundary, ...] = ()) -> Started:
    return started(n, boundaries, CaptureDelivery.INLINE)


def said(text: str, index: int = 0, token: int = 1) -> TokenDelta:
    logprobs = (TokenLogprob(token_id=token, logprob=-0.5),)
    return TokenDelta(output_index=index, text=text, token_ids=(token,), logprobs=logprobs)


def rows(layer: int, first: int, count: int, index: int = 0) -> CaptureBlock:
    hidden = np.array([[layer, position] for position in range(first, first + count)], dtype=np.float32)
    spans = ((first, first + count),) if count else ()
    return CaptureBlock(output_index=index, layer=layer, site=CaptureSite.AFTER, spans=spans, hidden=hidden)


def finished(index: int = 0, captured: tuple[int, ...] = (), count: int = 0) -> OutputFinished:
    receipt = Receipt(
        captured_layers=captured,
        rows_captured=count,
        rows_total=count,
        bytes_captured=len(captured) * count * ROW_BYTES,
    )
    return OutputFinished(output_index=index, reason=FinishReason.LENGTH, receipt=receipt)


ROW_BYTES = 8
"""Of the rows above."""
DONE = Completed(usage=Usage(prompt_tokens=2, completion_tokens=2))


def answer(*words: str) -> list[Event]:
    return [started(), *map(said, words), finished(), DONE]


def honest_answer(request: GenerateRequest) -> list[Event]:
    layers = request.capture.layers if request.capture is not None else ()
    steering = request.steering
    receipt = Receipt(
        steering_digest=steering.digest() if steering is not None else "",
        steered_layers=tuple(steering.layers) if steering is not None else (),
        rows_steered=2 if steering is not None else 0,
        captured_layers=layers,
        rows_captured=2 if layers else 0,
        rows_total=2,
        bytes_captured=len(layers) * 2 * ROW_BYTES,
    )
    end = OutputFinished(output_index=0, reason=FinishReason.LENGTH, receipt=receipt)
    return [capturing() if layers else started(), said("a"), *(rows(layer, 0, 2) for layer in layers), end, DONE]
