"""One output of a request on its way through a batch: its tokens, its rows, and the events they become."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CapturedRows, CaptureSite, RowLabels
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
    TokenDelta,
    Usage,
)
from steer_service.core.positions import Spans, between, clipped, count_rows, mask_of
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.hf.programs import RowWork, TorchProgram
from steer_service.hf.sampling import TokenChooser
from steer_service.hf.text import TextStream
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.prepare import PreparedRequest


@dataclass(slots=True, kw_only=True)
class BatchRequest:
    """A request under way."""

    prepared: PreparedRequest
    """It."""
    emit: Callable[[Event | BaseException], None]
    """Takes events and, at the end, an error if there was one."""
    outputs: "list[OutputRun]" = field(default_factory=list)
    """Its outputs, once it runs."""
    is_over: bool = False
    """It is complete, it failed, or its caller went away."""

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, unless it is over."""
        if not self.is_over:
            self.is_over = True
            self.emit(error)

    def complete_if_over(self) -> None:
        """Sends Completed, once, when all outputs are over."""
        if not self.is_over and all(output.is_over for output in self.outputs):
            self.is_over = True
            tokens = sum(len(output.generated) for output in self.outputs)
            self.emit(
                Completed(usage=Usage(prompt_tokens=len(self.prepared.prompt.token_ids), completion_tokens=tokens))
            )


class OutputRun:
    """One output of a request."""

    def __init__(
        self,
        request: BatchRequest,
        index: int,
        program: TorchProgram | None,
        tokenizer: Any,
        eos: frozenset[int],
        info: ModelInfo,
    ) -> None:
        prepared, capture = request.prepared, request.prepared.capture
        self.request = request
        self.generated: list[int] = []
        """Tokens so far."""
        self.work = RowWork(
            program=program,
            steered=prepared.steered if program is not None else (),
            capture=capture,
            captured=prepared.captured,
            dtype=getattr(torch, (capture.dtype if capture is not None else None) or info.dtype),
        )
        """What happens to its rows."""
        self._index = index
        self._width = info.hidden_size
        self._eos = frozenset() if prepared.options.ignore_eos else eos
        self._chooser = TokenChooser(
            prepared.options, index, prepared.prompt.token_ids, self._eos | frozenset(prepared.options.stop_token_ids)
        )
        self._text = TextStream(tokenizer, prepared.options)
        self._sent = 0
        self._finished = False

    @property
    def is_over(self) -> bool:
        """True if nothing is to be done for it any more."""
        return self._finished or self.request.is_over

    @property
    def next_tokens(self) -> tuple[int, ...]:
        """What is fed to the model next: the prompt, and then each generated token."""
        return (self.generated[-1],) if self.generated else self.request.prepared.prompt.token_ids

    def step(self, logits_V: torch.Tensor) -> None:
        """Its next tokens went through the model, which answered `logits_V` (float32, on the CPU) behind the last."""
        self.work.done += len(self.next_tokens)
        chosen = self._chooser.choose(logits_V, self.generated)
        self.generated.append(chosen.token_id)
        reason, stop, text = self._end_at(chosen.token_id)
        self.request.emit(
            TokenDelta(
                output_index=self._index,
                text=text,
                token_ids=(chosen.token_id,),
                logprobs=(chosen,) if self.request.prepared.options.logprobs is not None else (),
            )
        )
        if self.work.capture is not None and self.work.capture.is_live:
            self._emit_all(self._captures())
        if reason is not None:
            self._emit_all(self._finish(reason, stop))
            self._finished = True

    def _end_at(self, token: int) -> tuple[FinishReason | None, str | int | None, str]:
        """Why the output ends with this token, if it does, what stopped it, and the text that the token adds."""
        options, count = self.request.prepared.options, len(self.generated)
        assert options.min_tokens is not None
        may_stop = count >= options.min_tokens
        is_full = count == options.max_tokens
        is_stop_token = may_stop and (token in self._eos or token in options.stop_token_ids)
        shown = self.generated[:-1] if is_stop_token and not options.include_stop else self.generated
        text = self._text.next(shown, is_last=is_stop_token or is_full, may_stop=may_stop and not is_stop_token)
        if is_stop_token:
            return FinishReason.STOP, None if token in self._eos else token, text
        if self._text.stop is not None:
            return FinishReason.STOP, self._text.stop, text
        return FinishReason.LENGTH if is_full else None, None, text

    def _finish(self, reason: FinishReason, stop: str | int | None) -> Iterator[Event]:
        receipt = self._receipt()
        capture = self.work.capture
        if capture is not None:
            if capture.delivery is CaptureDelivery.INLINE:
                yield from self._captures(at_end=True)
            else:
                yield from self._held()
        yield OutputFinished(output_index=self._index, reason=reason, stop=stop, receipt=receipt)

    def _captures(self, *, at_end: bool = False) -> Iterator[Event]:
        """What was captured and not sent; at the end, if there never was anything, blocks without rows."""
        work = self.work
        assert work.capture is not None
        spans = between(work.captured, self._sent, work.done)
        if not spans and not (at_end and not self._sent):
            return
        self._sent = work.done
        yield CaptureLabels(output_index=self._index, labels=self._labels(spans))
        for layer, site in itertools.product(work.capture.layers, work.capture.site.parts):
            hidden = _as_numpy(work.take(layer, site))
            yield CaptureBlock(output_index=self._index, layer=layer, site=site, spans=spans, hidden=hidden)

    def _held(self) -> Iterator[Event]:
        work = self.work
        assert work.capture is not None
        spans = clipped(work.captured, work.done)
        yield CaptureLabels(output_index=self._index, labels=self._labels(spans))
        before, after = (
            {
                layer: _as_numpy(work.take(layer, site))
                for layer in work.capture.layers
                if site in work.capture.site.parts
            }
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        rows = CapturedRows(before=before, after=after, spans=spans)
        metadata = CaptureMetadata(
            layers=work.capture.layers,
            sites=work.capture.site.parts,
            spans=spans,
            dtype=str(work.dtype).removeprefix("torch."),
            hidden_size=self._width,
            prompt_tokens=len(self.request.prepared.prompt.token_ids),
            sequence_rows=work.done,
        )
        yield CaptureHeld(output_index=self._index, held=LocalCapture(metadata, rows))

    def _labels(self, spans: Spans) -> RowLabels:
        prompt, is_steered = self.request.prepared.prompt.token_ids, mask_of(self.work.steered, self.work.done)
        return RowLabels.of(spans, [*prompt, *self.generated], len(prompt), is_steered)

    def _receipt(self) -> Receipt:
        """What was done; raises EngineFailed if it is less than what was asked."""
        work, steering = self.work, self.request.prepared.steering
        layers = tuple(work.program.layers) if work.program is not None else ()
        steered, captured = count_rows(work.steered, work.done), count_rows(work.captured, work.done)
        if any(work.steered_at.get(layer, 0) != steered for layer in layers):
            raise EngineFailed(f"{work.steered_at} rows were steered, expected {steered}", reason="STEERING_INCOMPLETE")
        itemsize = dtype_from_name(str(work.dtype)).itemsize
        parts = 0 if work.capture is None else len(work.capture.layers) * len(work.capture.site.parts)
        return Receipt(
            steering_digest=steering.digest() if steering is not None and work.program is not None else "",
            steered_layers=layers,
            rows_steered=steered if layers else 0,
            captured_layers=work.capture.layers if work.capture is not None else (),
            rows_captured=captured if work.capture is not None else 0,
            rows_total=work.done,
            bytes_captured=captured * parts * itemsize * self._width,
        )

    def _emit_all(self, events: Iterator[Event]) -> None:
        for event in events:
            self.request.emit(event)


def _as_numpy(rows_TD: torch.Tensor) -> Any:
    if rows_TD.dtype == torch.bfloat16:
        return rows_TD.view(torch.int16).numpy().view(dtype_from_name("bfloat16"))
    return rows_TD.numpy()
