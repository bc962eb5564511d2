"""What the calls return: the outputs of a request, assembled from its events, and the handles of its captures."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from steer_service.core.arrays import HiddenArray
from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureSite,
    MessageBoundary,
    Pooling,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import EngineFailed, InvalidRequest, SteerError
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    PromptLogprobs,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from steer_service.core.one_line import one_line
from steer_service.core.prompt import ChatPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import Spans, united
from steer_service.core.stored_capture import HeldCapture
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.local_capture import LocalCapture, metadata_of

Handle = TypeVar("Handle")
"""CaptureHandle, or SyncCaptureHandle where a blocking client made it."""


@dataclass(slots=True, kw_only=True)
class Output:
    """One finished output of a request."""

    text: str = ""
    """The generated text."""
    token_ids: list[int] = field(default_factory=list)
    """Generated token ids, including the last one."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One per generated token, if requested."""
    finish_reason: FinishReason = FinishReason.STOP
    """Why the output ended."""
    stop: str | int | None = None
    """The stop string or token that ended it, if one did."""
    receipt: Receipt = field(default_factory=Receipt)
    """What was really applied to the output."""
    captured: CapturedRows = field(default_factory=CapturedRows)
    """Captured rows with their positions, in the dtype that travelled; empty if they are `held`."""
    held: HeldCapture | None = None
    """The captures, if they did not come with the response; the owner of the output releases them."""
    labels: RowLabels | None = None
    """Labels of the captured rows, if the backend sent them."""

    __repr__ = one_line

    @property
    def captures(self) -> Mapping[int, HiddenArray]:
        """Layer -> rows, shape [rows, hidden_size]: `captured.hidden` as float32, made when a layer is first read."""
        return self.captured.as_float32().hidden


@dataclass(slots=True, kw_only=True)
class Generation:
    """One finished request with all its outputs; `raw_output=True` returns it."""

    request_id: str = ""
    """The caller's id, or a generated one."""
    prompt_token_ids: tuple[int, ...] = ()
    """Tokens of the rendered prompt."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """The effective options."""
    generation_config: str = ""
    """Where defaults in `sampling` come from: "model" or "file" for a generation config, "" for the contract."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """The tokens of each message of a chat prompt; empty for other prompts."""
    boundaries_missing_reason: str = ""
    """Why a chat has no boundaries, a sentence; "" if it has, or if nothing is captured."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """Entry i is the log-probability of prompt token i given those before it, so that the first is None.

    Empty if not requested; without the others if the time budget ended before the first token."""
    outputs: list[Output] = field(default_factory=list)
    """The n outputs."""
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    """Token counts."""
    capture_delivery: CaptureDelivery | None = None
    """How its captures were delivered; None if nothing was captured."""
    shared_memory_fallback: SharedMemoryFallback | None = None
    """Why the captures came inline although shared memory was preferred; None otherwise."""

    __repr__ = one_line

    def release_nowait(self) -> None:
        """Releases the held captures of its outputs."""
        for output in self.outputs:
            if output.held is not None:
                output.held.release_nowait()


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """The model's turn of a conversation: the given prefill, if any, and the generated text."""

    prefill: str
    """The beginning of the turn, as given by the caller; "" if there was none.

    The model saw all of it, unless `truncate_prompt_tokens` cut the prompt within it: then its end."""
    generated: str
    """The text that the model generated."""

    __repr__ = one_line

    @property
    def has_prefill(self) -> bool:
        """True if the caller gave the beginning of the turn."""
        return bool(self.prefill)

    def full_text(self) -> str:
        """Prefill and generated text together."""
        return self.prefill + self.generated

    def to_message(self, role: str = "assistant") -> dict[str, str]:
        """The turn as a message for the next call of `chat`."""
        return {"role": role, "content": self.full_text()}

    def __str__(self) -> str:
        return self.full_text()


class Texts(NamedTuple, Generic[Handle]):
    """What `generate` returns; unpacks as `texts, handles`."""

    texts: list[str]
    """One per output, in the order of the prompts."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""

    def __repr__(self) -> str:
        return one_line(self)


class Generations(NamedTuple, Generic[Handle]):
    """What `generate` and `chat` return with `raw_output=True`; unpacks as `generations, handles`."""

    generations: list[Generation]
    """One per prompt, in their order, each with its n outputs."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""

    def __repr__(self) -> str:
        return one_line(self)


class PartialGenerations(NamedTuple, Generic[Handle]):
    """What `generate` and `chat` return with `raw_output=True, return_exceptions=True`."""

    generations: list[Generation | SteerError]
    """One per prompt, in their order; the error of a prompt that failed."""
    handles: list[Handle | None] | None
    """One per output; None for each of the n outputs of a prompt that failed. None if no capture was asked for."""

    def __repr__(self) -> str:
        return one_line(self)


class ChatResponses(NamedTuple, Generic[Handle]):
    """What `chat` returns; unpacks as `responses, handles`."""

    responses: list[ChatResponse]
    """One per output, in the order of the conversations."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""

    def __repr__(self) -> str:
        return one_line(self)


async def collect(events: AsyncGenerator[Event, None]) -> Generation:
    """Drains `events` into one Generation, copying captured rows; raises EngineFailed if they end early.

    The caller releases held captures; after an error they are released already.
    """
    collected = ResponseCollector()
    try:
        async with aclosing(events):
            async for event in events:
                collected.add(event)
                if isinstance(event, Completed):
                    return collected.generation
        raise EngineFailed("the response ended before it was complete", reason="INCOMPLETE")
    except BaseException:
        collected.generation.release_nowait()
        raise


class ResponseCollector:
    """Puts the events of one response together, one after the other; captured rows are copied."""

    def __init__(self) -> None:
        self.generation = Generation()
        """What has arrived; the captures of an output are there once it has finished, held ones before."""
        self._blocks: dict[int, list[CaptureBlock]] = {}
        self._labels: dict[int, list[RowLabels]] = {}

    def add(self, event: Event) -> None:
        """Adds the next event; raises EngineFailed at the end of an output that lacks captured rows."""
        result = self.generation
        match event:
            case Started():
                _begin(result, event)
            case PromptLogprobs():
                result.prompt_logprobs.extend(event.logprobs)
            case TokenDelta():
                output = result.outputs[event.output_index]
                output.text += event.text
                output.token_ids.extend(event.token_ids)
                output.logprobs.extend(event.logprobs)
            case CaptureBlock():
                self._blocks.setdefault(event.output_index, []).append(_kept(event))
            case CaptureLabels():
                self._labels.setdefault(event.output_index, []).append(event.labels)
            case CaptureHeld():
                result.outputs[event.output_index].held = event.held
            case OutputFinished():
                self._finish(event)
            case Completed():
                result.usage = event.usage

    def _finish(self, event: OutputFinished) -> None:
        output = self.generation.outputs[event.output_index]
        output.finish_reason, output.stop, output.receipt = event.reason, event.stop, event.receipt
        parts = self._labels.pop(event.output_index, [])
        output.labels = RowLabels.concatenate(parts) if parts else None
        if output.held is None:
            output.captured = _captured_rows(self._blocks.pop(event.output_index, []), output.labels, event.receipt)


def _kept(block: CaptureBlock) -> CaptureBlock:
    return replace(block, hidden=block.hidden.copy())  # the array is valid only until the next event


def _captured_rows(blocks: list[CaptureBlock], labels: RowLabels | None, receipt: Receipt) -> CapturedRows:
    """The blocks of one output joined; raises EngineFailed unless every layer has the rows that the receipt counts."""
    parts: dict[CaptureSite, dict[int, list[CaptureBlock]]] = {CaptureSite.BEFORE: {}, CaptureSite.AFTER: {}}
    for block in blocks:
        parts[block.site].setdefault(block.layer, []).append(block)
    spans: Spans | None = None
    pooling = blocks[0].pooling if blocks else Pooling.NONE
    for layer, of_layer in (pair for layers in parts.values() for pair in layers.items()):
        mine = united(span for block in of_layer for span in block.spans)
        rows = sum(len(block.hidden) for block in of_layer)
        if rows != pooling.row_count(receipt.rows_captured) or mine != (mine if spans is None else spans):
            raise EngineFailed(
                f"received {rows} rows of layer {layer}, {receipt.rows_captured} were captured", reason="INCOMPLETE"
            )
        spans = mine
    before, after = ({layer: _joined(of_layer) for layer, of_layer in layers.items()} for layers in parts.values())
    missing = [layer for layer in receipt.captured_layers if layer not in (after or before)]
    if missing:
        raise EngineFailed(f"received no rows of layers {missing}", reason="INCOMPLETE")
    return CapturedRows(before=before, after=after, spans=spans or (), labels=labels, pooling=pooling)


def _joined(blocks: list[CaptureBlock]) -> HiddenArray:
    return blocks[0].hidden if len(blocks) == 1 else np.concatenate([block.hidden for block in blocks])


def _begin(result: Generation, started: Started) -> None:
    result.request_id = started.request_id
    result.prompt_token_ids = started.prompt_token_ids
    result.sampling = started.sampling
    result.generation_config = started.generation_config
    result.message_boundaries = started.message_boundaries
    result.boundaries_missing_reason = started.boundaries_missing_reason
    result.capture_delivery = started.capture_delivery
    result.shared_memory_fallback = started.shared_memory_fallback
    result.prompt_logprobs = [None] if started.sampling.prompt_logprobs is not None else []
    result.outputs = [Output() for _ in range(started.sampling.n or 1)]


def handle_of(generation: Generation, output: Output, *, is_chat: bool = False) -> CaptureHandle:
    """The handle of the captures of one output, whether they are held or came inline; `is_chat`: of a chat."""
    held = output.held
    if held is None:
        prompt_tokens, receipt = len(generation.prompt_token_ids), output.receipt
        metadata = metadata_of(output.captured, receipt.captured_layers, prompt_tokens, receipt.rows_total)
        held = LocalCapture(metadata, output.captured)
    return CaptureHandle(
        request_id=generation.request_id,
        layer_indices=output.receipt.captured_layers,
        held=held,
        labels=output.labels,
        message_boundaries=generation.message_boundaries if is_chat else generation.message_boundaries or None,
        boundaries_missing_reason=generation.boundaries_missing_reason,
    )


def handles_of(
    requests: Sequence[GenerateRequest], generations: Sequence[Generation | SteerError]
) -> list[CaptureHandle | None]:
    """The handle of each output of each request; None for the outputs of a request that failed."""
    handles: list[CaptureHandle | None] = []
    for request, generation in zip(requests, generations, strict=True):
        if isinstance(generation, SteerError):
            handles += [None] * (request.sampling.n or 1)
        else:
            is_chat = isinstance(request.prompt, ChatPrompt)
            handles += [handle_of(generation, output, is_chat=is_chat) for output in generation.outputs]
    return handles


def complete_of(partial: PartialGenerations[Handle]) -> Generations[Handle]:
    """The same results, none of which is an error."""
    generations = [one for one in partial.generations if not isinstance(one, SteerError)]
    handles = None if partial.handles is None else [handle for handle in partial.handles if handle is not None]
    assert len(generations) == len(partial.generations), "the first error was raised"
    return Generations(generations, handles)


def check_partial(*, return_exceptions: bool, raw_output: bool) -> None:
    """Raises InvalidRequest (`return_exceptions`) for partial results in a form that has no place for an error."""
    if return_exceptions and not raw_output:
        raise InvalidRequest("it needs raw_output=True, whose entries are generations", field="return_exceptions")
