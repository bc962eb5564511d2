"""Chats in lines of files: one meaning in every command, and no option that is overlooked."""

import json
from pathlib import Path
from typing import Any

import pytest

from steer_service.cli.capture.prompts import ParsedPrompt, open_prompts
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.directions.contrast import read_contrast
from steer_service.directions.targets import targets_of

USER, ASSISTANT = {"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Paris."}
KINDS = {"text": "Hello", "token_ids": [1], "messages": [USER]}


def parsed(folder: Path, line: dict[str, Any]) -> ParsedPrompt:
    """What `steer capture` reads."""
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps(line))
    with open_prompts(str(path)) as source:
        return source.read(next(source.lines))


def captured(folder: Path, messages: Any, **keys: Any) -> Prompt:
    prompt = parsed(folder, {"messages": messages, **keys}).prompt
    if isinstance(prompt, Exception):
        raise prompt
    return prompt


def trained(folder: Path, messages: Any, **keys: Any) -> Prompt:
    """What `steer train` reads."""
    path = folder / "contrast.jsonl"
    path.write_text(json.dumps({"positive": messages, "negative": [{**USER, "content": "?"}, *messages[1:]], **keys}))
    return read_contrast(path)[0].positive


READERS = [captured, trained]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("messages", "keys", "continued", "header"),
    [
        ([USER], {}, False, True),
        ([USER, ASSISTANT], {}, True, False),
        ([USER, ASSISTANT], {"continue_final_message": True}, True, False),
        ([USER, ASSISTANT], {"continue_final_message": False}, False, True),
        ([USER, ASSISTANT], {"add_generation_prompt": False}, False, False),
        ([USER, ASSISTANT], {"add_generation_prompt": True}, False, True),
        ([USER, ASSISTANT], {"continue_final_message": True, "add_generation_prompt": False}, True, False),
        ([USER], {"add_generation_prompt": False}, False, False),
        ([USER, ASSISTANT], {"continue_final_message": None}, True, False),
    ],
)
def test_how_a_prompt_ends_is_the_same_in_both_commands(
    tmp_path: Path, read: Any, messages: Any, keys: dict[str, Any], continued: bool, header: bool
) -> None:
    prompt = read(tmp_path, messages, **keys)

    assert (prompt.continue_final_message, prompt.has_generation_prompt) == (continued, header)


@pytest.mark.parametrize("read", READERS)
def test_arguments_of_the_template_and_tools_are_read(tmp_path: Path, read: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]

    prompt = read(tmp_path, [USER], chat_template_kwargs={"enable_thinking": False}, tools=tools)

    assert isinstance(prompt, ChatPrompt)
    assert (prompt.chat_template_kwargs, prompt.tools) == ({"enable_thinking": False}, tuple(tools))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "key",
    [
        "temperature",
        "max_tokens",
        "chat_template",
        "enable_thinking",
        "capture_pooling",
        "stream_interval",
        "steering",
        "continue_final_messages",
        "truncate_prompt_tokens",
    ],
)
def test_a_key_that_looks_like_an_option_is_refused_by_name(tmp_path: Path, read: Any, key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(tmp_path, [USER], **{key: 1})
    assert refused.value.reason == "UNKNOWN_OPTION"
    assert refused.value.field.endswith(key)


@pytest.mark.parametrize("kind", ["text", "token_ids"])
@pytest.mark.parametrize("key", ["continue_final_message", "add_generation_prompt", "chat_template_kwargs", "tools"])
def test_what_is_for_chats_is_refused_elsewhere(tmp_path: Path, kind: str, key: str) -> None:
    error = parsed(tmp_path, {kind: KINDS[kind], key: True}).prompt
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.reason) == (key, "UNKNOWN_OPTION")


def test_texts_to_train_on_have_no_keys_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "contrast.jsonl"
    path.write_text(json.dumps({"positive": "a", "negative": "b", "continue_final_message": True}))
    with pytest.raises(InvalidRequest) as refused:
        read_contrast(path)
    assert refused.value.field == "line 1.positive.continue_final_message"


def test_texts_may_have_their_special_tokens_already(tmp_path: Path) -> None:
    text = TextPrompt(text="<s>Hello", add_special_tokens=False)
    assert parsed(tmp_path, {"text": "<s>Hello", "add_special_tokens": False}) == ParsedPrompt(prompt=text)
    path = tmp_path / "contrast.jsonl"
    sides = {"positive": "<s>I feel great", "negative": "<s>I feel bad"}
    path.write_text(json.dumps({**sides, "add_special_tokens": False}))
    [pair] = read_contrast(path)
    [target] = targets_of([pair])
    for prompt in (pair.positive, pair.negative, target.prompt, target.whole):
        assert isinstance(prompt, TextPrompt)
        assert not prompt.add_special_tokens


def test_chats_have_no_keys_of_texts(tmp_path: Path) -> None:
    error = parsed(tmp_path, {"messages": [USER], "add_special_tokens": False}).prompt
    assert isinstance(error, InvalidRequest)
    assert error.field == "add_special_tokens"
    with pytest.raises(InvalidRequest) as refused:
        trained(tmp_path, [USER], add_special_tokens=False)
    assert refused.value.field == "line 1.positive.add_special_tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_other_keys_are_the_user_s_own(tmp_path: Path, kind: str) -> None:
    own = {"label": 1, "model": "gpt", "n": 3, "seed": 7, "stop": "Alexanderplatz", "tool": "none", "topic": "geo"}

    read = parsed(tmp_path, {kind: KINDS[kind], "id": 4, **own})

    assert not isinstance(read.prompt, Exception)
    assert (read.id, read.fields) == (4, own)
