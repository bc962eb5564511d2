"""The prompts of `steer capture`: one per line, as text or JSON, read when they are needed."""

import codecs
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from steer_service.cli.capture.endable_file import EndableFile
from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.core.prompt import Prompt, TextPrompt, TokenPrompt
from steer_service.runtime.chat_lines import CHAT_KEYS, TEXT_KEYS, chat_from_line, check_line_keys, text_from_line

KINDS = ("text", "token_ids", "messages")
"""The keys of which a JSON line has exactly one."""

KEYS_OF_KIND = {"text": TEXT_KEYS, "messages": CHAT_KEYS}
"""Kind -> further keys of a line that has it."""

HEAD_BYTES = 1 << 13
"""Bytes of a file by which it is judged whether it is text."""

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One line that is not empty."""

    index: int
    """Which of them, from 0."""
    number: int
    """Which line of the file, from 1."""
    content: bytes
    """Its content, without the line's end."""
    digest: str
    """SHA-256 of all lines up to this one: equal digests, equal prompts so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedPrompt:
    """One line, parsed."""

    prompt: Prompt | SteerError
    """The prompt, or the error in the line."""
    id: str | int | None = None
    """The user's name for it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of its object, for readers of the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """A file of prompts, opened."""

    lines: Iterator[PromptLine]
    """Its prompts."""
    is_json: bool
    """True if each line is JSON."""
    total: int | None
    """How many there are; None if that is not known before they are read."""
    end: Callable[[], None]
    """Ends the file for whoever reads its lines, also in another thread."""
    add_special_tokens: bool = True
    """False: texts get no special tokens, unless their line says that they do."""

    def read(self, line: PromptLine) -> ParsedPrompt:
        """The prompt in `line`."""
        parse = _parse_json_line if self.is_json else _parse_text_line
        return parse(line.content, self.add_special_tokens)


@contextmanager
def open_prompts(name: str, form: str = "auto", *, add_special_tokens: bool = True) -> Iterator[PromptSource]:
    """The prompts of the file `name`, or of standard input for `-`; raises OSError if there is no such file.

    `form` is text, jsonl or auto: a file is JSON if its name ends so, or if its first line is a JSON object and its
    name does not end in .txt. `add_special_tokens` is that of texts whose line does not say.
    """
    if name == "-":
        with _source(sys.stdin.buffer, name, form, None, add_special_tokens) as source:
            yield source
        return
    with Path(name).open("rb") as file:
        total = sum(1 for _ in filled_lines(file)) if file.seekable() else None
        if total is not None:
            os.lseek(file.fileno(), 0, os.SEEK_SET)  # the lines are read from the descriptor, past the buffer of `file`
        with _source(file, name, form, total, add_special_tokens) as source:
            yield source


def is_binary(path: Path) -> bool:
    """True for an image, an archive and other files that are no lines of UTF-8, judged by their beginning.

    A single line that is not UTF-8 fails alone; a file of such lines has a zero byte too.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return b"\0" in head
    return False


def filled_lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, each with its number from 1 and without its end."""
    for number, raw in enumerate(file, start=1):
        content = raw.rstrip(b"\r\n")
        if number == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
        if content.strip():
            yield number, content


def prompt_from_line(text: str, options: Mapping[str, Any], *, add_special_tokens: bool) -> Prompt:
    """The prompt in a line of JSON; raises InvalidRequest with the key. `add_special_tokens`: unless the line says.

    `options`: further keys, which the line does not have.
    """
    document = _document(text)
    for key in options:
        if key in document:
            raise InvalidRequest("the line has it, and so do the options; choose one of them", field=key)
    return prompt_from_object({**document, **options}, add_special_tokens=add_special_tokens)


@contextmanager
def _source(
    file: BinaryIO, name: str, form: str, total: int | None, add_special_tokens: bool
) -> Iterator[PromptSource]:
    with EndableFile(file.fileno()) as raw, io.BufferedReader(raw) as reader:
        filled = filled_lines(reader)
        first = list(itertools.islice(filled, 1))
        yield PromptSource(
            lines=_numbered(itertools.chain(first, filled)),
            is_json=_is_json(name, first) if form == "auto" else form == "jsonl",
            total=total,
            end=raw.end,
            add_special_tokens=add_special_tokens,
        )


def _numbered(filled: Iterable[tuple[int, bytes]]) -> Iterator[PromptLine]:
    digest = hashlib.sha256()
    for index, (number, content) in enumerate(filled):
        digest.update(content + b"\n")
        yield PromptLine(index=index, number=number, content=content, digest=digest.hexdigest())


def _is_json(name: str, first: list[tuple[int, bytes]]) -> bool:
    suffix = Path(name).suffix.lower()
    if suffix in JSON_SUFFIXES or suffix == ".txt" or not first:
        return suffix in JSON_SUFFIXES
    try:
        return isinstance(json.loads(first[0][1]), dict)
    except ValueError:
        return False


def _parse_text_line(content: bytes, add_special_tokens: bool) -> ParsedPrompt:
    try:
        return ParsedPrompt(prompt=TextPrompt(text=_decoded(content), add_special_tokens=add_special_tokens))
    except InvalidRequest as error:
        return ParsedPrompt(prompt=error)


def _parse_json_line(content: bytes, add_special_tokens: bool) -> ParsedPrompt:
    document: Any = None
    try:
        document = _document(_decoded(content))
        prompt: Prompt | SteerError = prompt_from_object(document, add_special_tokens=add_special_tokens)
    except InvalidRequest as error:
        prompt = error
    if not isinstance(document, dict):
        return ParsedPrompt(prompt=prompt)
    name = document.get("id")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        prompt, name = InvalidRequest("it is neither text nor a whole number", reason="BAD_JSON", field="id"), None
    fields = {key: value for key, value in document.items() if key not in (*KINDS, *CHAT_KEYS, *TEXT_KEYS, "id")}
    return ParsedPrompt(prompt=prompt, id=name, fields=fields)


def _document(text: str) -> dict[str, Any]:
    document = _json(text)
    if isinstance(document, str):
        document = {"text": document}
    if not isinstance(document, dict):
        raise InvalidRequest("a line is an object or a string", reason="BAD_JSON")
    return document


def prompt_from_object(document: Mapping[str, Any], *, add_special_tokens: bool) -> Prompt:
    """The prompt in an object of a line; raises InvalidRequest with the key."""
    given = [kind for kind in KINDS if kind in document]
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise InvalidRequest(f"a line has one of {', '.join(KINDS)}, this one has {found}", reason="BAD_JSON")
    value = document[given[0]]
    check_line_keys(document, (given[0], "id", *KEYS_OF_KIND.get(given[0], ())))
    match given[0]:
        case "text":
            return text_from_line(value, document, add_special_tokens=add_special_tokens)
        case "token_ids":
            if not isinstance(value, list):
                raise InvalidRequest("token ids are a list of numbers", reason="BAD_TOKEN", field="token_ids")
            return TokenPrompt(token_ids=tuple(value))
        case _:
            return chat_from_line(value, document)


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"byte {error.start} of the line is not UTF-8", reason="BAD_TEXT") from None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"not JSON: {error}", reason="BAD_JSON") from None
