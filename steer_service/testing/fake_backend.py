"""A backend without a model, for tests of protocols. It does not test what a model does."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.checks import (
    check_priority,
    check_prompt_length,
    check_request,
    check_served,
    check_structured,
    check_token_ids,
    kept_tokens,
)
from steer_service.core.errors import SteerError, closed_error
from steer_service.core.events import (
    Event,
    FinishReason,
    PromptLogprobs,
    TokenDelta,
    TokenLogprob,
    TopLogprob,
)
from steer_service.core.layer_change import LayerChange
from steer_service.core.prompt import TokenPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import mask_of, positions_of
from steer_service.core.stored_capture import CaptureMetadata, SegmentPlace
from steer_service.core.usage import BackendUsage
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.output_events import OutputEvents, RowMask, completed, started
from steer_service.runtime.output_text import OutputText
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompt_reader import shown_prefill
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.runtime.spaced_deltas import spaced
from steer_service.runtime.time_budget import TimeBudget
from steer_service.testing.fake_prompts import hash_of, rendered

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
    has_chat_template=True,
)
"""The default model: small, with every limit low enough for a test to reach."""


@dataclass(slots=True)
class FakeLife:
    """The state of one request."""

    completed: bool = False
    """True once all events but Completed were yielded; closing the iterator then aborts nothing."""
    failed: bool = False
    """True if it ended with an error."""


class FakeBackend(SteeringCalls):
    """A deterministic Backend for protocol tests: it steers nothing, and its captured rows encode their own place.

    Tokens are a function of the prompt's tokens and the output's index. Captured rows are those of `encode_row`.
    Receipts and labels are those of a backend that steers and captures as requested.
    """

    def __init__(
        self,
        info: ModelInfo = FAKE_MODEL,
        *,
        step: Callable[[int], Awaitable[Any]] | None = None,
        failure: SteerError | None = None,
        fail_at: int = 0,
        place: Callable[[CapturedRows], tuple[CapturedRows, SegmentPlace, Callable[[], None]]] | None = None,
        usage: BackendUsage | None = None,
    ) -> None:
        """`usage`: what it says about its limits, of which it has none."""
        assert info.hidden_size >= 6, "a row needs six elements to encode its place"
        self._info = info
        self._usage = usage
        self.step = step
        """Awaited before every token of a request, with the token's number from 0. A test can hold the request here."""
        self.failure = failure
        """Error raised before token `fail_at` of every request; None for no error."""
        self.fail_at = fail_at
        """Number of the token, from 0, before which `failure` is raised."""
        self.place = place
        """Moves held rows to shared memory; returns the moved rows, their place and a function that frees
        them. None: rows stay in this process's own memory."""
        self.holding = 0
        """Number of outputs whose rows are held and not yet released."""
        self.requests: list[GenerateRequest] = []
        """Every request that was prepared, oldest first."""
        self.running = 0
        """Number of requests prepared and not yet released."""
        self.finished = 0
        """Number of requests that reached Completed."""
        self.aborted = 0
        """Number of requests whose iterator was closed or cancelled before Completed."""
        self.failed = 0
        """Number of requests that ended with an error."""
        self.closed = False
        """True after `close`."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> ModelInfo:
        """Facts about the imaginary model."""
        return self._info

    @property
    def usage(self) -> BackendUsage | None:
        """What it was given."""
        return self._usage

    def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Runs one request and yields its events; the counters show when it was released."""
        return spaced(self._submit(request), request.stream_interval)

    async def _submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self.closed:
            raise closed_error("the backend")
        check_priority(request, has_priority=self.has_priority)
        check_structured(request, is_served=self.has_structured_outputs)
        prepared = await prepare(request, self._info, self._render)
        async with self._counted(request) as life:
            yield started(prepared, request.request_id or f"fake-{len(self.requests)}")
            if prepared.options.prompt_logprobs is not None and prepared.rows.prompt_tokens > 1:
                yield PromptLogprobs(first_position=1, logprobs=_prompt_logprobs(prepared))
            outputs = [FakeOutput(self, prepared, index) for index in prepared.outputs]
            async with aclosing(self._generate(prepared, outputs)) as deltas:
                async for delta in deltas:
                    yield delta
                    for event in outputs[delta.output_index].events.after_tokens():
                        yield event
            for output in outputs:
                for final in output.events.finish(output.finish_reason, output.stop):
                    yield final
            life.completed = True
            yield completed(prepared, [output.events for output in outputs])

    async def wait_idle(self) -> None:
        """Returns when no request runs. Call it with a timeout."""
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

    async def _generate(
        self, prepared: PreparedRequest, outputs: "list[FakeOutput]"
    ) -> AsyncGenerator[TokenDelta, None]:
        sampling = prepared.options
        assert sampling.max_tokens is not None
        if sampling.is_rows_only:
            if self.failure is not None and self.fail_at == 0:
                raise self.failure
            if await self._is_in_time(prepared.budget, 0):
                for output in outputs:
                    output.events.has_prompt_rows = True
            return
        for number in range(sampling.max_tokens):
            if self.failure is not None and number == self.fail_at:
                raise self.failure
            if not await self._is_in_time(prepared.budget, number):
                return
            for output in [output for output in outputs if output.stop is None]:
                token = token_at(prepared.prompt.token_ids, output.index, number, self._info.vocab_size)
                output.events.token_ids.append(token)
                is_stop_token = token in sampling.stop_token_ids and number + 1 >= (sampling.min_tokens or 0)
                is_last = is_stop_token or number + 1 == sampling.max_tokens
                text = output.text.add([token], is_over=is_last, ends_with_stop=is_stop_token).text
                output.stop = token if is_stop_token else output.text.stop
                yield TokenDelta(
                    output_index=output.index,
                    text=text,
                    token_ids=(token,),
                    logprobs=_logprobs(token, sampling.logprobs),
                )

    async def _is_in_time(self, budget: TimeBudget, number: int) -> bool:
        """Waits for `step`; False if the time budget of the request ends before."""
        if self.step is not None:
            try:
                async with budget.timeout() as timeout:
                    await self.step(number)
            except TimeoutError:
                if not timeout.expired():
                    raise
        return not budget.is_over

    def held(self, metadata: CaptureMetadata, captured: CapturedRows) -> LocalCapture:
        """Holds captured rows, counted in `holding`, until they are released."""
        segment, free = None, None
        if self.place is not None:
            captured, segment, free = self.place(captured)

        def release() -> None:
            self.holding -= 1
            if free is not None:
                free()

        self.holding += 1
        return LocalCapture(metadata, captured, release=release, segment=segment)

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """One token per word; no token is special."""
        prompt, keep = request.prompt, request.truncate_prompt_tokens
        rows_only = GenerateRequest(
            prompt=prompt,
            model=request.model,
            sampling=SamplingOptions(max_tokens=0),
            truncate_prompt_tokens=keep,
        )
        check_request(rows_only, self._info)
        shown = await self._render(rows_only)
        check_prompt_length(len(shown.token_ids), self._info, is_rows_only=True)
        text = "".join(map(text_of, shown.token_ids)) if shown.text is None or keep is not None else shown.text
        words = [*re.finditer(r"\S+", text)]
        has_places = request.with_offsets and keep is None and not isinstance(prompt, TokenPrompt)
        return PromptTokens(
            text=text,
            token_ids=shown.token_ids,
            token_texts=tuple(word[0] for word in words) if request.with_token_texts else None,
            offsets=tuple(word.span() for word in words) if has_places else None,
            message_boundaries=shown.message_boundaries,
            prefill=shown_prefill(prompt, text),
        )

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The texts of the tokens, one after the other."""
        check_served(request.model, self._info, field="model")
        if request.token_ids:
            check_token_ids(request.token_ids, self._info, field="token_ids")
        return "".join(map(text_of, request.token_ids))

    async def _render(self, request: GenerateRequest) -> RenderedPrompt:
        is_rows_only = request.sampling.is_rows_only
        keep = kept_tokens(request.truncate_prompt_tokens, self._info, is_rows_only=is_rows_only)
        return rendered(request.prompt, self._info, keep)


def token_at(prompt_token_ids: Sequence[int], output_index: int, number: int, vocab_size: int) -> int:
    """Token `number`, from 0, of output `output_index` of a prompt."""
    return hash_of(repr((tuple(prompt_token_ids), output_index, number)).encode()) % vocab_size


def text_of(token: int) -> str:
    """The text of a generated token."""
    return f" t{token}"


class FakeTexts:
    """`runtime.token_texts.TokenTexts` of the imaginary model."""

    is_concatenated = True

    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        """The texts of the tokens, one after the other."""
        return "".join(map(text_of, token_ids))

    def of_token(self, token_id: int, *, skip_special: bool) -> str:
        """The text of a token."""
        return text_of(token_id)

    def has_bytes(self, token_id: int) -> bool:
        """No token."""
        return False

    def is_silent(self, token_id: int, *, skip_special: bool) -> bool:
        """No token."""
        return False


def encode_row(
    layer: int,
    position: int,
    token: int,
    info: ModelInfo = FAKE_MODEL,
    site: CaptureSite = CaptureSite.AFTER,
    dtype: str | None = None,
) -> npt.NDArray[Any]:
    """The hidden state of one row, shape [hidden_size]: layer, position and token in base 256, and the site.

    Every element is below 256 and thus exact in bfloat16. Positions and tokens below 65,536 have different rows. The
    default dtype is the model's.
    """
    row = np.zeros(info.hidden_size, dtype=dtype_from_name(dtype or info.dtype))
    row[:6] = [layer, position % 256, position // 256, token % 256, token // 256, site is CaptureSite.BEFORE]
    return row


def decode_row(row: npt.NDArray[Any]) -> tuple[int, int, int]:
    """(layer, position, token) of a captured row."""
    layer, position_low, position_high, token_low, token_high = (int(value) for value in row[:5])
    return layer, position_low + 256 * position_high, token_low + 256 * token_high


class FakeOutput:
    """One output in flight; its rows are those of `encode_row`."""

    steered_layers: tuple[int, ...]
    """Layers of the steering spec."""

    def __init__(self, backend: FakeBackend, prepared: PreparedRequest, index: int) -> None:
        steering = prepared.steering
        self.index = index
        """Number of the output, from 0."""
        self.stop: int | str | None = None
        """The stop token or stop string that ended the output, if any."""
        self.text = OutputText(FakeTexts(), prepared.prompt.token_ids, prepared.options)
        """Its text."""
        self.events = OutputEvents(prepared, index, backend.info, self)
        """The output's events and generated tokens."""
        self.steered_layers = tuple(steering.active_layers()) if steering is not None else ()
        self._backend = backend
        self._prepared = prepared
        self._dtype = (prepared.capture.dtype if prepared.capture is not None else None) or backend.info.dtype

    @property
    def finish_reason(self) -> FinishReason:
        """Why the output ended."""
        if self.stop is not None:
            return FinishReason.STOP
        max_tokens = self._prepared.options.max_tokens
        is_full = self.events.has_prompt_rows if max_tokens == 0 else len(self.events.token_ids) == max_tokens
        return FinishReason.LENGTH if is_full else FinishReason.TIME_BUDGET

    @property
    def bytes_reserved(self) -> int:
        """The number of captured bytes."""
        capture, info = self._prepared.capture, self._backend.info
        if capture is None:
            return 0
        rows = self._prepared.rows.captured_part(0, self.events.row_count).end
        row_bytes = info.hidden_size * dtype_from_name(self._dtype).itemsize
        return rows * len(capture.layers) * len(capture.site.parts) * row_bytes

    def is_steered(self, rows: int) -> RowMask:
        """The rows to steer."""
        return mask_of(self._prepared.rows.steered, rows)

    def is_reused(self, rows: int) -> RowMask:
        """No row."""
        return np.zeros(rows, np.bool_)

    def is_captured(self, rows: int) -> RowMask:
        """The rows to capture."""
        return mask_of(self._prepared.rows.captured, rows)

    def reused_count(self, rows: int) -> int:
        """0."""
        return 0

    def changes(self, rows: int) -> tuple[LayerChange, ...]:
        """No change at any of the steered rows."""
        positions = int(self.is_steered(rows)[:rows].sum())
        return tuple(LayerChange(layer=layer, positions=positions) for layer in self.steered_layers)

    def read(self, layer: int, site: CaptureSite, first: int, end: int) -> npt.NDArray[Any]:
        """Captured rows number `first` to `end - 1`."""
        positions = positions_of(self._prepared.rows.captured_part(0, self.events.row_count).spans)[first:end]
        token_ids = [*self._prepared.prompt.token_ids, *self.events.token_ids]
        hidden = np.empty((len(positions), self._backend.info.hidden_size), dtype_from_name(self._dtype))
        for row, position in enumerate(positions):
            token = token_ids[position]
            hidden[row] = encode_row(layer, int(position), token, self._backend.info, site, self._dtype)
        return hidden

    def store(self, metadata: CaptureMetadata, pooled: CapturedRows | None) -> LocalCapture:
        """All captured rows, or the pooled ones; in shared memory if the backend has a `place` for them."""
        if pooled is not None:
            return self._backend.held(metadata, pooled)
        before, after = (
            {
                layer: self.read(layer, site, 0, metadata.row_count)
                for layer in (metadata.layers if site in metadata.sites else ())
            }
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        return self._backend.held(metadata, CapturedRows(before=before, after=after, spans=metadata.spans))


def _logprobs(token: int, count: int | None) -> tuple[TokenLogprob, ...]:
    if count is None:
        return ()
    top = tuple(TopLogprob(token + rank, -1.0 - rank, text_of(token + rank), rank + 1) for rank in range(count))
    return (TokenLogprob(token_id=token, logprob=-1.0, top=top, text=text_of(token), rank=1),)


def _prompt_logprobs(prepared: PreparedRequest) -> tuple[TokenLogprob, ...]:
    token_ids, count = prepared.prompt.token_ids[1:], prepared.options.prompt_logprobs
    return tuple(entry for token in token_ids for entry in _logprobs(token, count))
