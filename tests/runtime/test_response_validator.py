"""An answer that is not what was asked for is noticed, whatever is wrong with it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_service.core.capture import (
    CaptureDelivery,
    CapturedRows,
    CaptureSite,
    CaptureSpec,
    RowLabels,
    SharedMemoryFallback,
)
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Event,
    OutputFinished,
    PromptLogprobs,
    Started,
    TokenDelta,
)
from steer_service.core.layer_change import LayerChange
from steer_service.core.positions import PositionRange, PositionScope
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.local_capture import LocalCapture, metadata_of
from steer_service.runtime.response_validator import ResponseValidator
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.wire import strategies

REQUEST = GenerateRequest(
    prompt=TokenPrompt(token_ids=(5, 6, 7, 8)),
    sampling=SamplingOptions(max_tokens=5),
    steering=replace(SteeringSpec.simple_add(1, np.ones(8), positions=[1, "generated"]), report_change=True),
    capture=CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH, positions=[0, -1, PositionRange(5)], dtype="float32"),
)
"""Eight rows: 1 and 4..7 are steered, 0, 3 and 5..7 captured."""

MODEL = replace(FAKE_MODEL, special_token_ids=(6,))
"""The token at position 1 is special."""


async def answer_to(request: GenerateRequest) -> list[Event]:
    return [event async for event in FakeBackend(MODEL).submit(request)]


def check(request: GenerateRequest, events: list[Event]) -> None:
    seen = ResponseValidator(request, MODEL.special_token_ids)
    for event in events:
        seen.check(event)


async def is_answered_or_refused(request: GenerateRequest, *fields: str) -> None:
    refused: InvalidRequest | None = None
    try:
        check(request, await answer_to(request))
    except InvalidRequest as error:
        refused = error
    assert refused is None or refused.field.startswith(fields)


numbers_of_tokens = st.integers(0, 6)
words = st.sampled_from(
    [None, "prompt", "generated", 0, -1, [0, -1], PositionRange(1), PositionRange(-2), [0, 3, "generated"]]
)


@settings(max_examples=60)
@given(
    st.integers(1, 12),
    numbers_of_tokens,
    words,
    words,
    st.sampled_from(CaptureSite),
    st.integers(1, 3),
    strategies.deliveries,
)
async def test_an_honest_answer_passes(
    prompt: int,
    tokens: int,
    steered: Any,
    captured: Any,
    site: CaptureSite,
    n: int,
    delivery: tuple[CaptureDelivery, bool],
) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=tuple(range(prompt))),
        sampling=SamplingOptions(max_tokens=tokens, n=n),
        steering=SteeringSpec.simple_add(1, np.ones(8), positions=steered),
        capture=CaptureSpec(layers=(3, 1), site=site, positions=captured, delivery=delivery[0], is_live=delivery[1]),
    )
    await is_answered_or_refused(request, "steering.positions.", "capture.positions.")


@given(strategies.scopes)
async def test_any_scope_is_answered_in_full_or_refused_by_its_field(scope: PositionScope) -> None:
    request = replace(REQUEST, steering=None, capture=replace(REQUEST.capture, positions=scope))
    await is_answered_or_refused(request, "capture.positions.")


Change = Callable[[list[Event]], None]


def altered(kind: type[Event], change: Callable[[Any], Event | None], which: int = 0) -> Change:
    """A change of one event of a kind; None takes it away."""

    def apply(events: list[Event]) -> None:
        index = [number for number, event in enumerate(events) if isinstance(event, kind)][which]
        changed = change(events[index])
        events[index : index + 1] = [] if changed is None else [changed]

    return apply


def receipt(**fields: Any) -> Change:
    return altered(OutputFinished, lambda event: replace(event, receipt=replace(event.receipt, **fields)))


def begin(**fields: Any) -> Change:
    return altered(Started, lambda event: replace(event, **fields))


def block(which: int = 0, **fields: Any) -> Change:
    return altered(CaptureBlock, lambda event: replace(event, **fields), which)


def labels(**fields: Any) -> Change:
    return altered(CaptureLabels, lambda event: replace(event, labels=_relabelled(event.labels, **fields)))


def _relabelled(given_labels: RowLabels, **fields: Any) -> RowLabels:
    names = ("positions", "token_ids", "is_generated", "is_steered")
    return RowLabels(**{name: getattr(given_labels, name) for name in names} | fields)


LIES = {
    "nothing was steered": receipt(steering_digest="", steered_layers=(), rows_steered=0),
    "other rows were steered": receipt(steering_digest=SteeringSpec.simple_add(1, np.ones(8)).digest()),
    "another layer was steered": receipt(steered_layers=(2,)),
    "a row was not steered": receipt(rows_steered=4),
    "rows beyond the scope were steered": receipt(rows_steered=8),
    "a layer was not captured": receipt(captured_layers=(2,)),
    "layers are in another order": receipt(captured_layers=(0, 2)),
    "a row was not captured": receipt(rows_captured=4),
    "rows beyond the scope were captured": receipt(rows_captured=8),
    "a row is missing from the total": receipt(rows_total=7),
    "a report is missing": receipt(changes=()),
    "another layer was reported": receipt(changes=(LayerChange(layer=2, positions=5),)),
    "more rows were changed than steered": receipt(changes=(LayerChange(layer=1, positions=6),)),
    "more rows were capped than changed": receipt(changes=(LayerChange(layer=1, positions=4, capped_positions=5),)),
    "fewer bytes were captured than came": receipt(bytes_captured=1),
    "captures are said to be held": begin(capture_delivery=CaptureDelivery.HELD),
    "captures are said to lie in shared memory": begin(capture_delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED),
    "nothing is said of the delivery": begin(capture_delivery=None),
    "a block did not come": altered(CaptureBlock, lambda _: None),
    "a block came twice": altered(CaptureBlock, lambda event: event, -1),
    "a block is of a layer that was not asked for": block(layer=3),
    "a block is of the other site": block(site=CaptureSite.AFTER),
    "a block has other positions": block(spans=((0, 1), (2, 3), (5, 8))),
    "a block has too few positions": block(spans=((0, 1), (5, 8))),
    "a block has all positions": block(spans=((0, 8),)),
    "a block has another element type": block(hidden=np.zeros((5, 8), np.float16)),
    "labels name other positions": labels(positions=[0, 2, 5, 6, 7]),
    "labels name another token": labels(token_ids=[5, 8, 1, 2, 3]),
    "labels call a prompt row generated": labels(is_generated=[False, True, True, True, True]),
    "labels call a steered row unsteered": labels(is_steered=[False, False, False, True, True]),
    "labels call an unsteered row steered": labels(is_steered=[True] * 5),
    "labels are too few": altered(CaptureLabels, lambda event: replace(event, labels=event.labels[:4])),
    "a token did not come": altered(TokenDelta, lambda _: None),
    "the prompt was another": altered(Started, lambda event: replace(event, prompt_token_ids=(5, 6, 7))),
    "the prompt was too short for what was asked": altered(
        Started, lambda event: replace(event, prompt_token_ids=(), sampling=SamplingOptions(max_tokens=1))
    ),
}


@pytest.mark.parametrize("name", LIES)
async def test_an_answer_to_something_else_is_noticed(name: str) -> None:
    events = await answer_to(REQUEST)
    check(REQUEST, events)

    LIES[name](events)
    if name == "a block came twice":
        index = next(number for number, event in enumerate(events) if isinstance(event, CaptureBlock))
        events.insert(index, events[index])

    with pytest.raises(EngineFailed) as raised:
        check(REQUEST, events)
    assert raised.value.reason in ("RECEIPT_DIFFERS", "INCOMPLETE")


async def test_a_capture_in_pieces_is_taken_only_if_it_is_live() -> None:
    events = await answer_to(REQUEST)
    index = next(number for number, event in enumerate(events) if isinstance(event, CaptureBlock))
    whole = events[index]
    assert isinstance(whole, CaptureBlock)
    pieces = [
        replace(whole, spans=((0, 1), (3, 4)), hidden=whole.hidden[:2]),
        replace(whole, spans=((5, 8),), hidden=whole.hidden[2:]),
    ]
    in_pieces = [*events[:index], *pieces, *events[index + 1 :]]

    check(replace(REQUEST, capture=replace(REQUEST.capture, is_live=True)), in_pieces)
    with pytest.raises(EngineFailed, match="layer 2 before steering came in pieces") as raised:
        check(REQUEST, in_pieces)
    assert raised.value.reason == "INCOMPLETE"


@pytest.mark.parametrize("prompt", [1, 30])
async def test_the_fake_sends_one_capture_for_each_output_layer_and_site(prompt: int) -> None:
    request = replace(
        REQUEST,
        prompt=TokenPrompt(token_ids=(1,) * prompt),
        sampling=SamplingOptions(max_tokens=3, n=2),
        capture=CaptureSpec(layers=(2, 0), site=CaptureSite.BOTH),
        steering=None,
    )

    came = [
        (event.output_index, event.layer, event.site)
        for event in await answer_to(request)
        if isinstance(event, CaptureBlock)
    ]

    assert sorted(came, key=str) == sorted(
        itertools.product(range(2), (0, 2), (CaptureSite.BEFORE, CaptureSite.AFTER)), key=str
    )


async def test_rows_reused_from_the_prefix_cache_need_not_be_steered_again() -> None:
    events = await answer_to(replace(REQUEST, capture=None))
    request = replace(REQUEST, capture=None)

    receipt(rows_steered=4, rows_from_prefix_cache=3, changes=(LayerChange(layer=1, positions=3),))(events)
    check(request, events)
    receipt(rows_steered=4, rows_from_prefix_cache=1)(events)  # not the first row: a resumed request may find more
    check(request, events)
    receipt(rows_steered=3, rows_from_prefix_cache=1)(events)
    with pytest.raises(EngineFailed, match="3 rows were steered, of 5"):
        check(request, events)


async def test_labels_may_come_in_parts_or_not_at_all() -> None:
    events = await answer_to(REQUEST)
    index = next(number for number, event in enumerate(events) if isinstance(event, CaptureLabels))
    whole = events[index]
    assert isinstance(whole, CaptureLabels)

    parts = [replace(whole, labels=whole.labels[:2]), replace(whole, labels=whole.labels[2:])]
    check(REQUEST, [*events[:index], *parts, *events[index + 1 :]])
    check(REQUEST, [*events[:index], *events[index + 1 :]])


HELD = replace(REQUEST, capture=replace(REQUEST.capture, delivery=CaptureDelivery.HELD))


def held(**fields: Any) -> Change:
    """The held rows are others."""

    def change(event: CaptureHeld) -> CaptureHeld:
        assert isinstance(event.held, LocalCapture)
        captured = event.held.captured
        given = {"before": captured.before, "after": captured.after, "spans": captured.spans}
        other = CapturedRows(**{**given, **fields})
        return replace(
            event, held=LocalCapture(metadata_of(other, tuple(other.hidden), prompt_tokens=4, sequence_rows=5), other)
        )

    return altered(CaptureHeld, change)


def rows(layers: tuple[int, ...], count: int = 5, dtype: Any = np.float32) -> dict[int, Any]:
    return {layer: np.zeros((count, 8), dtype) for layer in layers}


HELD_LIES = {
    "nothing is held": altered(CaptureHeld, lambda _: None),
    "a layer is missing": held(before=rows((2,)), after=rows((2,))),
    "another layer is held": held(before=rows((2, 0, 1)), after=rows((2, 0, 1))),
    "a site is missing": held(before={}),
    "rows are at other positions": held(spans=((0, 1), (2, 3), (5, 8))),
    "rows are missing": held(before=rows((2, 0), 4), after=rows((2, 0), 4), spans=((0, 1), (5, 8))),
    "rows have another element type": held(before=rows((2, 0), dtype=np.float16), after=rows((2, 0), dtype=np.float16)),
    "rows are said to come inline": begin(capture_delivery=CaptureDelivery.INLINE),
    "rows are said to lie in shared memory": begin(capture_delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED),
    "other bytes are said to be captured": receipt(bytes_captured=1),
    "a row was not captured": receipt(rows_captured=4),
    "labels name other positions": labels(positions=[0, 2, 5, 6, 7]),
}


@pytest.mark.parametrize("name", HELD_LIES)
async def test_held_rows_that_are_not_those_asked_for_are_noticed(name: str) -> None:
    events = await answer_to(HELD)
    check(HELD, events)

    HELD_LIES[name](events)

    with pytest.raises(EngineFailed) as raised:
        check(HELD, events)
    assert raised.value.reason in ("RECEIPT_DIFFERS", "INCOMPLETE")


async def test_rows_that_were_to_be_held_and_came_with_the_answer_are_noticed() -> None:
    events = await answer_to(REQUEST)
    begin(capture_delivery=CaptureDelivery.HELD)(events)
    with pytest.raises(EngineFailed, match="captured rows were delivered inline"):
        check(HELD, events)


async def test_held_rows_that_come_twice_are_noticed() -> None:
    events = await answer_to(HELD)
    index = next(number for number, event in enumerate(events) if isinstance(event, CaptureHeld))
    with pytest.raises(EngineFailed) as raised:
        check(HELD, [*events[:index], events[index], *events[index:]])
    assert raised.value.reason == "INCOMPLETE"


async def test_shared_memory_may_be_preferred_in_vain_but_not_required() -> None:
    events = await answer_to(REQUEST)
    for delivery in (CaptureDelivery.SHARED_MEMORY_PREFERRED, CaptureDelivery.SHARED_MEMORY_REQUIRED):
        asked = replace(REQUEST, capture=replace(REQUEST.capture, delivery=delivery))
        with pytest.raises(EngineFailed, match=f"captures are delivered as inline, {delivery.value} was requested"):
            check(asked, events)  # without a reason
        begin(shared_memory_fallback=SharedMemoryFallback.NO_SESSION)(events)
        if delivery is CaptureDelivery.SHARED_MEMORY_PREFERRED:
            check(asked, events)
        else:
            with pytest.raises(EngineFailed, match="captures are delivered as inline"):
                check(asked, events)
        begin(shared_memory_fallback=None)(events)


SCORED = replace(REQUEST, steering=None, capture=None, sampling=SamplingOptions(max_tokens=2, prompt_logprobs=1))


async def test_scores_of_the_prompt_are_accepted_whole_or_in_parts() -> None:
    started, scores, *rest = await answer_to(SCORED)
    assert isinstance(scores, PromptLogprobs)
    parts = [
        replace(scores, logprobs=scores.logprobs[:2]),
        replace(scores, first_position=3, logprobs=scores.logprobs[2:]),
    ]

    check(SCORED, [started, scores, *rest])
    check(SCORED, [started, *parts, *rest])


WRONG_SCORES: dict[str, Callable[[PromptLogprobs], list[PromptLogprobs]]] = {
    "none": lambda scores: [],
    "too few": lambda scores: [replace(scores, logprobs=scores.logprobs[:2])],
    "twice": lambda scores: [scores, scores],
    "of other tokens": lambda scores: [replace(scores, logprobs=scores.logprobs[::-1])],
    "at other positions": lambda scores: [replace(scores, first_position=0)],
}


@pytest.mark.parametrize("name", WRONG_SCORES)
async def test_scores_that_are_not_those_of_the_prompt_are_noticed(name: str) -> None:
    started, scores, *rest = await answer_to(SCORED)
    assert isinstance(scores, PromptLogprobs)

    with pytest.raises(EngineFailed, match="log-probabilities"):
        check(SCORED, [started, *WRONG_SCORES[name](scores), *rest])


async def test_scores_that_were_not_requested_are_noticed() -> None:
    started, scores, *_ = await answer_to(SCORED)

    with pytest.raises(EngineFailed, match="log-probabilities"):
        check(replace(SCORED, sampling=SamplingOptions()), [started, scores])
