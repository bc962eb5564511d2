"""The caller's check that a response matches its request, event by event.

It notices a response that was not steered or not captured as requested, whatever the cause: backend, proxy or network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from steer_service.core.arrays import name_of_dtype
from steer_service.core.capture import CaptureDelivery, CaptureSite, Pooling, RowLabels
from steer_service.core.errors import EngineFailed, InvalidRequest, Unsupported
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Event,
    FinishReason,
    OutputFinished,
    PromptLogprobs,
    Receipt,
    Started,
    TokenDelta,
)
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection, rows_at_most, rows_fed
from steer_service.core.spans import NOWHERE, OPEN_END, Span, Spans, clipped, count_rows, mask_of, united


@dataclass(slots=True)
class _Output:
    """What was received of one output."""

    token_ids: list[int]
    """Prompt and generated token ids."""
    labels: list[RowLabels] = field(default_factory=list)
    """Labels of captured rows, in parts."""
    spans: dict[tuple[int, CaptureSite], list[Span]] = field(default_factory=dict)
    """(layer, site) -> positions of its rows."""
    captured_bytes: int = 0
    """Bytes of all rows."""


class ResponseValidator:
    """Checks every event of one response; raises EngineFailed at an event that contradicts the request."""

    def __init__(self, request: GenerateRequest, special_token_ids: tuple[int, ...] = ()) -> None:
        """`special_token_ids`: those of the model, for a request whose positions leave them out."""
        self._request = request
        self._special_token_ids = special_token_ids
        self._prompt_token_ids: tuple[int, ...] = ()
        self._steered: Spans = NOWHERE
        self._captured: Spans = NOWHERE
        self._is_rows_only = request.sampling.is_rows_only
        self._is_held = False
        self._scored = 1  # prompt tokens with a log-probability; the first one has none
        self._outputs: dict[int, _Output] = {}

    def check(self, event: Event) -> None:
        """Records `event`; if it ends an output, compares everything that was received of that output."""
        match event:
            case Started():
                self._begin(event)
            case PromptLogprobs():
                self._check_prompt_logprobs(event)
            case TokenDelta():
                self._check_scored(event)
                self._output(event.output_index).token_ids.extend(event.token_ids)
            case CaptureLabels():
                self._output(event.output_index).labels.append(event.labels)
            case CaptureBlock():
                self._check_kind(name_of_dtype(event.hidden.dtype), event.pooling, is_held=False)
                output = self._output(event.output_index)
                self._check_whole(event, output)
                output.spans.setdefault((event.layer, event.site), []).extend(event.spans)
                output.captured_bytes += event.hidden.nbytes
            case CaptureHeld():
                self._check_kind(event.held.metadata.dtype, event.held.metadata.pooling, is_held=True)
                output = self._output(event.output_index)
                for layer in event.held.metadata.layers:
                    for site in event.held.metadata.sites:
                        output.spans.setdefault((layer, site), []).extend(event.held.metadata.spans)
                output.captured_bytes += event.held.metadata.total_bytes
            case OutputFinished():
                self._end(self._output(event.output_index), event)

    def _begin(self, event: Started) -> None:
        self._prompt_token_ids = event.prompt_token_ids
        prompt_tokens = len(event.prompt_token_ids)
        max_tokens = event.sampling.max_tokens
        row_limit = OPEN_END if max_tokens is None else rows_at_most(prompt_tokens, max_tokens)
        try:
            selection = RowSelection.of(self._request, prompt_tokens, row_limit, event.places(self._special_token_ids))
        except (InvalidRequest, Unsupported) as error:
            raise _differs(f"the request was accepted although {error}") from error
        self._steered, self._captured = selection.steered, selection.captured
        self._check_delivery(event)

    def _output(self, index: int) -> _Output:
        return self._outputs.setdefault(index, _Output([*self._prompt_token_ids]))

    def _end(self, output: _Output, event: OutputFinished) -> None:
        receipt = event.receipt
        if self._is_rows_only and (len(output.token_ids) > len(self._prompt_token_ids) or event.stop is not None):
            raise _differs("a token was generated although max_tokens is 0")
        check_receipt(self._request, receipt, self._steered, self._captured)
        if self._request.steering is None and self._request.capture is None:
            return
        prompt_tokens = len(self._prompt_token_ids)
        is_prompt_only = self._is_rows_only and event.reason is FinishReason.LENGTH
        rows = prompt_tokens if is_prompt_only else rows_fed(prompt_tokens, len(output.token_ids) - prompt_tokens)
        if receipt.rows_total != rows:
            raise _differs(f"the receipt counts {receipt.rows_total} rows, {rows} were fed to the model")
        if receipt.bytes_captured != output.captured_bytes:
            raise _incomplete(f"received {output.captured_bytes} bytes, {receipt.bytes_captured} were captured")
        self._check_blocks(output, clipped(self._captured, rows))
        if output.labels:
            self._check_labels(RowLabels.concatenate(output.labels), output.token_ids, rows)

    def _check_prompt_logprobs(self, event: PromptLogprobs) -> None:
        end = event.first_position + len(event.logprobs)
        expected = self._prompt_token_ids[event.first_position : end]
        is_next = event.first_position == self._scored and self._request.sampling.prompt_logprobs is not None
        if not is_next or tuple(entry.token_id for entry in event.logprobs) != expected:
            raise _differs("the log-probabilities of the prompt are not those of its tokens")
        self._scored = end

    def _check_scored(self, event: TokenDelta) -> None:
        is_asked = self._request.sampling.prompt_logprobs is not None
        if is_asked and event.token_ids and self._scored < len(self._prompt_token_ids):
            raise _incomplete(f"received log-probabilities of {self._scored - 1} tokens of the prompt before a token")

    def _check_kind(self, dtype: str, pooling: Pooling, *, is_held: bool) -> None:
        if is_held != self._is_held:
            raise _differs(f"captured rows were delivered {'held' if is_held else 'inline'}")
        capture = self._request.capture
        if capture is None:
            return
        if pooling is not capture.pooling:
            raise _differs(f"captured rows have pooling {pooling.value}, {capture.pooling.value} was requested")
        asked = pooling.dtype_of(capture.dtype)
        if asked not in (None, dtype):
            raise _differs(f"captured rows are {dtype}, {asked} was requested")

    def _check_whole(self, event: CaptureBlock, output: _Output) -> None:
        is_live = self._request.capture is not None and self._request.capture.is_live
        if not is_live and (event.layer, event.site) in output.spans:
            raise _incomplete(
                f"the capture of layer {event.layer} {event.site.value} steering came in pieces, or twice; only a live "
                "capture does"
            )

    def _check_delivery(self, event: Started) -> None:
        if self._request.capture is None or not self._captured:
            return
        asked, came = self._request.capture.delivery, event.capture_delivery
        shared, fallback = CaptureDelivery.SHARED_MEMORY_REQUIRED, event.shared_memory_fallback
        if asked is CaptureDelivery.SHARED_MEMORY_PREFERRED:
            asked = CaptureDelivery.INLINE if fallback is not None else shared
        if came is not asked:
            raise _differs(
                f"captures are delivered as {came and came.value}, {self._request.capture.delivery.value} was requested"
            )
        self._is_held = came is not CaptureDelivery.INLINE

    def _check_blocks(self, output: _Output, expected: Spans) -> None:
        capture = self._request.capture
        sites = capture.site.parts if capture is not None else ()
        asked = {(layer, site) for layer in (capture.layers if capture is not None else ()) for site in sites}
        for layer, site in asked | output.spans.keys():
            came = output.spans.get((layer, site))
            if (layer, site) not in asked or came is None:
                raise _incomplete(
                    f"received {'no ' if came is None else ''}rows of layer {layer} {site.value} steering"
                )
            if united(came) != expected or not _is_ascending(came):
                raise _incomplete(
                    f"received rows of layer {layer} at positions {_listed(came)}, expected {_listed(expected)}"
                )

    def _check_labels(self, labels: RowLabels, token_ids: Sequence[int], rows: int) -> None:
        expected = RowLabels.of(
            clipped(self._captured, rows), token_ids, len(self._prompt_token_ids), mask_of(self._steered, rows)
        )
        if labels != expected:
            raise _differs("the labels of the captured rows are not those of the requested rows")


def check_receipt(request: GenerateRequest, receipt: Receipt, steered: Spans, captured: Spans) -> None:
    """Raises EngineFailed if the receipt of a backend contradicts `request`.

    `steered` and `captured` are the positions of the request's RowSelection.
    """
    steering = request.steering if steered else None
    asked = _Applied(
        digest=steering.digest() if steering is not None else "",
        steered_layers=tuple(steering.active_layers()) if steering is not None else (),
        captured_layers=request.capture.layers if request.capture is not None else (),
        reported_layers=tuple(steering.active_layers()) if steering is not None and steering.report_change else (),
    )
    applied = _Applied(
        receipt.steering_digest,
        receipt.steered_layers,
        receipt.captured_layers,
        tuple(change.layer for change in receipt.changes),
    )
    if applied != asked:
        raise _differs(f"{applied} were applied, {asked} were requested")
    in_scope = count_rows(steered, receipt.rows_total)
    reused = min(in_scope, receipt.rows_from_prefix_cache)  # at most these were steered when they were computed
    if not in_scope - reused <= receipt.rows_steered <= in_scope:
        raise _differs(f"{receipt.rows_steered} rows were steered, of {in_scope} of which {reused} were reused")
    expected = count_rows(captured, receipt.rows_total)
    for change in receipt.changes:
        if not change.capped_positions <= change.positions <= receipt.rows_steered:
            raise _differs(
                f"layer {change.layer} changed {change.positions} rows, and caps {change.capped_positions} of them; "
                f"{receipt.rows_steered} were steered"
            )
    if receipt.rows_captured != expected:
        raise _differs(f"{receipt.rows_captured} rows were captured, {expected} were requested")


@dataclass(frozen=True, slots=True)
class _Applied:
    """What a receipt reports, or should report."""

    digest: str
    steered_layers: tuple[int, ...]
    captured_layers: tuple[int, ...]
    reported_layers: tuple[int, ...]

    def __str__(self) -> str:
        steering = f"{self.digest} at layers {list(self.steered_layers)}" if self.digest else "nothing"
        captures = f"captures of layers {list(self.captured_layers)}"
        reports = f" and reports of layers {list(self.reported_layers)}" if self.reported_layers else ""
        return f"steering {steering} and {captures}{reports}"


def _is_ascending(spans: Sequence[Span]) -> bool:
    return all(before[1] <= after[0] for before, after in pairwise(spans))


def _listed(spans: Sequence[Span], limit: int = 8) -> str:
    words = [f"{first}-{end - 1}" if end - first > 1 else str(first) for first, end in spans[:limit]]
    return ", ".join(words) + (", …" if len(spans) > limit else "") or "none"


def _differs(message: str) -> EngineFailed:
    return EngineFailed(message, reason="RECEIPT_DIFFERS")


def _incomplete(message: str) -> EngineFailed:
    return EngineFailed(message, reason="INCOMPLETE")
