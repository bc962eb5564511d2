"""Requests: every bound of every field, told by name."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt, prompt_from
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AddSpec, SteeringSpec

USER = ChatMessage(role="user", content="Hi")
ASSISTANT = ChatMessage(role="assistant", content="The")


def refused(**options: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        SamplingOptions(**options)
    return raised.value


# option -> (lowest, highest) that is accepted
INTEGERS = {
    "n": (1, 8),
    "max_tokens": (0, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, 1 << 16),
    "prompt_logprobs": (0, 1 << 16),
}
NUMBERS = {
    "temperature": (0.0, 100.0),
    "top_p": (5e-324, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (5e-324, 2.0),
}
FLAGS = ["ignore_eos", "skip_special_tokens", "include_stop"]


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_is_taken_between_its_bounds(name: str) -> None:
    low, high = INTEGERS[name]

    for value in (low, high, np.int64(high)):
        assert type(getattr(SamplingOptions(**{name: value}), name)) is int
    for value in (low - 1, high + 1, 10**400):
        error = refused(**{name: value})
        assert f"is outside {low}..{high}" in error.message
        assert (error.reason, error.field) == ("OUT_OF_RANGE", name)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.0, "1", True, [1], float("nan")])
def test_what_is_not_an_integer_is_refused(name: str, value: Any) -> None:
    error = refused(**{name: value})

    assert error.message == f"{value!r} is not an integer"
    assert error.field == name


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_taken_between_its_bounds(name: str) -> None:
    low, high = NUMBERS[name]

    for value in (low, high, np.float64(high), int(high)):
        assert type(getattr(SamplingOptions(**{name: value}), name)) is float
    below = 0.0 if low == 5e-324 else np.nextafter(low, -np.inf)
    for value in (below, np.nextafter(high, np.inf), np.nan, np.inf, -np.inf, 10**400):
        assert (refused(**{name: value}).reason, refused(**{name: value}).field) == ("OUT_OF_RANGE", name)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["1", True, [1.0], 1j])
def test_what_is_not_a_number_is_refused(name: str, value: Any) -> None:
    assert refused(**{name: value}).message == f"{value!r} is not a number"


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str) -> None:
    assert getattr(SamplingOptions(**{name: True}), name) is True
    assert getattr(SamplingOptions(**{name: False}), name) is False
    for value in (1, "yes", 0.0):
        assert refused(**{name: value}).field == name


@pytest.mark.parametrize("name", SamplingOptions.__dataclass_fields__)
def test_none_leaves_an_option_to_the_server(name: str) -> None:
    assert SamplingOptions(**{name: None}) == SamplingOptions()


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert SamplingOptions(max_tokens=3, min_tokens=3).min_tokens == 3
    error = refused(max_tokens=3, min_tokens=4)
    assert error.message == "min_tokens 4 is greater than max_tokens 3"
    assert error.field == "min_tokens"


def test_one_stop_string_or_several_are_taken() -> None:
    assert SamplingOptions(stop="end").stop == ("end",)
    assert SamplingOptions(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingOptions(stop=("x" * 1024,) * 16).stop == ("x" * 1024,) * 16


@pytest.mark.parametrize(
    ("stop", "field"),
    [
        (("x",) * 17, "stop"),
        (("a", ""), "stop[1]"),
        ("", "stop[0]"),
        (("x" * 1025,), "stop[0]"),
        ((1,), "stop[0]"),
        (("\ud800",), "stop[0]"),
        (b"end", "stop"),
        (5, "stop"),
    ],
    ids=repr,
)
def test_a_bad_stop_string_is_refused(stop: Any, field: str) -> None:
    assert refused(stop=stop).field == field


@pytest.mark.parametrize("tokens", [(-1,), (1.5,), ("1",), "12", b"12", 5, (2**31,), range(129)], ids=repr)
def test_bad_stop_tokens_are_refused(tokens: Any) -> None:
    assert refused(stop_token_ids=tokens).field == "stop_token_ids"


def test_stop_tokens_are_kept_as_integers() -> None:
    assert SamplingOptions(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)
    assert len(SamplingOptions(stop_token_ids=tuple(range(128))).stop_token_ids) == 128


@pytest.mark.parametrize(
    ("biases", "field"),
    [
        ({5: 100.5}, "logit_bias[5]"),
        ({5: -100.5}, "logit_bias[5]"),
        ({5: float("nan")}, "logit_bias[5]"),
        ({5: "1"}, "logit_bias[5]"),
        ({5: True}, "logit_bias[5]"),
        ({-1: 1.0}, "logit_bias"),
        ({"5": 1.0}, "logit_bias"),
        ({1.5: 1.0}, "logit_bias"),
        ([(5, 1.0)], "logit_bias"),
        (dict.fromkeys(range(301), 1.0), "logit_bias"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_logit_bias_is_refused(biases: Any, field: str) -> None:
    assert refused(logit_bias=biases).field == field


def test_a_logit_bias_changed_later_does_not_matter() -> None:
    biases = {5: 1, 6: -100.0}
    options = SamplingOptions(logit_bias=biases)

    biases.clear()

    assert options.logit_bias == {5: 1.0, 6: -100.0}


def test_equal_options_have_equal_hashes() -> None:
    one, other = (SamplingOptions(max_tokens=np.int64(5), stop="a", logit_bias={1: 2}) for _ in range(2))

    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TextPrompt(text=""), "text"),
        (lambda: TokenPrompt(token_ids=()), "token_ids"),
        (lambda: ChatPrompt(messages=()), "messages"),
    ],
)
def test_an_empty_prompt_is_refused(make: Any, field: str) -> None:
    with pytest.raises(InvalidRequest, match="is empty") as raised:
        make()
    assert (raised.value.reason, raised.value.field) == ("EMPTY_PROMPT", field)


@pytest.mark.parametrize("text", [None, 5, b"Hello", ["Hello"], "half \ud83d of a pair"], ids=repr)
def test_a_text_prompt_is_text(text: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        TextPrompt(text=text)
    assert (raised.value.reason, raised.value.field) == ("BAD_TEXT", "text")


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_token_ids_are_taken_from_any_sequence_of_integers(tokens: list[int]) -> None:
    expected = TokenPrompt(token_ids=tuple(tokens))

    for given_ids in (tokens, np.array(tokens), np.array(tokens, dtype=np.uint32), torch.tensor(tokens)):
        prompt = TokenPrompt(token_ids=given_ids)
        assert prompt == expected
        assert all(type(token) is int for token in prompt.token_ids)


@pytest.mark.parametrize("tokens", [(-1,), (1, 2.0), ("1",), "12", b"12", 5, None, (None,), (2**31,), ([1],)], ids=repr)
def test_what_is_not_a_sequence_of_token_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequest) as raised:
        TokenPrompt(token_ids=tokens)
    assert (raised.value.reason, raised.value.field) == ("BAD_TOKEN", "token_ids")


@pytest.mark.parametrize(
    ("role", "content", "field"),
    [
        ("", "Hi", "role"),
        ("r" * 65, "Hi", "role"),
        (None, "Hi", "role"),
        ("user", [{"type": "text", "text": "Hi"}], "content"),
        ("user", "\udfff", "content"),
    ],
)
def test_a_chat_message_is_a_role_and_a_text(role: Any, content: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        ChatMessage(role=role, content=content)
    assert raised.value.field == field


def test_a_message_may_say_nothing() -> None:
    assert ChatMessage(role="r" * 64, content="").content == ""
    assert ChatMessage(role="assistant", content=None).content == ""


def test_a_conversation_has_a_bound() -> None:
    assert len(ChatPrompt(messages=(USER,) * 4096).messages) == 4096
    with pytest.raises(InvalidRequest, match="4097 messages, at most 4096"):
        ChatPrompt(messages=(USER,) * 4097)


def test_a_conversation_holds_messages() -> None:
    with pytest.raises(InvalidRequest, match="dict is not a ChatMessage") as raised:
        ChatPrompt(messages=(USER, {"role": "user", "content": "Hi"}))
    assert raised.value.field == "messages[1]"


def test_only_an_answer_can_be_continued() -> None:
    assert ChatPrompt(messages=[USER, ASSISTANT], continue_final_message=True).messages == (USER, ASSISTANT)
    with pytest.raises(InvalidRequest, match="needs a last message from the assistant, got 'user'") as raised:
        ChatPrompt(messages=(ASSISTANT, USER), continue_final_message=True)
    assert raised.value.field == "continue_final_message"


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("Hello", TextPrompt(text="Hello")),
        ([1, 2], TokenPrompt(token_ids=(1, 2))),
        (np.array([1, 2]), TokenPrompt(token_ids=(1, 2))),
        (TextPrompt(text="Hello"), TextPrompt(text="Hello")),
        (ChatPrompt(messages=(USER,)), ChatPrompt(messages=(USER,))),
    ],
)
def test_a_prompt_is_written_as_text_or_token_ids(value: Any, prompt: Any) -> None:
    assert prompt_from(value) == prompt


@pytest.mark.parametrize("value", ["", [], 5, None, b"abc", {"a": 1}, ["a"], {1.5}, object()], ids=repr)
def test_what_is_not_a_prompt_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        prompt_from(value)


@pytest.mark.parametrize("request_id", ["", "a", "A-z.0_9:x", "x" * 128])
def test_a_request_id_may_be_chosen(request_id: str) -> None:
    assert GenerateRequest(prompt=TextPrompt(text="Hi"), request_id=request_id).request_id == request_id


@pytest.mark.parametrize("request_id", ["x" * 129, "a b", "a/b", "a\n", "é", "../x"])
def test_a_request_id_with_other_characters_is_refused(request_id: str) -> None:
    with pytest.raises(InvalidRequest, match="request_id must be") as raised:
        GenerateRequest(prompt=TextPrompt(text="Hi"), request_id=request_id)
    assert (raised.value.reason, raised.value.field) == ("BAD_REQUEST_ID", "request_id")


@pytest.mark.parametrize("seconds", [1e-9, 0.5, 1, np.float32(3), 86_400])
def test_a_time_budget_is_a_positive_number_of_seconds_up_to_a_day(seconds: float) -> None:
    assert GenerateRequest(prompt=TextPrompt(text="Hi"), time_budget_s=seconds).time_budget_s == seconds


@pytest.mark.parametrize("seconds", [0, -1, 86_401, float("nan"), float("inf"), 10**400, True, "5"])
def test_another_time_budget_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not above 0 and at most 86400 seconds") as raised:
        GenerateRequest(prompt=TextPrompt(text="Hi"), time_budget_s=seconds)
    assert (raised.value.reason, raised.value.field) == ("OUT_OF_RANGE", "time_budget")


@pytest.mark.parametrize("name", ["model", "cache_salt"])
def test_names_have_a_bound(name: str) -> None:
    GenerateRequest(prompt=TextPrompt(text="Hi"), **{name: "x" * 256})
    with pytest.raises(InvalidRequest, match=f"{name} has more than 256 characters") as raised:
        GenerateRequest(prompt=TextPrompt(text="Hi"), **{name: "x" * 257})
    assert raised.value.field == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "Hello"),
        ("prompt", None),
        ("sampling", {"max_tokens": 5}),
        ("sampling", None),
        ("steering", AddSpec([1.0])),
        ("steering", {}),
        ("capture", (1, 2)),
        ("request_id", 5),
        ("model", None),
        ("cache_salt", b"salt"),
    ],
)
def test_a_part_of_another_kind_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="expected") as raised:
        GenerateRequest(**{"prompt": TextPrompt(text="Hi"), field: value})
    assert raised.value.field == field


def test_a_request_carries_its_own_steering_and_capture() -> None:
    spec, capture = SteeringSpec.simple_add(1, [1.0]), CaptureSpec(layers=(1,))

    request = GenerateRequest(prompt=TextPrompt(text="Hi"), steering=spec, capture=capture)

    assert (request.steering, request.capture) == (spec, capture)
    assert GenerateRequest(prompt=TextPrompt(text="Hi")).steering is None
