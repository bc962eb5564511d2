"""The events of a request, in one place for every backend: engine, transformers and the fake of the tests.

A backend yields `started`, then the TokenDeltas of its outputs, then `completed`. Each output has an OutputEvents with
the events that follow a token (`after_tokens`) and the last token (`finish`): labels, captured rows and receipt.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import dtype_from_name
from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, CapturedRows, CaptureSite, Pooling, RowLabels
from steer_service.core.errors import EngineFailed
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    FinishReason,
    OutputFinished,
    Receipt,
    Started,
    Usage,
)
from steer_service.core.layer_change import LayerChange
from steer_service.core.row_selection import CapturedPart
from steer_service.core.spans import positions_of
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.pooling import pooled
from steer_service.runtime.prepare import PreparedRequest

CaptureEvent = CaptureLabels | CaptureBlock | CaptureHeld
RowMask = npt.NDArray[np.bool_]


class OutputRows(Protocol):
    """The rows of one output, as its backend marked and stored them. Masks have at least one element per row."""

    steered_layers: tuple[int, ...]
    """Layers at which the program ran."""

    @property
    def bytes_reserved(self) -> int:
        """Bytes of memory that were reserved for the output."""

    def is_steered(self, rows: int) -> RowMask:
        """Which of the first `rows` rows were steered."""

    def is_reused(self, rows: int) -> RowMask:
        """Which of the first `rows` rows came from the prefix cache."""

    def is_captured(self, rows: int) -> RowMask:
        """Which of the first `rows` rows were captured."""

    def reused_count(self, rows: int) -> int:
        """The number of the first `rows` rows that came from the prefix cache."""

    def changes(self, rows: int) -> tuple[LayerChange, ...]:
        """How much each of `steered_layers` changed the first `rows` rows, for a spec with `report_change`."""

    def read(self, layer: int, site: CaptureSite, first: int, end: int) -> npt.NDArray[Any]:
        """Captured rows number `first` to `end - 1`, shape [end - first, hidden_size]. Each row is read once."""

    def store(self, metadata: CaptureMetadata, pooled: CapturedRows | None) -> LocalCapture:
        """All captured rows, or in place of them the `pooled` ones; the caller releases them."""


class OutputEvents:
    """The events of one output that follow from its rows."""

    def __init__(
        self,
        prepared: PreparedRequest,
        index: int,
        model: ModelInfo,
        rows: OutputRows,
        *,
        sends_labels: bool = True,
    ) -> None:
        self.token_ids: list[int] = []
        """The generated tokens. The backend adds new tokens before it calls `after_tokens` or `finish`."""
        self.has_prompt_rows = False
        """True once the prompt is computed, set by the backend if nothing is to be generated (max_tokens=0)."""
        self._prepared = prepared
        self._index = index
        self.is_live = prepared.capture is not None and prepared.capture.is_live
        """True if rows are emitted after each token and not after the last alone."""
        self._pooling = prepared.capture.pooling if prepared.capture is not None else Pooling.NONE
        recorded = (prepared.capture.dtype if prepared.capture is not None else None) or model.dtype
        self._dtype = self._pooling.dtype_of(recorded)
        self._pooled: CapturedRows | None = None
        self._changes: tuple[LayerChange, ...] | None = None
        self._hidden_size = model.hidden_size
        self._rows = rows
        self._sends_labels = sends_labels
        self._emitted = 0  # rows whose captures were emitted

    @property
    def row_count(self) -> int:
        """Rows fed to the model so far."""
        return self._prepared.rows.rows_after(len(self.token_ids) or int(self.has_prompt_rows))

    @property
    def has_summaries(self) -> bool:
        """True if `finish` goes over all rows, unless `summarize` did before."""
        return self._is_pooled or self._reports_changes

    def summarize(self) -> None:
        """Pools captured rows and sums up what changed, after the output's last token; may be called in any thread."""
        if self._is_pooled:
            self._pool()
        if self._reports_changes:
            self._changes = self._rows.changes(self.row_count)

    @property
    def _is_pooled(self) -> bool:
        return self._pooling is not Pooling.NONE

    @property
    def _reports_changes(self) -> bool:
        return self._prepared.steering is not None and self._prepared.steering.report_change

    def _pool(self) -> None:
        capture = self._prepared.capture
        assert capture is not None
        part = self._prepared.rows.captured_part(0, self.row_count)
        before, after = (
            {
                layer: pooled(self._rows.read(layer, site, part.first, part.end), self._pooling)
                for layer in capture.layers
            }
            if site in capture.site.parts
            else {}
            for site in (CaptureSite.BEFORE, CaptureSite.AFTER)
        )
        self._pooled = CapturedRows(before=before, after=after, spans=part.spans, pooling=self._pooling)

    def after_tokens(self) -> Iterator[CaptureEvent]:
        """Yields the rows of a live capture that were computed since the last call.

        Raises EngineFailed if one of them was not captured.
        """
        if not self.is_live:
            return
        part = self._prepared.rows.captured_part(self._emitted, self.row_count)
        if part.spans:
            if not self._rows.is_captured(self.row_count)[positions_of(part.spans)].all():
                raise EngineFailed("a row was not captured before its token arrived", reason="CAPTURE_INCOMPLETE")
            yield from self._inline(part)

    def finish(self, reason: FinishReason, stop: str | int | None) -> Iterator[CaptureEvent | OutputFinished]:
        """Yields the remaining captured rows, then the end.

        Raises EngineFailed if rows were not steered or captured as requested.
        """
        receipt = self._receipt(self.row_count)
        capture = self._prepared.capture
        if capture is not None:
            part = self._prepared.rows.captured_part(self._emitted, self.row_count)
            if self._is_pooled and self._pooled is None:
                self._pool()
            if capture.delivery is not CaptureDelivery.INLINE:
                yield from self._stored(part)
            elif part.spans or not self._emitted:  # without a row: one empty block per layer and site
                yield from self._inline(part)
        yield OutputFinished(output_index=self._index, reason=reason, stop=stop, receipt=receipt)

    def _inline(self, part: CapturedPart) -> Iterator[CaptureEvent]:
        capture = self._prepared.capture
        assert capture is not None
        self._emitted = self.row_count
        yield from self._labels(part)
        for layer, site in itertools.product(capture.layers, capture.site.parts):
            if self._pooled is None:
                hidden = self._rows.read(layer, site, part.first, part.end)
            else:
                hidden = (self._pooled.before if site is CaptureSite.BEFORE else self._pooled.after)[layer]
            yield CaptureBlock(
                output_index=self._index,
                layer=layer,
                site=site,
                spans=part.spans,
                hidden=hidden,
                pooling=self._pooling,
            )

    def _stored(self, part: CapturedPart) -> Iterator[CaptureEvent]:
        capture = self._prepared.capture
        assert capture is not None
        yield from self._labels(part)
        metadata = CaptureMetadata(
            layers=capture.layers,
            sites=capture.site.parts,
            spans=part.spans,
            dtype=self._dtype,
            hidden_size=self._hidden_size,
            prompt_tokens=self._prepared.rows.prompt_tokens,
            sequence_rows=self.row_count,
            pooling=self._pooling,
        )
        yield CaptureHeld(output_index=self._index, held=self._rows.store(metadata, self._pooled))

    def _labels(self, part: CapturedPart) -> Iterator[CaptureLabels]:
        if self._sends_labels and not self._is_pooled:
            prompt, is_steered = self._prepared.prompt.token_ids, self._rows.is_steered(self.row_count)
            labels = RowLabels.of(part.spans, [*prompt, *self.token_ids], len(prompt), is_steered)
            yield CaptureLabels(output_index=self._index, labels=labels)

    def _receipt(self, rows: int) -> Receipt:
        selection, capture, steering = self._prepared.rows, self._prepared.capture, self._prepared.steering
        captured = int(self._rows.is_captured(rows)[:rows].sum()) if capture is not None else 0
        to_capture = selection.captured_part(0, rows).end
        if captured != to_capture:
            raise EngineFailed(f"{captured} of {to_capture} rows were captured", reason="CAPTURE_INCOMPLETE")
        row_bytes = self._hidden_size * dtype_from_name(self._dtype).itemsize
        parts = len(capture.layers) * len(capture.site.parts) if capture is not None else 0
        return Receipt(
            steering_digest=steering.digest() if steering is not None else "",
            steered_layers=self._rows.steered_layers,
            rows_steered=self._steered_count(rows) if steering is not None else 0,
            captured_layers=capture.layers if capture is not None else (),
            rows_captured=captured,
            rows_from_prefix_cache=self._rows.reused_count(rows),
            rows_total=rows,
            bytes_reserved=self._rows.bytes_reserved,
            bytes_captured=self._pooling.row_count(captured) * parts * row_bytes,
            changes=self._summed_changes(rows),
        )

    def _summed_changes(self, rows: int) -> tuple[LayerChange, ...]:
        if self._changes is not None or not self._reports_changes:
            return self._changes or ()
        return self._rows.changes(rows)

    def _steered_count(self, rows: int) -> int:
        """The number of steered rows; raises EngineFailed if a row to steer was neither steered nor reused."""
        is_steered = self._rows.is_steered(rows)
        is_done = (is_steered | self._rows.is_reused(rows))[self._prepared.rows.steered_positions(rows)]
        if not is_done.all():
            raise EngineFailed(
                f"{is_done.sum()} of {len(is_done)} rows were steered or reused", reason="STEERING_INCOMPLETE"
            )
        return int(is_steered[:rows].sum())


def started(prepared: PreparedRequest, request_id: str) -> Started:
    """Makes the first event of a request."""
    return Started(
        request_id=request_id,
        prompt_token_ids=prepared.prompt.token_ids,
        sampling=prepared.options,
        message_boundaries=prepared.prompt.message_boundaries,
        boundaries_missing_reason=prepared.prompt.boundaries_missing_reason,
        capture_delivery=prepared.delivery,
        generation_config=prepared.defaults.source,
    )


def completed(prepared: PreparedRequest, outputs: Iterable[OutputEvents], cached_tokens: int = 0) -> Completed:
    """Makes the last event of a request. `cached_tokens`: prompt tokens of the first output from the prefix cache."""
    generated = sum(len(output.token_ids) for output in outputs)
    prompt_tokens = prepared.rows.prompt_tokens
    return Completed(usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=generated, cached_tokens=cached_tokens))
