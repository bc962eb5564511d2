"""The prompt of `steer generate` and `steer render`, from the command line."""

import argparse
import json

import pytest

from steer_service.cli.arguments import UsageError
from steer_service.cli.prompt_arguments import add_prompt_arguments, prompt_of
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt

HI = ChatMessage(role="user", content="hi")
TOOL = {"type": "function", "function": {"name": "f"}}


def prompt(*arguments: str) -> Prompt:
    parser = argparse.ArgumentParser("steer generate")
    add_prompt_arguments(parser, "the text")
    return prompt_of(parser.parse_args(arguments))


def test_a_prompt_is_a_text_unless_flags_say_otherwise() -> None:
    assert prompt("hi") == TextPrompt(text="hi")
    assert prompt("<s>hi", "--no-special-tokens") == TextPrompt(text="<s>hi", add_special_tokens=False)


def test_chat_makes_it_a_users_message_with_options() -> None:
    assert prompt("hi", "--chat") == ChatPrompt(messages=[HI])
    kwargs = prompt("hi", "--chat", "--chat-template-kwargs", '{"enable_thinking": false}')
    assert kwargs.chat_template_kwargs == {"enable_thinking": False}
    assert prompt("hi", "--chat", "--tools", json.dumps([TOOL])).tools == (TOOL,)
    assert prompt("hi", "--chat", "--no-add-generation-prompt").add_generation_prompt is False


def test_a_line_of_a_prompt_file_is_a_prompt_and_flags_add_to_it() -> None:
    answer = {"role": "assistant", "content": "Well,"}
    line = json.dumps({"messages": [{"role": "user", "content": "hi"}, answer], "id": 7})

    assert prompt(line, "--line").prefill == "Well,"
    assert prompt(line, "--line", "--no-continue-final-message").prefill == ""
    assert prompt(line, "--line", "--continue-final-message", "--tools", json.dumps([TOOL])).tools == (TOOL,)
    assert prompt('"hi"', "--line", "--no-special-tokens") == TextPrompt(text="hi", add_special_tokens=False)
    assert prompt('{"token_ids": [1, 2]}', "--line") == TokenPrompt(token_ids=[1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--tools", "[]"], "--tools needs --chat or --line"),
        (["hi", "--no-add-generation-prompt"], "--add-generation-prompt needs --chat or --line"),
        (["hi", "--no-special-tokens", "--chat"], "--no-special-tokens is for texts"),
        (["hi", "--chat", "--tools", "{}"], "--tools: expected a list of functions"),
        (["hi", "--chat", "--tools", "["], "--tools: not JSON"),
        (["hi", "--chat", "--tools", "[7]"], "prompt.tools[0]"),
        (["hi", "--chat", "--continue-final-message"], "needs a last message from the assistant"),
        (['"hi"', "--line", "--chat"], "--chat is for a text, and with --line PROMPT is JSON"),
        (['"hi"', "--line", "--tools", "[]"], "prompt.tools: tools is no option here"),
        (['{"messages": [], "tools": []}', "--line", "--tools", "[]"], "prompt.tools: the line has it"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises((UsageError, InvalidRequest)) as refused:
        prompt(*arguments)
    assert message in str(refused.value)
