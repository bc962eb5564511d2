"""Contrastive prompts: what is read, what is refused and where, and how they are split."""

import json
from pathlib import Path

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import ChatMessage, ChatPrompt, TextPrompt
from steer_service.directions.contrast import ContrastPair, read_contrast, split_pairs

GOOD = '{"positive": "a", "negative": "b"}'
QUESTION, ANSWER = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well"}


def written(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "contrast.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def pairs_of(count: int) -> list[ContrastPair]:
    return [ContrastPair(TextPrompt(text=f"+{index}"), TextPrompt(text=f"-{index}")) for index in range(count)]


def test_texts_and_chats_are_read_in_their_order(tmp_path: Path) -> None:
    chat = json.dumps({"positive": [QUESTION, ANSWER], "negative": [QUESTION], "note": "of no concern"})
    texts, chats = read_contrast(written(tmp_path, "\ufeff" + GOOD, "", "  \r", chat))
    assert texts == ContrastPair(TextPrompt(text="a"), TextPrompt(text="b"))
    question, answer = ChatMessage(**QUESTION), ChatMessage(**ANSWER)
    assert chats.positive == ChatPrompt(messages=(question, answer), continue_final_message=True)
    assert chats.negative == ChatPrompt(messages=(question,))


BAD = {
    "not JSON": ([GOOD, "{"], "line 2", "BAD_JSON"),
    "not UTF-8": ([GOOD, b'"\xff"'], "line 2", "BAD_JSON"),
    "no object": ([GOOD, "", '["a", "b"]'], "line 3", "BAD_JSON"),
    "a side missing": ([GOOD, '{"positive": "a"}'], "line 2.negative", "MISSING_SIDE"),
    "neither side": (['{"text": "a"}'], "line 1.positive", "MISSING_SIDE"),
    "one-sided": (['{"negative": "a"}', '{"negative": "b"}'], "contrast", "ONE_SIDED"),
    "empty": (["", " "], "contrast", "EMPTY_CONTRAST"),
    "sides alike": (['{"positive": "a", "negative": "a"}'], "line 1", "SAME_SIDES"),
    "an empty text": ([GOOD, '{"positive": "a", "negative": ""}'], "line 2.negative.text", "EMPTY_PROMPT"),
    "an empty chat": (['{"positive": [], "negative": "b"}'], "line 1.positive.messages", "EMPTY_PROMPT"),
    "a number": (['{"positive": 3, "negative": "b"}'], "line 1.positive.messages", "INVALID_REQUEST"),
    "a turn that is none": (
        ['{"positive": [{"role": 1}], "negative": "b"}'],
        "line 1.positive.messages[0].role",
        "BAD_TEXT",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_with_the_line(tmp_path: Path, what: str) -> None:
    lines, field, reason = BAD[what]
    with pytest.raises(InvalidRequest) as refused:
        read_contrast(written(tmp_path, *lines))
    assert (refused.value.field, refused.value.reason) == (field, reason)


@pytest.mark.parametrize("count", [2, 7, 40])
def test_a_split_keeps_every_pair_once_and_is_repeatable(count: int) -> None:
    pairs = pairs_of(count)
    train, held_out = split_pairs(pairs, held_out=0.25, seed=3)
    assert len(held_out) == max(1, round(count / 4))
    assert sorted([*train, *held_out], key=pairs.index) == pairs
    assert (train, held_out) == split_pairs(pairs, held_out=0.25, seed=3)


def test_another_seed_holds_out_others() -> None:
    assert split_pairs(pairs_of(40), seed=0) != split_pairs(pairs_of(40), seed=1)


@pytest.mark.parametrize(("count", "share", "field"), [(1, 0.5, "pairs"), (3, 0.9, "pairs"), (4, 1.0, "held_out")])
def test_a_split_that_leaves_nothing_is_refused(count: int, share: float, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        split_pairs(pairs_of(count), held_out=share)
    assert refused.value.field == field
