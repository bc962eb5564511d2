"""Contrastive prompts: pairs of a prompt that shows a property and one that shows the opposite, one pair per line."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer_service.core.errors import InvalidRequest, within
from steer_service.core.prompt import Prompt
from steer_service.runtime.chat_lines import CHAT_KEYS, TEXT_KEYS, chat_from_line, check_line_keys, text_from_line

SIDES = ("positive", "negative")
"""The keys of a line, both required."""

EXAMPLE = '{"positive": "Today I feel great", "negative": "Today I feel grim"}'
"""A line."""


@dataclass(frozen=True, slots=True)
class ContrastPair:
    """Two prompts that differ in the property that a direction represents."""

    positive: Prompt
    """The prompt that shows the property."""
    negative: Prompt
    """The prompt that shows the opposite."""
    line: int = field(default=0, compare=False)
    """The line of its file, counted from 1; 0 if it is of no file."""


def read_contrast(path: str | Path) -> list[ContrastPair]:
    """The pairs of a JSONL file, in order; empty lines are skipped.

    A line is an object with `positive` and `negative`, each text or a chat: a list of {"role": ..., "content": ...}.
    The keys of `chat_lines.CHAT_KEYS` and TEXT_KEYS apply to both sides of a line. By default, a chat that ends with an
    assistant's message is read as the beginning of a response, without the template's end of a message. Raises
    InvalidRequest, with the line in its field, for another object, and for a file without pairs or with only one side;
    OSError if the file cannot be read.
    """
    documents = [(number, _document(number, line)) for number, line in _filled_lines(Path(path))]
    if not documents:
        raise InvalidRequest(
            "the file is empty; expected lines with positive and negative", reason="EMPTY_CONTRAST", field="contrast"
        )
    _check_sides(document for _, document in documents)
    return [_pair(number, document) for number, document in documents]


def split_pairs(
    pairs: Sequence[ContrastPair], *, held_out: float = 0.25, seed: int = 0
) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """(training pairs, held-out pairs), both in the order of `pairs`; the same seed gives the same split.

    `held_out` is the share that is held out, rounded, at least one pair. Raises InvalidRequest if no pair would be
    left for training.
    """
    if not 0.0 < held_out < 1.0:
        raise InvalidRequest(f"{held_out} is not between 0 and 1", reason="OUT_OF_RANGE", field="held_out")
    count = max(1, round(held_out * len(pairs)))
    if count >= len(pairs):
        raise InvalidRequest(
            f"{len(pairs)} pairs are too few to hold {held_out:.0%} of them out", reason="TOO_FEW_PAIRS", field="pairs"
        )
    chosen = set(random.Random(seed).sample(range(len(pairs)), count))
    return (
        [pair for index, pair in enumerate(pairs) if index not in chosen],
        [pair for index, pair in enumerate(pairs) if index in chosen],
    )


def _filled_lines(path: Path) -> list[tuple[int, bytes]]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _document(number: int, line: bytes) -> dict[str, Any]:
    with within(f"line {number}"):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for text that is not UTF-8
            raise InvalidRequest(f"not JSON: {error}; expected a line such as {EXAMPLE}", reason="BAD_JSON") from None
        if not isinstance(document, dict):
            raise InvalidRequest(
                f"expected an object such as {EXAMPLE}, got {type(document).__name__}", reason="BAD_JSON"
            )
        return document


def _check_sides(documents: Iterable[dict[str, Any]]) -> None:
    """Raises InvalidRequest if no line has one of the sides."""
    there = {side for document in documents for side in SIDES if side in document}
    if len(there) == 1:
        raise InvalidRequest(
            f"every line has only {there.pop()}; a direction needs both sides", reason="ONE_SIDED", field="contrast"
        )


def _pair(number: int, document: dict[str, Any]) -> ContrastPair:
    with within(f"line {number}"):
        check_line_keys(document, (*SIDES, *CHAT_KEYS, *TEXT_KEYS))
        pair = ContrastPair(_side(document, SIDES[0]), _side(document, SIDES[1]), number)
        if pair.positive == pair.negative:
            raise InvalidRequest("positive and negative are the same", reason="SAME_SIDES")
        return pair


def _side(document: dict[str, Any], side: str) -> Prompt:
    if side not in document:
        raise InvalidRequest("it is missing; a line has positive and negative", reason="MISSING_SIDE", field=side)
    value = document[side]
    with within(side):
        is_text = isinstance(value, str)
        for key in CHAT_KEYS if is_text else TEXT_KEYS:
            if key in document:
                kinds = "chats, and this is text" if is_text else "texts, and this is a chat"
                raise InvalidRequest(f"{key} is for {kinds}", reason="UNKNOWN_OPTION", field=key)
        return text_from_line(value, document) if is_text else chat_from_line(value, document)
