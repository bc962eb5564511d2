"""Which rows of an output are steered and captured."""

from dataclasses import replace

import numpy as np
import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import CapturedPart, RowSelection, rows_at_most
from steer_service.core.spans import EVERYWHERE, OPEN_END, Spans
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec

PROMPT = TextPrompt(text="hi")
STEERING = SteeringSpec.simple_add(1, np.ones(4))


def spans_of_selection(request: GenerateRequest) -> tuple[Spans, Spans]:
    selection = RowSelection.of(request, 3, 8)
    return selection.steered, selection.captured


def test_positions_become_spans_of_the_prompt_that_was_rendered() -> None:
    request = GenerateRequest(
        prompt=PROMPT,
        steering=replace(STEERING, positions="generated"),
        capture=CaptureSpec(layers=(0,), positions=[0, -1]),
    )

    assert spans_of_selection(request) == (((3, OPEN_END),), ((0, 1), (2, 3)))


def test_without_positions_there_are_all_rows_and_without_work_none() -> None:
    everything = GenerateRequest(prompt=PROMPT, steering=STEERING, capture=CaptureSpec(layers=(0,)))
    nothing = GenerateRequest(prompt=PROMPT, steering=SteeringSpec(), capture=CaptureSpec(layers=()))

    assert spans_of_selection(everything) == (EVERYWHERE, EVERYWHERE)
    assert spans_of_selection(nothing) == spans_of_selection(GenerateRequest(prompt=PROMPT)) == ((), ())


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (
            GenerateRequest(prompt=PROMPT, steering=SteeringSpec(positions=[0, 8])),
            "steering.positions.ranges[1]",
        ),
        (
            GenerateRequest(prompt=PROMPT, capture=CaptureSpec(layers=(), positions=-4)),
            "capture.positions.ranges[0]",
        ),
    ],
    ids=["steering", "capture"],
)
def test_positions_that_cannot_be_are_refused_by_their_field_even_if_nothing_is_done(
    request_: GenerateRequest, field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        RowSelection.of(request_, 3, 8)
    assert (raised.value.field, raised.value.reason) == (field, "OUT_OF_RANGE")


def test_rows_before_the_first_captured_one_may_be_reused() -> None:
    capture = CaptureSpec(layers=(0,), positions=[2, 5])
    assert RowSelection.of(GenerateRequest(prompt=PROMPT, capture=capture), 3, 8).reusable == 2
    assert RowSelection.of(GenerateRequest(prompt=PROMPT), 3, 8).reusable == 8


def test_a_part_counts_the_captured_rows_before_it() -> None:
    capture = CaptureSpec(layers=(0,), positions=[0, 2, 4])
    selection = RowSelection.of(GenerateRequest(prompt=PROMPT, capture=capture), 3, 8)
    assert selection.captured_part(0, 3) == CapturedPart(spans=((0, 1), (2, 3)), first=0, end=2)
    assert selection.captured_part(3, 8) == CapturedPart(spans=((4, 5),), first=2, end=3)
    assert selection.captured_part(5, 8) == CapturedPart(spans=(), first=3, end=3)


def test_a_request_that_generates_nothing_has_the_rows_of_its_prompt() -> None:
    assert [rows_at_most(3, max_tokens) for max_tokens in (0, 1, 2)] == [3, 3, 4]


def test_the_last_sampled_token_has_no_row() -> None:
    selection = RowSelection.of(GenerateRequest(prompt=PROMPT, steering=STEERING), 3, 8)
    assert selection.rows_after(generated=1) == 3
    assert selection.steered_positions(selection.rows_after(generated=2)).tolist() == [0, 1, 2, 3]


def with_operations(*positions: object) -> GenerateRequest:
    operations = [AddSpec(np.ones(4), positions=scope) for scope in positions]
    return GenerateRequest(prompt=PROMPT, steering=SteeringSpec({1: LayerSteeringSpec(operations)}))


def test_the_steered_rows_are_those_of_any_operation_and_each_scope_has_its_own() -> None:
    selection = RowSelection.of(with_operations(None, 1, "generated[0:2]", range(1, 2)), 3, 8)

    assert selection.steered == EVERYWHERE
    assert selection.scopes == (EVERYWHERE, ((1, 2),), ((3, 5),))


def test_operations_of_one_scope_are_steered_as_a_whole() -> None:
    selection = RowSelection.of(with_operations(-1, 2 - 3), 3, 8)

    assert (selection.steered, selection.scopes) == (((2, 3),), ())


def test_positions_of_an_operation_are_refused_by_their_field() -> None:
    with pytest.raises(InvalidRequest) as raised:
        RowSelection.of(with_operations(0, [1, 9]), 3, 8)
    assert raised.value.field == "steering.layers[1].operations[1].positions.ranges[1]"
