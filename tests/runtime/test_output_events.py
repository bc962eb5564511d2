"""The events of an output follow from its rows, and less than was asked is an error."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steer_service.core.capture import CapturedRows, CaptureSite, CaptureSpec, Pooling
from steer_service.core.errors import EngineFailed
from steer_service.core.events import CaptureBlock, CaptureHeld, CaptureLabels, FinishReason, OutputFinished
from steer_service.core.layer_change import LayerChange
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import EVERYWHERE, Spans, mask_of
from steer_service.core.specs import SteeringSpec
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.output_events import OutputEvents, completed, started
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.testing.fake_backend import FAKE_MODEL

PROMPT = RenderedPrompt(token_ids=(7, 8, 9))
STEERING = SteeringSpec.simple_add(1, np.ones(FAKE_MODEL.hidden_size))


class Rows:
    """Rows that were all steered and captured, but for those that a test takes away."""

    steered_layers = (1,)
    bytes_reserved = 1000

    def __init__(
        self, *, captured: Spans = EVERYWHERE, unsteered: int = -1, uncaptured: int = -1, reused: int = -1
    ) -> None:
        self.captured, self.unsteered, self.uncaptured, self.reused = captured, unsteered, uncaptured, reused
        self.reads: list[tuple[int, CaptureSite, int, int]] = []
        self.summed: list[int] = []

    def is_steered(self, rows: int) -> np.ndarray:
        return np.arange(rows) != self.unsteered

    def is_reused(self, rows: int) -> np.ndarray:
        return np.arange(rows) == self.reused

    def is_captured(self, rows: int) -> np.ndarray:
        return mask_of(self.captured, rows) & (np.arange(rows) != self.uncaptured)

    def reused_count(self, rows: int) -> int:
        return int(self.is_reused(rows).sum())

    def changes(self, rows: int) -> tuple[LayerChange, ...]:
        self.summed.append(rows)
        return (LayerChange(layer=1, positions=rows, largest=0.5, mean=0.25),)

    def read(self, layer: int, site: CaptureSite, first: int, end: int) -> np.ndarray:
        self.reads.append((layer, site, first, end))
        return np.zeros((end - first, FAKE_MODEL.hidden_size), np.float32)

    def store(self, metadata: CaptureMetadata, pooled: CapturedRows | None) -> LocalCapture:
        return LocalCapture(metadata, pooled or CapturedRows(before={}, after={}, spans=metadata.spans))


async def prepared(**fields: Any) -> PreparedRequest:
    async def render(_: GenerateRequest) -> RenderedPrompt:
        return PROMPT

    sampling = SamplingOptions(max_tokens=4)
    return await prepare(GenerateRequest(prompt=TextPrompt(text="pi"), sampling=sampling, **fields), FAKE_MODEL, render)


def kinds(events: list[object]) -> list[type]:
    return [type(event) for event in events]


async def test_labels_come_before_the_rows_of_every_layer_and_site_and_the_receipt_is_last() -> None:
    rows = Rows()
    output = OutputEvents(
        await prepared(capture=CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH)), 0, FAKE_MODEL, rows
    )
    output.token_ids += [20, 21]
    events = list(output.finish(FinishReason.LENGTH, None))
    assert kinds(events) == [CaptureLabels, *[CaptureBlock] * 4, OutputFinished]
    before, after = CaptureSite.BEFORE, CaptureSite.AFTER
    assert rows.reads == [(2, before, 0, 4), (2, after, 0, 4), (0, before, 0, 4), (0, after, 0, 4)]
    assert events[0].labels.token_ids.tolist() == [7, 8, 9, 20]
    receipt = events[-1].receipt
    assert (receipt.rows_captured, receipt.rows_total, receipt.captured_layers) == (4, 4, (2, 0))
    assert receipt.bytes_captured == 4 * 4 * FAKE_MODEL.hidden_size * 4


async def test_a_live_capture_sends_each_row_once_and_nothing_more_at_the_end() -> None:
    rows = Rows()
    output = OutputEvents(await prepared(capture=CaptureSpec(layers=(0,), is_live=True)), 0, FAKE_MODEL, rows)
    output.token_ids.append(20)
    assert kinds(list(output.after_tokens())) == [CaptureLabels, CaptureBlock]
    output.token_ids.append(21)
    assert kinds(list(output.after_tokens())) == [CaptureLabels, CaptureBlock]
    assert kinds(list(output.finish(FinishReason.STOP, 21))) == [OutputFinished]
    assert [(first, end) for _, _, first, end in rows.reads] == [(0, 3), (3, 4)]


async def test_a_capture_without_rows_sends_an_empty_block_of_each_layer() -> None:
    capture = CaptureSpec(layers=(0, 1), positions=5)
    output = OutputEvents(await prepared(capture=capture), 0, FAKE_MODEL, Rows(captured=((5, 6),)))
    output.token_ids.append(20)
    labels, *blocks, finished = output.finish(FinishReason.STOP, None)
    assert len(labels.labels) == 0
    assert [block.hidden.shape for block in blocks] == [(0, FAKE_MODEL.hidden_size)] * 2
    assert finished.receipt.rows_captured == 0


async def test_a_held_capture_is_stored_with_its_metadata() -> None:
    request = await prepared(capture=CaptureSpec(layers=(0,), positions="prompt", delivery="held"))
    output = OutputEvents(request, 0, FAKE_MODEL, Rows(captured=((0, 3),)))
    output.token_ids += [20, 21]
    _, held, _ = output.finish(FinishReason.STOP, None)
    assert isinstance(held, CaptureHeld)
    assert (held.held.metadata.spans, held.held.metadata.sequence_rows) == (((0, 3),), 4)


@pytest.mark.parametrize("is_early", [False, True])
async def test_a_pooled_capture_is_one_row_without_labels_pooled_once(is_early: bool) -> None:
    rows = Rows(captured=((0, 2), (3, 4)))
    capture = CaptureSpec(layers=(2, 0), positions=[0, 1, "generated"], pooling="mean")
    output = OutputEvents(await prepared(capture=capture), 0, FAKE_MODEL, rows)
    output.token_ids += [20, 21]
    if is_early:  # in another thread, for example
        output.summarize()

    *blocks, finished = output.finish(FinishReason.STOP, None)

    assert rows.reads == [(2, CaptureSite.AFTER, 0, 3), (0, CaptureSite.AFTER, 0, 3)]
    assert [(block.layer, block.hidden.shape, block.spans) for block in blocks] == [
        (layer, (1, FAKE_MODEL.hidden_size), ((0, 2), (3, 4))) for layer in (2, 0)
    ]
    assert (finished.receipt.rows_captured, finished.receipt.bytes_captured) == (3, 2 * FAKE_MODEL.hidden_size * 4)


async def test_a_held_pooled_capture_has_the_one_row_and_says_so() -> None:
    request = await prepared(capture=CaptureSpec(layers=(0,), delivery="held", pooling="max"))
    output = OutputEvents(request, 0, FAKE_MODEL, Rows())
    output.token_ids.append(20)

    held, _ = output.finish(FinishReason.STOP, None)

    assert (held.held.metadata.row_count, held.held.metadata.pooling) == (1, Pooling.MAX)
    assert (await held.held.rows()).after[0].shape == (1, FAKE_MODEL.hidden_size)


async def test_labels_can_be_left_out() -> None:
    output = OutputEvents(await prepared(capture=CaptureSpec(layers=(0,))), 0, FAKE_MODEL, Rows(), sends_labels=False)
    output.token_ids.append(20)
    assert kinds(list(output.finish(FinishReason.STOP, None))) == [CaptureBlock, OutputFinished]


async def test_a_row_that_was_neither_steered_nor_reused_fails_the_output() -> None:
    output = OutputEvents(await prepared(steering=STEERING), 0, FAKE_MODEL, Rows(unsteered=1))
    output.token_ids.append(20)
    with pytest.raises(EngineFailed, match="2 of 3 rows were steered or reused") as failed:
        list(output.finish(FinishReason.STOP, None))
    assert failed.value.reason == "STEERING_INCOMPLETE"


async def test_a_reused_row_counts_as_done_and_is_on_the_receipt() -> None:
    output = OutputEvents(await prepared(steering=STEERING), 0, FAKE_MODEL, Rows(unsteered=1, reused=1))
    output.token_ids.append(20)
    [finished] = output.finish(FinishReason.STOP, None)
    receipt = finished.receipt
    assert (receipt.rows_steered, receipt.rows_from_prefix_cache, receipt.rows_total) == (2, 1, 3)
    assert (receipt.steering_digest, receipt.bytes_reserved) == (STEERING.digest(), 1000)


async def test_changes_are_on_the_receipt_only_if_they_were_asked_for() -> None:
    for spec in (STEERING, replace(STEERING, report_change=True)):
        output = OutputEvents(await prepared(steering=spec), 0, FAKE_MODEL, Rows())
        output.token_ids.append(20)
        [finished] = output.finish(FinishReason.STOP, None)
        expected = (LayerChange(layer=1, positions=3, largest=0.5, mean=0.25),) if spec.report_change else ()
        assert finished.receipt.changes == expected


@pytest.mark.parametrize("is_early", [False, True])
async def test_changes_are_summed_up_once(is_early: bool) -> None:
    rows = Rows()
    output = OutputEvents(await prepared(steering=replace(STEERING, report_change=True)), 0, FAKE_MODEL, rows)
    output.token_ids.append(20)
    assert output.has_summaries
    if is_early:  # in another thread, for example
        output.summarize()

    [finished] = output.finish(FinishReason.STOP, None)

    assert rows.summed == [3]
    assert finished.receipt.changes == (LayerChange(layer=1, positions=3, largest=0.5, mean=0.25),)


@pytest.mark.parametrize("is_live", [False, True])
async def test_a_row_that_was_not_captured_fails_the_output(is_live: bool) -> None:
    capture = CaptureSpec(layers=(0,), is_live=is_live)
    output = OutputEvents(await prepared(capture=capture), 0, FAKE_MODEL, Rows(uncaptured=2))
    output.token_ids.append(20)
    with pytest.raises(EngineFailed) as failed:
        list(output.after_tokens() if is_live else output.finish(FinishReason.STOP, None))
    assert failed.value.reason == "CAPTURE_INCOMPLETE"


async def test_a_request_begins_and_ends_with_its_facts() -> None:
    request = await prepared(capture=CaptureSpec(layers=(0,), delivery="shared_memory_preferred"))
    outputs = [OutputEvents(request, index, FAKE_MODEL, Rows()) for index in range(2)]
    outputs[0].token_ids += [20, 21]
    outputs[1].token_ids += [22]
    begin, end = started(request, "r"), completed(request, outputs, cached_tokens=2)
    assert (begin.request_id, begin.prompt_token_ids, begin.sampling.max_tokens) == ("r", PROMPT.token_ids, 4)
    assert begin.capture_delivery is request.delivery
    assert (end.usage.prompt_tokens, end.usage.completion_tokens, end.usage.cached_tokens) == (3, 3, 2)
