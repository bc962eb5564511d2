"""The prompt of `steer generate` and `steer render`, from the command line."""

import argparse
import io
import json
from pathlib import Path

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


def test_a_system_message_comes_before_the_users_and_makes_it_a_chat() -> None:
    system = ChatMessage(role="system", content="be brief")
    assert prompt("hi", "--system", "be brief") == prompt("hi", "--system", "be brief", "--chat")
    assert prompt("hi", "--system", "be brief") == ChatPrompt(messages=[system, HI])
    assert prompt("hi", "--system", "be brief", "--tools", json.dumps([TOOL])).tools == (TOOL,)


class Pipe(io.TextIOWrapper):
    """Standard input with this content."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"hi", "hi"),
        (b"hi\n", "hi"),
        (b"hi\r\n", "hi"),
        (b"hi\n\n", "hi\n"),
        (b"one\ntwo\n", "one\ntwo"),
        ("\ufeffé\n".encode(), "é"),
    ],
)
def test_a_prompt_comes_from_a_file_or_a_pipe_without_its_last_line_end(
    content: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert prompt("--prompt-file", str(tmp_path / "p.txt")) == TextPrompt(text=text)
    for arguments in ([], ["-"]):
        monkeypatch.setattr("sys.stdin", Pipe(content))
        assert prompt(*arguments) == TextPrompt(text=text)
    monkeypatch.setattr("sys.stdin", Pipe(content))
    assert prompt("--chat") == ChatPrompt(messages=[ChatMessage(role="user", content=text)])


def test_a_prompt_that_cannot_be_read_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes(b"ok \xff")
    for arguments, message in (
        (["--prompt-file", str(tmp_path / "none")], "--prompt-file: .*none cannot be read: No such file"),
        (["--prompt-file", str(tmp_path / "p.txt")], "--prompt-file: byte 3 is not UTF-8"),
        (["--prompt-file", str(tmp_path / "p.txt"), "hi"], "--prompt-file: PROMPT is given too"),
    ):
        with pytest.raises(UsageError, match=message):
            prompt(*arguments)
    monkeypatch.setattr("sys.stdin", Pipe(b"\xff"))
    with pytest.raises(UsageError, match="standard input: byte 0 is not UTF-8"):
        prompt("-")
    terminal = Pipe(b"never read")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(UsageError, match="PROMPT is missing"):
        prompt()


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
        (['"hi"', "--line", "--system", "x"], "--system is for a text, and with --line PROMPT is JSON"),
        (['"hi"', "--line", "--tools", "[]"], "prompt.tools: tools is no option here"),
        (['{"messages": [], "tools": []}', "--line", "--tools", "[]"], "prompt.tools: the line has it"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises((UsageError, InvalidRequest)) as refused:
        prompt(*arguments)
    assert message in str(refused.value)
