"""Requests for tokens and texts, and their responses, come back equal."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_service.core.capture import MessageBoundary
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.prompt import TextPrompt
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.wire import generation_pb2, tokenizer_pb2
from steer_service.wire.tokens import (
    detokenize_from_proto,
    detokenize_to_proto,
    render_from_proto,
    render_to_proto,
    rendered_from_proto,
    rendered_to_proto,
    tokenize_from_proto,
    tokenize_to_proto,
    tokenized_from_proto,
    tokenized_to_proto,
)
from tests.wire.strategies import boundaries, prompts, texts, tokens

places = st.integers(0, 2**31 - 1)
token_lists = st.lists(st.tuples(tokens, texts, st.tuples(places, places)), min_size=1, max_size=5)
TEXT = RenderRequest(prompt=TextPrompt(text="Hi"))


@given(
    st.builds(RenderRequest, prompt=prompts, model=texts, with_token_texts=st.booleans(), with_offsets=st.booleans()),
    st.none() | st.just(-1) | st.integers(1, 2**31 - 1),
)
def test_requests_for_tokens_come_back_equal(request: RenderRequest, keep: int | None) -> None:
    cut = replace(request, truncate_prompt_tokens=keep)
    message = render_to_proto(cut)
    assert render_from_proto(tokenizer_pb2.RenderRequest.FromString(message.SerializeToString())) == cut
    if isinstance(request.prompt, TextPrompt):
        text = tokenize_to_proto(request)
        assert tokenize_from_proto(tokenizer_pb2.TokenizeRequest.FromString(text.SerializeToString())) == request


@given(st.builds(DetokenizeRequest, token_ids=st.lists(tokens), model=texts, skip_special_tokens=st.booleans()))
def test_requests_for_texts_come_back_equal(request: DetokenizeRequest) -> None:
    message = detokenize_to_proto(request)
    assert detokenize_from_proto(tokenizer_pb2.DetokenizeRequest.FromString(message.SerializeToString())) == request


@given(token_lists, st.booleans(), st.booleans(), st.lists(boundaries, max_size=2), texts)
def test_responses_come_back_equal(
    given_tokens: list[tuple[int, str, tuple[int, int]]],
    has_texts: bool,
    has_offsets: bool,
    messages: list[MessageBoundary],
    prefill: str,
) -> None:
    ids, of_tokens, offsets = zip(*given_tokens, strict=True)
    request = RenderRequest(prompt=TextPrompt(text="Hi"), with_token_texts=has_texts)
    shown = PromptTokens(
        text="Hi",
        token_ids=ids,
        token_texts=of_tokens if has_texts else None,
        offsets=offsets if has_offsets else None,
        special_positions=(0,),
        message_boundaries=tuple(messages),
        prefill=prefill,
        boundaries_missing_reason=prefill,
    )
    message = tokenizer_pb2.RenderResponse.FromString(rendered_to_proto(shown).SerializeToString())
    assert rendered_from_proto(message, request) == shown

    plain = PromptTokens(
        text="Hi",
        token_ids=ids,
        token_texts=shown.token_texts,
        offsets=shown.offsets,
        special_positions=(0,),
    )
    answer = tokenizer_pb2.TokenizeResponse.FromString(tokenized_to_proto(plain).SerializeToString())
    assert tokenized_from_proto(answer, request) == plain


@pytest.mark.parametrize(
    "message",
    [
        tokenizer_pb2.TokenizeResponse(token_ids=[1, 2], token_texts=["a"]),
        tokenizer_pb2.TokenizeResponse(
            token_ids=[1], token_texts=["a"], offsets=tokenizer_pb2.TokenOffsets(starts=[0, 1], ends=[1, 2])
        ),
        tokenizer_pb2.TokenizeResponse(
            token_ids=[1], token_texts=["a"], offsets=tokenizer_pb2.TokenOffsets(starts=[0], ends=[])
        ),
    ],
)
def test_a_response_whose_lists_differ_in_length_is_not_believed(message: tokenizer_pb2.TokenizeResponse) -> None:
    with pytest.raises(EngineFailed) as raised:
        tokenized_from_proto(message, TEXT)
    assert raised.value.reason == "BAD_STREAM"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (tokenizer_pb2.RenderRequest(), "prompt"),
        (tokenizer_pb2.RenderRequest(text=""), "prompt.text"),
        (
            tokenizer_pb2.RenderRequest(token_ids=generation_pb2.TokenIds(ids=[1]), add_special_tokens=True),
            "add_special_tokens",
        ),
    ],
)
def test_a_prompt_that_is_missing_or_wrong_is_refused_by_name(message: tokenizer_pb2.RenderRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        render_from_proto(message)
    assert raised.value.field == field


def test_an_empty_text_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest) as raised:
        tokenize_from_proto(tokenizer_pb2.TokenizeRequest())
    assert raised.value.field == "prompt.text"
