"""What a request came to: its outputs, put together from the events of its response."""

from collections.abc import AsyncGenerator, Mapping
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
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import EngineFailed
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
from steer_service.core.positions import Spans, united
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.stored_capture import HeldCapture
from steer_service.runtime.handle import CaptureHandle
from steer_service.runtime.local_capture import LocalCapture, metadata_of

Handle = TypeVar("Handle")
"""CaptureHandle, or SyncCaptureHandle where a blocking client made it."""


@dataclass(slots=True, kw_only=True)
class Output:
    """One finished output of a request."""

    text: str = ""
    """What was generated."""
    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, the last one included."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One per generated token if asked for."""
    finish_reason: FinishReason = FinishReason.STOP
    """Why it ended."""
    stop: str | int | None = None
    """The stop string or token that ended it, if one did."""
    receipt: Receipt = field(default_factory=Receipt)
    """What was applied."""
    captured: CapturedRows = field(default_factory=CapturedRows)
    """What was captured, with its positions; without rows if it is `held`."""
    held: HeldCapture | None = None
    """What was captured, if it did not come with the answer: its owner releases it."""
    labels: RowLabels | None = None
    """Labels of the captured rows, if the backend sent them."""

    @property
    def captures(self) -> Mapping[int, HiddenArray]:
        """Layer -> array of shape [rows, hidden_size], if captured: `captured.hidden`."""
        return self.captured.hidden


@dataclass(slots=True, kw_only=True)
class Generation:
    """One finished request; what `raw_output=True` returns."""

    request_id: str = ""
    """The caller's id, or the one made for it."""
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt as the model saw it."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """The options that were in force."""
    message_boundaries: tuple[MessageBoundary, ...] = ()
    """Where each message of a chat prompt lies."""
    outputs: list[Output] = field(default_factory=list)
    """The n outputs."""
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    """What it cost."""
    capture_delivery: CaptureDelivery | None = None
    """How its captures were delivered; None if nothing was captured."""
    shared_memory_fallback: SharedMemoryFallback | None = None
    """Why not through shared memory, if that was preferred."""

    def release_nowait(self) -> None:
        """Releases what its outputs hold."""
        for output in self.outputs:
            if output.held is not None:
                output.held.release_nowait()


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """A model's turn: the beginning it was given, if any, and what it generated."""

    prefill: str
    """The beginning of the turn that was given; "" if none."""
    generated: str
    """What the model added."""

    @property
    def has_prefill(self) -> bool:
        """True if the turn began with given text."""
        return bool(self.prefill)

    def full_text(self) -> str:
        """Prefill and generated text together."""
        return self.prefill + self.generated

    def to_message(self, role: str = "assistant") -> dict[str, str]:
        """The turn as a message for the next round."""
        return {"role": role, "content": self.full_text()}

    def __str__(self) -> str:
        return self.full_text()


class Texts(NamedTuple, Generic[Handle]):
    """What `generate` returns; unpacks as `texts, handles`."""

    texts: list[str]
    """One per output, in the order of the prompts."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""


class Generations(NamedTuple, Generic[Handle]):
    """What `generate` and `chat` return with `raw_output=True`; unpacks as `generations, handles`."""

    generations: list[Generation]
    """One per prompt, in their order, each with its n outputs."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""


class ChatResponses(NamedTuple, Generic[Handle]):
    """What `chat` returns; unpacks as `responses, handles`."""

    responses: list[ChatResponse]
    """One per output, in the order of the conversations."""
    handles: list[Handle] | None
    """One per output; None if no capture was asked for."""


async def collect(events: AsyncGenerator[Event, None]) -> Generation:
    """Drains `events` into one Generation, copying captured rows; raises EngineFailed if they end early.

    What is held is the caller's to release; on an error it is released here.
    """
    result = Generation()
    try:
        await _collect_into(result, events)
    except BaseException:
        result.release_nowait()
        raise
    return result


async def _collect_into(result: Generation, events: AsyncGenerator[Event, None]) -> None:
    blocks: dict[int, list[CaptureBlock]] = {}
    labels: dict[int, list[RowLabels]] = {}
    async with aclosing(events):
        async for event in events:
            match event:
                case Started():
                    _begin(result, event)
                case TokenDelta():
                    output = result.outputs[event.output_index]
                    output.text += event.text
                    output.token_ids.extend(event.token_ids)
                    output.logprobs.extend(event.logprobs)
                case CaptureBlock():
                    blocks.setdefault(event.output_index, []).append(_kept(event))
                case CaptureLabels():
                    labels.setdefault(event.output_index, []).append(event.labels)
                case CaptureHeld():
                    result.outputs[event.output_index].held = event.held
                case OutputFinished():
                    output = result.outputs[event.output_index]
                    output.finish_reason, output.stop, output.receipt = event.reason, event.stop, event.receipt
                    parts = labels.pop(event.output_index, [])
                    output.labels = RowLabels.concatenate(parts) if parts else None
                    if output.held is None:
                        output.captured = _captured_rows(
                            blocks.pop(event.output_index, []), output.labels, event.receipt
                        )
                case Completed():
                    result.usage = event.usage
                    return
    raise EngineFailed("the answer ended before it was complete", reason="INCOMPLETE")


def _kept(block: CaptureBlock) -> CaptureBlock:
    return replace(block, hidden=block.hidden.copy())  # the array is valid only until the next event


def _captured_rows(blocks: list[CaptureBlock], labels: RowLabels | None, receipt: Receipt) -> CapturedRows:
    """What the blocks of one output hold together; raises EngineFailed unless all layers have the receipt's rows."""
    parts: dict[CaptureSite, dict[int, list[CaptureBlock]]] = {CaptureSite.BEFORE: {}, CaptureSite.AFTER: {}}
    for block in blocks:
        parts[block.site].setdefault(block.layer, []).append(block)
    spans: Spans | None = None
    for layer, of_layer in (pair for layers in parts.values() for pair in layers.items()):
        mine = united(span for block in of_layer for span in block.spans)
        rows = sum(len(block.hidden) for block in of_layer)
        if rows != receipt.rows_captured or mine != (mine if spans is None else spans):
            raise EngineFailed(
                f"{rows} rows of layer {layer} came, {receipt.rows_captured} were captured", reason="INCOMPLETE"
            )
        spans = mine
    before, after = ({layer: _joined(of_layer) for layer, of_layer in layers.items()} for layers in parts.values())
    missing = [layer for layer in receipt.captured_layers if layer not in (after or before)]
    if missing:
        raise EngineFailed(f"no rows of layers {missing} came", reason="INCOMPLETE")
    return CapturedRows(before=before, after=after, spans=spans or (), labels=labels)


def _joined(blocks: list[CaptureBlock]) -> HiddenArray:
    return blocks[0].hidden if len(blocks) == 1 else np.concatenate([block.hidden for block in blocks])


def _begin(result: Generation, started: Started) -> None:
    result.request_id = started.request_id
    result.prompt_token_ids = started.prompt_token_ids
    result.sampling = started.sampling
    result.message_boundaries = started.message_boundaries
    result.capture_delivery = started.capture_delivery
    result.shared_memory_fallback = started.shared_memory_fallback
    result.outputs = [Output() for _ in range(started.sampling.n or 1)]


def handle_of(generation: Generation, output: Output) -> CaptureHandle:
    """The handle of one output's captures, held or here."""
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
        message_boundaries=generation.message_boundaries or None,
    )
