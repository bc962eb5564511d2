"""Chats with tokenizers that have no offsets."""

from transformers import ByT5Tokenizer

from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.runtime.prompts import render_prompt
from tests.runtime.chat_templates import CHATML


def test_a_slow_tokenizer_serves_chats_without_places_of_messages() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    prompt = ChatPrompt(messages=[ChatMessage(role="user", content="Hi")])

    captured, plain = (render_prompt(prompt, tokenizer, with_boundaries=flag) for flag in (True, False))

    assert not tokenizer.is_fast
    assert captured.token_ids == plain.token_ids
    assert captured.message_boundaries == plain.message_boundaries == ()
    assert captured.boundaries_missing_reason.startswith("the model's tokenizer does not tell where its tokens are")
    assert plain.boundaries_missing_reason == ""
    assert tokenizer.decode(captured.token_ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
