"""How commands take one prompt: as an argument, from a file or from a pipe.

It is a text, a user's message or a line of a file, with the options of a chat.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from steer_service.cli.arguments import UsageError
from steer_service.cli.capture.prompts import prompt_from_line, prompt_from_object
from steer_service.core.errors import within
from steer_service.core.prompt import Prompt, TextPrompt
from steer_service.runtime.chat_lines import CHAT_KEYS


def add_prompt_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds PROMPT, which is `what`, and how it becomes tokens: all that `prompt_of` reads."""
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help=f"{what}; - or nothing reads it from standard input"
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read PROMPT from a file. Of a file or a pipe, one line end at its end is left out.",
    )
    parser.add_argument(
        "--chat", action="store_true", help="send PROMPT as a user's message, through the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before it; implies --chat")
    parser.add_argument(
        "--line", action="store_true", help="PROMPT is JSON: a line of a file for `steer capture`, such as a whole chat"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="arguments of the chat template, as a JSON object; needs --chat or --line, as the next three",
    )
    parser.add_argument("--tools", metavar="JSON", help="functions that the model may call, as a JSON list")
    parser.add_argument(
        "--add-generation-prompt",
        action=argparse.BooleanOptionalAction,
        help="end the prompt with the header of the model's turn (default: unless a message is continued)",
    )
    parser.add_argument(
        "--continue-final-message",
        action=argparse.BooleanOptionalAction,
        help="let the model continue the last message (default: if it is an assistant's)",
    )
    parser.add_argument(
        "--no-special-tokens", action="store_true", help="for a PROMPT that has its BOS token already: add none"
    )


def prompt_of(namespace: argparse.Namespace) -> Prompt:
    """The prompt that the command line gives; raises UsageError or InvalidRequest."""
    given = {key: getattr(namespace, key) for key in CHAT_KEYS if getattr(namespace, key) is not None}
    is_chat = namespace.chat or namespace.system is not None
    if is_chat and namespace.line:
        option = "--chat" if namespace.chat else "--system"
        raise UsageError(f"{option} is for a text, and with --line PROMPT is JSON; choose one of them")
    if given and not (is_chat or namespace.line):
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} needs --chat or --line")
    if is_chat and namespace.no_special_tokens:
        raise UsageError("--no-special-tokens is for texts; a chat's template has its own")
    if namespace.tools is not None:
        given["tools"] = _tools_from(namespace.tools)
    text = _text_of(namespace)
    adds_special_tokens = not namespace.no_special_tokens
    with within("prompt"):
        if namespace.line:
            return prompt_from_line(text, given, add_special_tokens=adds_special_tokens)
        if not is_chat:
            return TextPrompt(text=text, add_special_tokens=adds_special_tokens)
        messages = [{"role": "user", "content": text}]
        if namespace.system is not None:
            messages.insert(0, {"role": "system", "content": namespace.system})
        return prompt_from_object({"messages": messages, **given}, add_special_tokens=adds_special_tokens)


def _text_of(namespace: argparse.Namespace) -> str:
    """PROMPT, or what the file or standard input has; raises UsageError."""
    file, prompt = namespace.prompt_file, namespace.prompt
    if file is not None:
        if prompt is not None:
            raise UsageError("--prompt-file: PROMPT is given too; choose one of them")
        try:
            return _decoded(Path(file).read_bytes(), "--prompt-file")
        except OSError as error:
            raise UsageError(f"--prompt-file: {file} cannot be read: {error.strerror}") from error
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise UsageError("PROMPT is missing: give it as an argument, in a pipe, or with --prompt-file")
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(content: bytes, source: str) -> str:
    """The text without one line end at its end, which editors and `echo` add."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: byte {error.start} is not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _tools_from(text: str) -> list[Any]:
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--tools: not JSON: {error}") from None
    if not isinstance(tools, list):
        raise UsageError("--tools: expected a list of functions")
    return tools
