"""A backend without a model, for tests of what carries requests and events: never of what a model does with them."""

import asyncio
import hashlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureSite,
    CaptureSpec,
    MessageBoundary,
    RowLabels,
)
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
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
from steer_service.core.positions import clipped, count_rows, mask_of, spans_of
from steer_service.core.prompt import ChatPrompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.stored_capture import SegmentPlace
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt

FAKE_MODEL = ModelInfo(
    name="fake",
    architecture="FakeForCausalLM",
    layer_count=4,
    hidden_size=8,
    vocab_size=32_000,
    max_model_len=4096,
    dtype="float32",
    max_programs=8,
    max_operations=64,
    max_operations_per_layer=8,
)
"""The default model: small, with every limit low enough for a test to reach."""

BLOCK_ROWS = 5
"""Rows of a capture block at most; small, so that a capture comes in several blocks."""


@dataclass(slots=True)
class FakeOutput:
    """One output under way."""

    index: int
    """Which of the n outputs, from 0."""
    token_ids: list[int] = field(default_factory=list)
    """Generated so far."""
    stop: int | None = None
    """The stop token that ended it, if one did."""
    sent: int = 0
    """Captured rows that were sent."""


@dataclass(slots=True)
class FakeLife:
    """How far one request came."""

    completed: bool = False
    """Completed was reached; a reader that closes the iterator there aborts nothing."""
    failed: bool = False
    """It ended in `failure`."""


class FakeBackend(SteeringCalls):
    """A deterministic Backend for protocol tests only: it steers nothing, and its captures say where they belong.

    Tokens are a function of the prompt's tokens and the output's index; captured rows are those of `encode_row`.
    Receipts and labels say what a real backend would have done.
    """

    def __init__(
        self,
        info: ModelInfo = FAKE_MODEL,
        *,
        step: Callable[[int], Awaitable[Any]] | None = None,
        failure: SteerError | None = None,
        fail_at: int = 0,
        place: Callable[[CapturedRows], tuple[CapturedRows, SegmentPlace, Callable[[], None]]] | None = None,
    ) -> None:
        assert info.hidden_size >= 6, "a row needs six numbers to say where it belongs"
        self._info = info
        self.step = step
        """Awaited before every token of a request with the token's number, from 0: where a test holds a request."""
        self.failure = failure
        """Raised before token `fail_at` of every request; None: nothing fails."""
        self.fail_at = fail_at
        """Number of the token, from 0, in whose place `failure` is raised."""
        self.place = place
        """Puts held rows into shared memory: what they are there, where, and what frees them. None: they stay here."""
        self.holding = 0
        """Outputs whose rows are held and not yet released."""
        self.requests: list[GenerateRequest] = []
        """Every request that was prepared, oldest first."""
        self.running = 0
        """Requests prepared and not yet released."""
        self.finished = 0
        """Requests that reached Completed."""
        self.aborted = 0
        """Requests whose iterator was closed or cancelled before Completed."""
        self.failed = 0
        """Requests that ended in `failure`."""
        self.closed = False
        """True after `close`."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> ModelInfo:
        """Facts about the model that is not there."""
        return self._info

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answers one request with the events of `core.request`; the counters tell when it was released."""
        if self.closed:
            raise EngineFailed("the backend is closed", reason="CLOSED")
        prepared = await prepare(request, self._info, self._render)
        async with self._counted(request) as life:
            yield Started(
                request_id=request.request_id or f"fake-{len(self.requests)}",
                prompt_token_ids=prepared.prompt.token_ids,
                sampling=prepared.options,
                message_boundaries=prepared.prompt.message_boundaries,
                capture_delivery=prepared.delivery,
            )
            outputs = [FakeOutput(index) for index in range(prepared.options.n or 1)]
            async with aclosing(self._generate(prepared, outputs)) as deltas:
                async for delta in deltas:
                    yield delta
                    if prepared.capture is not None and prepared.capture.is_live:
                        for event in self._captures(prepared, outputs[delta.output_index]):
                            yield event
            for output in outputs:
                for event in self._end(prepared, output):
                    yield event
            completion_tokens = sum(len(output.token_ids) for output in outputs)
            life.completed = True
            yield Completed(
                usage=Usage(prompt_tokens=len(prepared.prompt.token_ids), completion_tokens=completion_tokens)
            )

    async def wait_idle(self) -> None:
        """Returns when no request runs; bound it with a time limit."""
        await self._idle.wait()

    async def close(self) -> None:
        """Refuses further requests; calling it again does nothing."""
        self.closed = True

    @asynccontextmanager
    async def _counted(self, request: GenerateRequest) -> AsyncIterator[FakeLife]:
        life = FakeLife()
        self.requests.append(request)
        self.running += 1
        self._idle.clear()
        try:
            yield life
        except SteerError:
            life.failed = True
            raise
        finally:
            self.finished += life.completed
            self.failed += life.failed
            self.aborted += not (life.completed or life.failed)
            self.running -= 1
            if self.running == 0:
                self._idle.set()

    async def _generate(self, prepared: PreparedRequest, outputs: list[FakeOutput]) -> AsyncGenerator[TokenDelta, None]:
        sampling = prepared.options
        assert sampling.max_tokens is not None
        for number in range(sampling.max_tokens):
            if self.failure is not None and number == self.fail_at:
                raise self.failure
            if self.step is not None:
                await self.step(number)
            for output in [output for output in outputs if output.stop is None]:
                token = token_at(prepared.prompt.token_ids, output.index, number, self._info.vocab_size)
                output.token_ids.append(token)
                if token in sampling.stop_token_ids:
                    output.stop = token
                yield TokenDelta(
                    output_index=output.index,
                    text=text_of(token),
                    token_ids=(token,),
                    logprobs=_logprobs(token, sampling.logprobs),
                )

    def _end(self, prepared: PreparedRequest, output: FakeOutput) -> Iterator[Event]:
        prompt_tokens, rows = len(prepared.prompt.token_ids), _row_count(prepared, output)
        if prepared.capture is not None:
            if prepared.capture.delivery is CaptureDelivery.INLINE:
                yield from self._captures(prepared, output, at_end=True)
            else:
                labels = _labels(prepared, output)
                yield CaptureLabels(output_index=output.index, labels=labels)
                held = self._held(prepared.capture, labels, prompt_tokens, rows)
                yield CaptureHeld(output_index=output.index, held=held)
        yield OutputFinished(
            output_index=output.index,
            reason=FinishReason.LENGTH if output.stop is None else FinishReason.STOP,
            stop=output.stop,
            receipt=_receipt(prepared, rows, self._info),
        )

    def _captures(self, prepared: PreparedRequest, output: FakeOutput, *, at_end: bool = False) -> Iterator[Event]:
        """What was not sent yet; at the end, if there never was anything, blocks without rows."""
        assert prepared.capture is not None
        labels = _labels(prepared, output)[output.sent :]
        if len(labels) or (at_end and not output.sent):
            output.sent += len(labels)
            yield CaptureLabels(output_index=output.index, labels=labels)
            yield from capture_blocks(prepared.capture, output.index, labels, self._info)

    def _held(self, spec: CaptureSpec, labels: RowLabels, prompt_tokens: int, sequence_rows: int) -> LocalCapture:
        parts: dict[CaptureSite, dict[int, list[npt.NDArray[Any]]]] = {site: {} for site in CaptureSite}
        for block in capture_blocks(spec, 0, labels, self._info):
            parts[block.site].setdefault(block.layer, []).append(block.hidden)
        before, after = (
            {layer: np.concatenate(arrays) for layer, arrays in parts[site].items()}
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        captured, segment, free = CapturedRows(before=before, after=after, spans=spans_of(labels.positions)), None, None
        if self.place is not None:
            captured, segment, free = self.place(captured)

        def release() -> None:
            self.holding -= 1
            if free is not None:
                free()

        self.holding += 1
        metadata = metadata_of(captured, spec.layers, prompt_tokens, sequence_rows)
        return LocalCapture(metadata, captured, release=release, segment=segment)

    async def _render(self, request: GenerateRequest) -> RenderedPrompt:
        match request.prompt:
            case ChatPrompt():
                return self._render_chat(request.prompt)
            case TextPrompt():
                return RenderedPrompt(token_ids=words_to_token_ids(request.prompt.text, self._info.vocab_size))
            case TokenPrompt():
                return RenderedPrompt(token_ids=request.prompt.token_ids)

    def _render_chat(self, prompt: ChatPrompt) -> RenderedPrompt:
        token_ids: tuple[int, ...] = ()
        boundaries = []
        for message in prompt.messages:
            start = len(token_ids)
            token_ids += words_to_token_ids(f"<{message.role}> {message.content}", self._info.vocab_size)
            boundaries.append(MessageBoundary(message.role, message.content, start, len(token_ids)))
        if not prompt.continue_final_message:
            token_ids += words_to_token_ids("<assistant>", self._info.vocab_size)
        return RenderedPrompt(token_ids=token_ids, message_boundaries=tuple(boundaries))


def words_to_token_ids(text: str, vocab_size: int) -> tuple[int, ...]:
    """One token per whitespace-separated word of `text`, a hash of the word."""
    return tuple(_hash(word.encode()) % vocab_size for word in text.split())


def token_at(prompt_token_ids: Sequence[int], output_index: int, number: int, vocab_size: int) -> int:
    """Token `number`, from 0, of output `output_index` to a prompt."""
    return _hash(repr((tuple(prompt_token_ids), output_index, number)).encode()) % vocab_size


def text_of(token: int) -> str:
    """The text of a generated token."""
    return f" t{token}"


def encode_row(
    layer: int,
    position: int,
    token: int,
    info: ModelInfo = FAKE_MODEL,
    site: CaptureSite = CaptureSite.AFTER,
    dtype: str | None = None,
) -> npt.NDArray[Any]:
    """The hidden state of one row, shape [hidden_size]: layer, position and token in base 256, and the site.

    Every number is below 256 and so exact in bfloat16 as well; positions and tokens below 65,536 are told apart. The
    dtype is the model's, unless another is given.
    """
    row = np.zeros(info.hidden_size, dtype=dtype_from_name(dtype or info.dtype))
    row[:6] = [layer, position % 256, position // 256, token % 256, token // 256, site is CaptureSite.BEFORE]
    return row


def decode_row(row: npt.NDArray[Any]) -> tuple[int, int, int]:
    """(layer, position, token) of a captured row."""
    layer, position_low, position_high, token_low, token_high = (int(value) for value in row[:5])
    return layer, position_low + 256 * position_high, token_low + 256 * token_high


def capture_blocks(spec: CaptureSpec, output_index: int, labels: RowLabels, info: ModelInfo) -> Iterator[CaptureBlock]:
    """The rows with these labels at every layer and site asked for, in blocks of at most `BLOCK_ROWS` rows."""
    starts = range(0, max(len(labels), 1), BLOCK_ROWS)  # without rows there is one block, which says so
    for layer, site, start in itertools.product(spec.layers, spec.site.parts, starts):
        part = labels[start : start + BLOCK_ROWS]
        hidden = np.empty((len(part), info.hidden_size), dtype_from_name(spec.dtype or info.dtype))
        for row, (position, token) in enumerate(zip(part.positions, part.token_ids, strict=True)):
            hidden[row] = encode_row(layer, int(position), int(token), info, site, spec.dtype)
        yield CaptureBlock(
            output_index=output_index, layer=layer, site=site, spans=spans_of(part.positions), hidden=hidden
        )


def _labels(prepared: PreparedRequest, output: FakeOutput) -> RowLabels:
    rows, prompt = _row_count(prepared, output), prepared.prompt.token_ids
    spans, is_steered = clipped(prepared.captured, rows), mask_of(prepared.steered, rows)
    return RowLabels.of(spans, [*prompt, *output.token_ids], len(prompt), is_steered)


def _row_count(prepared: PreparedRequest, output: FakeOutput) -> int:
    return len(prepared.prompt.token_ids) + len(output.token_ids) - 1  # the last sampled token is never fed


def _receipt(prepared: PreparedRequest, rows: int, info: ModelInfo) -> Receipt:
    steering, capture = prepared.steering, prepared.capture
    captured_bytes = 0
    if capture is not None:
        row_bytes = info.hidden_size * dtype_from_name(capture.dtype or info.dtype).itemsize
        captured_bytes = count_rows(prepared.captured, rows) * len(capture.layers) * len(capture.site.parts) * row_bytes
    return Receipt(
        steering_digest=steering.digest() if steering is not None else "",
        steered_layers=tuple(steering.active_layers()) if steering is not None else (),
        rows_steered=count_rows(prepared.steered, rows),
        captured_layers=capture.layers if capture is not None else (),
        rows_captured=count_rows(prepared.captured, rows),
        rows_total=rows,
        bytes_reserved=captured_bytes,
        bytes_captured=captured_bytes,
    )


def _logprobs(token: int, count: int | None) -> tuple[TokenLogprob, ...]:
    if count is None:
        return ()
    top = tuple((token + rank, -1.0 - rank) for rank in range(count))
    return (TokenLogprob(token_id=token, logprob=-1.0, top=top),)


def _hash(value: bytes) -> int:
    return int.from_bytes(hashlib.sha256(value).digest()[:8], "big")
