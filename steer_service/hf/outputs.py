"""One output of a request on its way through a batch: its tokens, its rows, and the events that follow from them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CapturedRows, CaptureSite
from steer_service.core.events import Event, FinishReason, PromptLogprobs, TokenDelta
from steer_service.core.layer_change import CHANGE_COLUMNS, LayerChange, layer_change
from steer_service.core.spans import count_rows, mask_of
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.hf.programs import RowWork, TorchProgram
from steer_service.hf.sampling import TokenChooser, token_logprobs
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.output_events import OutputEvents, RowMask, completed
from steer_service.runtime.output_text import OutputText
from steer_service.runtime.prepare import PreparedRequest
from steer_service.runtime.token_texts import TokenTexts


@dataclass(slots=True, kw_only=True, eq=False)
class BatchRequest:
    """A request in a batch."""

    prepared: PreparedRequest
    """The request."""
    emit: Callable[[Event | BaseException], None]
    """Takes events and, at the end, an error if there was one."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are not to be generated."""
    outputs: "list[OutputRun]" = field(default_factory=list)
    """Its outputs, once it runs."""
    is_over: bool = False
    """It is complete, it failed, or its caller went away."""

    @property
    def scores_prompt(self) -> bool:
        """True if the log-probabilities of its prompt were requested."""
        return self.prepared.options.prompt_logprobs is not None

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, unless it is over."""
        if not self.is_over:
            self.is_over = True
            self.emit(error)

    def complete_if_over(self) -> None:
        """Emits Completed, once, when all outputs are over."""
        if not self.is_over and all(output.is_over for output in self.outputs):
            self.is_over = True
            self.emit(completed(self.prepared, [output.events for output in self.outputs]))


class OutputRun:
    """One output of a request."""

    def __init__(
        self,
        request: BatchRequest,
        index: int,
        program: TorchProgram | None,
        texts: TokenTexts,
        eos: frozenset[int],
        info: ModelInfo,
    ) -> None:
        prepared, capture = request.prepared, request.prepared.capture
        self.request = request
        self.work = RowWork(
            program=program,
            steered=prepared.rows.steered if program is not None else (),
            scopes=prepared.rows.scopes,
            capture=capture,
            captured=prepared.rows.captured,
            dtype=getattr(torch, (capture.dtype if capture is not None else None) or info.dtype),
            hidden_size=info.hidden_size,
        )
        """How its rows are steered and captured."""
        self.events = OutputEvents(prepared, index, info, WorkedRows(self.work))
        """The events that follow from its tokens and rows."""
        self._index = index
        self._eos = frozenset() if prepared.options.ignore_eos else eos
        ends = self._eos | frozenset(prepared.options.stop_token_ids)
        self._chooser = TokenChooser(prepared, index, ends, request.bad_words, texts)
        self._texts = texts
        self._text = OutputText(texts, prepared.prompt.token_ids, prepared.options)
        self._finished = False

    @property
    def generated(self) -> list[int]:
        """Tokens so far."""
        return self.events.token_ids

    @property
    def is_over(self) -> bool:
        """True if no token is to be generated any more."""
        return self._finished or self.request.is_over

    @property
    def next_tokens(self) -> tuple[int, ...]:
        """The tokens to feed to the model next: the prompt, and then each generated token."""
        return (self.generated[-1],) if self.generated else self.request.prepared.prompt.token_ids

    def score_prompt(self, logits_TV: torch.Tensor) -> None:
        """Emits the log-probabilities of the prompt, if they were requested and this is the first output.

        `logits_TV` are those of a sequence that ends with the prompt; there may be padding before it.
        """
        prompt, top = self.request.prepared.prompt.token_ids, self.request.prepared.options.prompt_logprobs
        if top is None or self._index or len(prompt) == 1:
            return
        scores = tuple(token_logprobs(logits_TV[-len(prompt) : -1], prompt[1:], top, self._texts))
        self.request.emit(PromptLogprobs(first_position=1, logprobs=scores))

    def step(self, logits_V: torch.Tensor) -> None:
        """Chooses a token from the logits after the last of `next_tokens` (float32, on the CPU) and emits events."""
        self.work.done += len(self.next_tokens)
        if self.request.prepared.options.is_rows_only:
            self.events.has_prompt_rows = True
            self._emit_all(self.events.finish(FinishReason.LENGTH, None))
            self._finished = True
            return
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
        self._emit_all(self.events.after_tokens())
        if reason is not None:
            self._emit_all(self.events.finish(reason, stop))
            self._finished = True

    def end_if_over_budget(self) -> None:
        """Ends the output, with the tokens that it has, once the time budget of its request is over."""
        if self.is_over or not self.request.prepared.budget.is_over:
            return
        text = self._text.add([], is_over=True).text
        if text:
            self.request.emit(TokenDelta(output_index=self._index, text=text, token_ids=()))
        reason = FinishReason.TIME_BUDGET if self._text.stop is None else FinishReason.STOP
        self._emit_all(self.events.finish(reason, self._text.stop))
        self._finished = True

    def _end_at(self, token: int) -> tuple[FinishReason | None, str | int | None, str]:
        """The finish reason if the output ends with this token, what stopped it, and the text that the token adds."""
        options, count = self.request.prepared.options, len(self.generated)
        assert options.min_tokens is not None
        is_full = count == options.max_tokens
        is_stop_token = count >= options.min_tokens and (token in self._eos or token in options.stop_token_ids)
        text = self._text.add([token], is_over=is_stop_token or is_full, ends_with_stop=is_stop_token).text
        if is_stop_token:
            return FinishReason.STOP, None if token in self._eos else token, text
        if self._text.stop is not None:
            return FinishReason.STOP, self._text.stop, text
        return FinishReason.LENGTH if is_full else None, None, text

    def _emit_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.request.emit(event)


class WorkedRows:
    """`runtime.output_events.OutputRows` of an output in a batch."""

    bytes_reserved = 0

    def __init__(self, work: RowWork) -> None:
        self.steered_layers = tuple(work.program.layers) if work.program is not None else ()
        self._work = work

    def is_steered(self, rows: int) -> RowMask:
        """The rows to steer, if every layer of the program steered as many; none otherwise."""
        expected = count_rows(self._work.steered, self._work.done)
        is_done = all(self._work.steered_at.get(layer, 0) == expected for layer in self.steered_layers)
        return mask_of(self._work.steered, rows) if is_done else np.zeros(rows, np.bool_)

    def is_reused(self, rows: int) -> RowMask:
        """No row: each request computes its own."""
        return np.zeros(rows, np.bool_)

    def is_captured(self, rows: int) -> RowMask:
        """The rows to capture that went through the model."""
        return mask_of(self._work.captured, min(rows, self._work.done))

    def reused_count(self, rows: int) -> int:
        """0."""
        return 0

    def changes(self, rows: int) -> tuple[LayerChange, ...]:
        """How much each layer changed the rows that went through the model, which are `rows`."""
        parts = {layer: self._work.changes.get(layer, []) for layer in self.steered_layers}
        nothing = np.empty((0, CHANGE_COLUMNS), np.float32)
        return tuple(layer_change(layer, np.concatenate([nothing, *part])) for layer, part in parts.items())

    def read(self, layer: int, site: CaptureSite, first: int, end: int) -> npt.NDArray[Any]:
        """The rows that were captured since the last call."""
        rows = _as_numpy(self._work.take(layer, site))
        assert len(rows) == end - first, "rows are read in order, each once"
        return rows

    def store(self, metadata: CaptureMetadata, pooled: CapturedRows | None) -> LocalCapture:
        """All captured rows, or the pooled ones, in this process's memory."""
        if pooled is not None:
            return LocalCapture(metadata, pooled)
        before, after = (
            {
                layer: _as_numpy(self._work.take(layer, site))
                for layer in (metadata.layers if site in metadata.sites else ())
            }
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        return LocalCapture(metadata, CapturedRows(before=before, after=after, spans=metadata.spans))


def _as_numpy(rows_TD: torch.Tensor) -> npt.NDArray[Any]:
    if rows_TD.dtype == torch.bfloat16:
        return rows_TD.view(torch.int16).numpy().view(dtype_from_name("bfloat16"))
    return rows_TD.numpy()
