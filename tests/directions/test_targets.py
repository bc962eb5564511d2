"""Targets: what of contrastive prompts is one, and what is refused."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.directions.contrast import ContrastPair
from steer_service.directions.targets import Target, targets_of

QUESTION, ANSWER = ChatMessage(role="user", content="How are you?"), ChatMessage(role="assistant", content="Well")


def text(value: str) -> TextPrompt:
    return TextPrompt(text=value)


def chat(*messages: ChatMessage) -> ChatPrompt:
    is_answer = messages[-1].role == "assistant"
    return ChatPrompt(messages=messages, continue_final_message=is_answer)


def test_of_texts_it_is_what_follows_the_words_in_common() -> None:
    (target,) = targets_of([ContrastPair(text("I feel great today."), text("I feel grim today."))])
    assert target == Target(prompt=text("I feel"), text=" great today.")
    assert target.whole == text("I feel great today.")


def test_of_chats_it_is_the_answer() -> None:
    other = ChatMessage(role="assistant", content="Badly")
    (target,) = targets_of([ContrastPair(chat(QUESTION, ANSWER), chat(QUESTION, other))])
    assert target == Target(prompt=chat(QUESTION), text="Well")
    assert target.whole == chat(QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("positive", "negative", "field"),
    [
        (text("Great."), text("Grim."), "positive"),
        (text(" great."), text(" grim."), "positive"),
        (text("I feel"), text("I feel bad."), "positive"),
        (chat(QUESTION), chat(QUESTION, ANSWER), "positive"),
        (chat(ANSWER), chat(QUESTION, ANSWER), "positive"),
        (text("I feel great."), chat(QUESTION), "negative"),
    ],
)
def test_pairs_without_a_target_are_refused_by_number(positive: Prompt, negative: Prompt, field: str) -> None:
    good = ContrastPair(text("I feel great."), text("I feel grim."))
    with pytest.raises(InvalidRequest) as refused:
        targets_of([good, ContrastPair(positive, negative)])
    assert (refused.value.field, refused.value.reason) == (f"pairs[1].{field}", "NO_TARGET")


def test_an_empty_target_and_one_after_token_ids_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        Target(prompt=text("a"), text="")
    with pytest.raises(InvalidRequest, match="not token ids"):
        _ = Target(prompt=TokenPrompt(token_ids=(1,)), text="a").whole
