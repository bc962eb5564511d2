"""Positions by message, by role and without special tokens, in a rendered prompt."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import CaptureSpec, MessageBoundary
from steer_service.core.errors import InvalidRequest, SteerError, Unsupported
from steer_service.core.positions import PositionRange, PositionScope, scope_from, words_of
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt
from steer_service.core.prompt_places import PromptPlaces
from steer_service.core.request import GenerateRequest
from steer_service.core.row_selection import RowSelection
from steer_service.core.spans import Spans, mask_of
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec

MESSAGES = (
    MessageBoundary("system", "a", 1, 3),
    MessageBoundary("user", "b", 4, 6),
    MessageBoundary("assistant", "", 7, 7),
    MessageBoundary("user", "c", 8, 9),
)
CHAT = PromptPlaces(token_ids=(0, 1, 1, 0, 1, 0, 1, 1, 1, 1), messages=MESSAGES, special_token_ids=(0, 99))
"""Its special tokens are at 0, 3 and 5."""
LIMIT = 14


def resolved(places: PromptPlaces | None = CHAT, **fields: Any) -> Spans:
    return PositionScope(**fields).resolve(10, LIMIT, places)


@pytest.mark.parametrize(
    ("fields", "spans"),
    [
        ({"messages": (0,)}, ((1, 3),)),
        ({"messages": (-1, 1)}, ((4, 6), (8, 9))),
        ({"messages": (2, 3)}, ((8, 9),)),
        ({"roles": ("user",)}, ((4, 6), (8, 9))),
        ({"roles": ("user", "nobody"), "messages": (0,)}, ((1, 3), (4, 6), (8, 9))),
        ({"skip_special_tokens": True}, ((1, 3), (4, 5), (6, 2**31 - 1))),
        ({"skip_special_tokens": True, "prompt": True}, ((1, 3), (4, 5), (6, 10))),
        ({"skip_special_tokens": True, "roles": ("user",), "generated": True}, ((4, 5), (8, 9), (10, 2**31 - 1))),
        ({"skip_special_tokens": True, "ranges": (PositionRange(-1, 12),)}, ((9, 13),)),
        ({"messages": (1,), "ranges": (PositionRange(6, 6),)}, ((4, 7),)),
    ],
)
def test_they_mean_the_tokens_of_the_prompt(fields: dict[str, Any], spans: Spans) -> None:
    assert resolved(**fields) == spans


@pytest.mark.parametrize(
    ("fields", "kind", "reason", "field", "text"),
    [
        ({"messages": (0, 4)}, InvalidRequest, "OUT_OF_RANGE", "messages[1]", "the chat has 4, 0..3 or -4..-1"),
        ({"messages": (-5,)}, InvalidRequest, "OUT_OF_RANGE", "messages[0]", "no message -5"),
        ({"messages": (2,)}, InvalidRequest, "EMPTY_POSITIONS", "messages", "no token is selected"),
        ({"roles": ("nobody",)}, InvalidRequest, "EMPTY_POSITIONS", "roles", "no token is selected"),
        (
            {"ranges": (PositionRange(3, 3),), "skip_special_tokens": True},
            InvalidRequest,
            "EMPTY_POSITIONS",
            "skip_special_tokens",
            "no token is selected",
        ),
    ],
)
def test_what_is_not_in_the_prompt_is_refused_by_name(
    fields: dict[str, Any], kind: type[SteerError], reason: str, field: str, text: str
) -> None:
    with pytest.raises(kind, match=text) as raised:
        resolved(**fields)
    assert (raised.value.reason, raised.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("places", "fields", "kind", "reason", "field"),
    [
        (PromptPlaces(), {"messages": (0,)}, InvalidRequest, "NO_MESSAGES", "messages[0]"),
        (PromptPlaces(), {"roles": ("user",)}, InvalidRequest, "NO_MESSAGES", "roles[0]"),
        (
            PromptPlaces(messages_missing_reason="it merges"),
            {"roles": ("user",)},
            Unsupported,
            "MESSAGE_BOUNDARIES",
            "roles[0]",
        ),
        (
            PromptPlaces(token_ids=(1,) * 10),
            {"skip_special_tokens": True},
            Unsupported,
            "NO_SPECIAL_TOKENS",
            "skip_special_tokens",
        ),
        (None, {"messages": (0,)}, Unsupported, "UNRESOLVED_POSITIONS", ""),
        (None, {"skip_special_tokens": True}, Unsupported, "UNRESOLVED_POSITIONS", ""),
    ],
)
def test_what_is_not_known_of_the_prompt_is_refused_with_the_reason(
    places: PromptPlaces | None, fields: dict[str, Any], kind: type[SteerError], reason: str, field: str
) -> None:
    with pytest.raises(kind) as raised:
        resolved(places, **fields)
    assert (raised.value.reason, raised.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": (4096,)}, "messages[0]"),
        ({"messages": (0, -4097)}, "messages[1]"),
        ({"messages": (True,)}, "messages[0]"),
        ({"messages": ("0",)}, "messages[0]"),
        ({"messages": 1}, "messages"),
        ({"messages": (0,) * 1025}, "messages"),
        ({"roles": "user"}, "roles"),
        ({"roles": ("",)}, "roles[0]"),
        ({"roles": ("a" * 65,)}, "roles[0]"),
        ({"roles": ("user", 1)}, "roles[1]"),
        ({"roles": ("user",) * 65}, "roles"),
        ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ],
)
def test_a_scope_that_cannot_hold_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        PositionScope(**fields)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("words", "scope"),
    [
        ("messages[-1]", PositionScope(messages=(-1,))),
        (["roles[user]", "messages[0]", "skip_special_tokens", 3], None),
        ("skip_special_tokens", PositionScope(skip_special_tokens=True)),
        ("roles[a role]", PositionScope(roles=("a role",))),
    ],
)
def test_they_have_words_that_are_read_back(words: Any, scope: PositionScope | None) -> None:
    given = scope_from(words)
    wanted = scope or PositionScope(
        ranges=(PositionRange(3, 3),), roles=("user",), messages=(0,), skip_special_tokens=True
    )
    assert given == wanted
    assert scope_from([*words_of(wanted), *wanted.ranges]) == wanted


@pytest.mark.parametrize(
    "word", ["messages[]", "messages[0:2]", "messages[5000000]", "roles[]", "message[0]", "special"]
)
def test_other_words_are_refused_with_those_that_there_are(word: str) -> None:
    with pytest.raises(InvalidRequest, match="messages") as raised:
        scope_from(word)
    assert raised.value.reason in ("BAD_POSITION", "OUT_OF_RANGE")


def test_scopes_have_equal_bytes_only_if_they_mean_the_same() -> None:
    scopes = [
        PositionScope(prompt=True),
        PositionScope(messages=(0,)),
        PositionScope(messages=(-1,)),
        PositionScope(messages=(0, 1)),
        PositionScope(roles=("0",)),
        PositionScope(roles=("user",)),
        PositionScope(roles=("us", "er")),
        PositionScope(skip_special_tokens=True),
        PositionScope(skip_special_tokens=True, prompt=True),
        PositionScope(skip_special_tokens=True, messages=(0,)),
        PositionScope(prompt=True, messages=(0,)),
    ]
    for one, other in itertools.combinations(scopes, 2):
        assert one.canonical_bytes() != other.canonical_bytes(), (one, other)
    same = PositionScope(messages=(1, 0, 1), roles=("b", "a", "b"))
    assert same.canonical_bytes() == PositionScope(messages=(0, 1), roles=("a", "b")).canonical_bytes()


def test_only_those_that_begin_with_generated_tokens_need_more_than_one() -> None:
    assert PositionScope(generated=True, skip_special_tokens=True).is_generated_only
    assert not PositionScope(skip_special_tokens=True).is_generated_only
    assert not PositionScope(messages=(0,), generated=True).is_generated_only


def test_every_place_for_positions_in_a_request_takes_them() -> None:
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="a")])
    operations = [AddSpec([1.0], positions="messages[0]"), AddSpec([1.0], positions="roles[user]")]
    request = GenerateRequest(
        prompt=chat,
        steering=SteeringSpec({1: LayerSteeringSpec(operations)}, positions="skip_special_tokens"),
        capture=CaptureSpec(layers=(1,), positions=["messages[-1]", "skip_special_tokens"]),
    )
    rows = RowSelection.of(request, 10, LIMIT, CHAT)

    assert rows.scopes == (((1, 3),), ((4, 6), (8, 9)))
    assert rows.steered == ((1, 3), (4, 6), (8, 9))
    assert rows.captured == ((8, 9),)
    assert (request.names_messages, request.names_special_tokens) == (True, True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"steering": SteeringSpec.simple_add(1, [1.0], positions="messages[0]")}, "steering.positions.messages[0]"),
        (
            {"steering": SteeringSpec({1: LayerSteeringSpec([AddSpec([1.0], positions="roles[user]")])})},
            "steering.layers[1].operations[0].positions.roles[0]",
        ),
        ({"capture": CaptureSpec(layers=(1,), positions="messages[0]")}, "capture.positions.messages[0]"),
    ],
)
def test_the_field_of_a_refusal_is_the_whole_path(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        RowSelection.of(GenerateRequest(prompt=TextPrompt(text="a"), **fields), 10, LIMIT, PromptPlaces())
    assert raised.value.field == field


def test_special_tokens_may_not_cut_positions_into_endless_parts() -> None:
    cut = PromptPlaces(token_ids=(0, 1) * 16_385, special_token_ids=(0,))
    capture = CaptureSpec(layers=(1,), positions=["prompt", "skip_special_tokens"])
    request = GenerateRequest(prompt=TextPrompt(text="a"), capture=capture)
    with pytest.raises(InvalidRequest) as raised:
        RowSelection.of(request, 32_770, 32_770, cut)
    assert (raised.value.reason, raised.value.field) == ("TOO_MANY_ENTRIES", "capture.positions")

    half = PromptPlaces(token_ids=(0, 1) * 8_000, special_token_ids=(0,))
    assert len(RowSelection.of(request, 16_000, 16_000, half).captured) == 8_000
    scopes = [["prompt", "skip_special_tokens", 16_000 + place] for place in range(5)]
    steering = SteeringSpec({1: LayerSteeringSpec([AddSpec([1.0], positions=scope) for scope in scopes])})
    with pytest.raises(InvalidRequest, match="at most 32768") as raised:
        RowSelection.of(GenerateRequest(prompt=TextPrompt(text="a"), steering=steering), 16_000, 16_100, half)
    assert raised.value.reason == "TOO_MANY_ENTRIES"
    assert raised.value.field == "steering.layers[1].operations[4].positions"


spans = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10)), max_size=4).map(
    lambda pairs: [PositionRange(first, first + count - 1) for first, count in pairs]
)


@given(spans, st.sets(st.integers(0, 39)), st.booleans())
def test_without_special_tokens_is_the_union_minus_their_positions(
    ranges: list[PositionRange], special: set[int], generated: bool
) -> None:
    places = PromptPlaces(token_ids=tuple(int(place in special) for place in range(40)), special_token_ids=(1,))
    if not ranges and not generated:
        return
    plain = PositionScope(ranges=tuple(ranges), generated=generated)
    scope = PositionScope(ranges=tuple(ranges), generated=generated, skip_special_tokens=True)
    want = mask_of(plain.resolve(40, 50), 50)
    want[sorted(special)] = False
    if not want.any():
        with pytest.raises(InvalidRequest, match="no token is selected"):
            scope.resolve(40, 50, places)
        return
    assert np.array_equal(mask_of(scope.resolve(40, 50, places), 50), want)
