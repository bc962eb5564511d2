"""Long texts: their beginning, or windows in which every token has one row."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_client import InvalidRequest, ModelInfo, SteeringSpec, load_captures, spec_to_json
from steer_service.cli.capture.windows import Cutting, requests_of, windows_of
from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.testing.fake_backend import FAKE_MODEL, decode_row
from tests.cli.capture.command import Expected, errors_in, fake, run, tokens_of, words, write_lines
from tests.client.conftest import Serve

SHORT = replace(FAKE_MODEL, max_model_len=256)
LENGTHS = (255, 256, 257, 2000)


def rows_only(scope: object = None) -> GenerateRequest:
    capture = CaptureSpec(layers=(1,), positions=scope)
    return GenerateRequest(prompt=TokenPrompt(token_ids=(0,)), sampling=SamplingOptions(max_tokens=0), capture=capture)


def captured_positions(count: int, cutting: Cutting, special: tuple[int, ...] = (), scope: object = None) -> Counter:
    """How often each position is captured; checks the tokens of each window and their context."""
    model, tokens = replace(FAKE_MODEL, special_token_ids=special), tuple(range(100, 100 + count))
    found: Counter[int] = Counter()
    for window, request in requests_of(rows_only(scope), tokens, cutting, model):
        sent = request.prompt.token_ids
        assert len(sent) <= cutting.context
        for first, end in request.capture.positions.resolve(len(sent), len(sent), None):
            for position in range(first, end):
                whole = position + window.offset
                assert sent[position] == tokens[whole]
                assert position >= min(whole, cutting.context - cutting.stride)
                found[whole] += 1
        if special:
            assert sent[0] == tokens[0]
    return found


@pytest.mark.parametrize("special", [(), (100,)], ids=["plain", "bos"])
@pytest.mark.parametrize(("context", "stride"), [(2, 1), (8, 3), (8, 7), (16, 8)])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 100])
def test_every_token_has_one_row_with_enough_context(
    count: int, context: int, stride: int, special: tuple[int, ...]
) -> None:
    cutting = Cutting(context=context, stride=stride)
    assert captured_positions(count, cutting, special) == Counter(range(count))


def test_windows_begin_a_stride_apart() -> None:
    windows = list(windows_of(20, Cutting(context=8, stride=3), ()))
    assert [(one.start, one.end, one.first) for one in windows] == [
        (0, 8, 0),
        (3, 11, 8),
        (6, 14, 11),
        (9, 17, 14),
        (12, 20, 17),
    ]
    assert [one.offset for one in windows_of(20, Cutting(context=8, stride=3), (100,))] == [0, 3, 6, 9, 12]


def test_positions_are_those_of_the_whole_text() -> None:
    cutting = Cutting(context=8, stride=4)
    assert captured_positions(30, cutting, scope=[2, range(9, 14), -1]) == Counter([2, *range(9, 14), 29])
    assert captured_positions(30, cutting, (100,), scope="skip_special_tokens") == Counter(range(1, 30))
    with pytest.raises(InvalidRequest):
        captured_positions(5, cutting, scope=[-6])


def capture(
    serve: Serve, tmp_path: Path, *flags: object, lines: list[object] | None = None, info: ModelInfo = SHORT
) -> tuple[int, list]:
    server = serve(fake(info))
    lines = [words(count, index) for index, count in enumerate(LENGTHS)] if lines is None else lines
    prompts = write_lines(tmp_path / "prompts.jsonl", [json.dumps(line) for line in lines])
    status = run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out", *flags)
    return status, server.backend.requests


def test_a_text_that_is_too_long_fails_with_advice(serve: Serve, tmp_path: Path) -> None:
    status, _ = capture(serve, tmp_path)
    assert status == 1
    Expected({index: tokens_of(words(LENGTHS[index], index)) for index in (0, 1)}).check(tmp_path / "out")
    for error in errors_in(tmp_path / "out"):
        assert error["reason"] == "PROMPT_TOO_LONG"
        assert error["advice"].startswith("the longest prompt has 256 tokens: ")
        for option in ("--truncate ", "--truncate-prompt-tokens K", "--context N", "--stride M"):
            assert option in error["advice"]


def test_truncate_keeps_the_beginning(serve: Serve, tmp_path: Path) -> None:
    status, _ = capture(serve, tmp_path, "--truncate")
    assert status == 0
    kept = {index: tokens_of(words(count, index))[:256] for index, count in enumerate(LENGTHS)}
    Expected(kept).check(tmp_path / "out")
    [shard] = load_captures(tmp_path / "out")
    assert [entry.get("truncated", False) for entry in shard.prompts] == [False, False, True, True]


def test_truncate_keeps_one_token_less_where_the_engine_takes_less(serve: Serve, tmp_path: Path) -> None:
    """An engine at the model's own maximum length."""
    full = replace(SHORT, max_prompt_tokens=SHORT.max_model_len - 1)
    status, requests = capture(serve, tmp_path, "--truncate", info=full, lines=[words(300, 0), words(256, 1)])
    assert status == 0
    Expected({index: tokens_of(words(300 - 44 * index, index))[:255] for index in (0, 1)}).check(tmp_path / "out")
    assert [len(request.prompt.token_ids) for request in requests] == [255, 255]


def test_no_window_is_longer_than_the_longest_prompt(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = replace(SHORT, max_prompt_tokens=SHORT.max_model_len - 1)
    assert capture(serve, tmp_path, "--context", 256, info=full)[0] == 2
    assert "steer: --context: 256 is above the longest prompt, 255 tokens" in capsys.readouterr().err
    assert capture(serve, tmp_path, "--context", 255, info=full)[0] == 0


def test_windows_give_each_token_of_a_text_one_row(serve: Serve, tmp_path: Path) -> None:
    spec = json.dumps(spec_to_json(SteeringSpec.simple_add(1, np.ones(8))))
    status, requests = capture(serve, tmp_path, "--context", 128, "--stride", 100, "--steering", spec)
    assert status == 0
    shards = list(load_captures(tmp_path / "out"))
    tensors = {name: np.concatenate([shard.tensors[name] for shard in shards]) for name in shards[0].tensors}
    for index, count in enumerate(LENGTHS):
        of_text = tensors["prompt_index"] == index
        assert tensors["position"][of_text].tolist() == list(range(count))
        assert tensors["token_id"][of_text].tolist() == list(tokens_of(words(count, index)))
        numbers = tensors["window"][of_text]
        assert numbers.tolist() == [0] * 128 + [1 + (position - 128) // 100 for position in range(128, count)]
        # The fake model's rows have the position in the request: that is the one of the window run alone.
        places = [decode_row(row)[1] for row in tensors["layer_1.after"][of_text]]
        assert places == [position - 100 * int(number) for position, number in zip(range(count), numbers, strict=True)]
    assert tensors["is_steered"].all()
    assert max(len(request.prompt.token_ids) for request in requests) == 128
    entry = shards[-1].prompts[-1]
    assert (entry["prompt_tokens"], entry["rows"], len(entry["windows"])) == (2000, 2000, 20)
    assert entry["windows"][1] == {"window": 1, "start": 100, "end": 228, "first_captured": 128}


def content_of(folder: Path) -> list[object]:
    """The manifest, the lines and the tensors of a data set."""
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    return [texts, [{name: rows.tolist() for name, rows in one.tensors.items()} for one in load_captures(folder)]]


def test_the_same_command_resumes_and_another_one_is_refused(serve: Serve, tmp_path: Path) -> None:
    flags = ("--context", 128, "--stride", 64)
    assert capture(serve, tmp_path, *flags, "--shard-mb", 0.001)[0] == 0
    before = content_of(tmp_path / "out")
    lines = (tmp_path / "out" / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "manifest.jsonl").write_bytes(b"".join(lines[:3]))

    status, requests = capture(serve, tmp_path, *flags, "--shard-mb", 0.001)

    assert status == 0
    assert requests
    assert content_of(tmp_path / "out") == before
    for other in ((), ("--truncate",), ("--context", 128), ("--context", 128, "--stride", 63)):
        expected = 0 if other == ("--context", 128) else 2  # half of the context is the default
        assert capture(serve, tmp_path, *other)[0] == expected


def test_token_ids_are_cut_and_a_chat_is_not(serve: Serve, tmp_path: Path) -> None:
    ids = list(range(300))
    chat = [{"role": "user", "content": words(300, 0)}]
    status, _ = capture(serve, tmp_path, "--truncate", lines=[{"token_ids": ids}, {"messages": chat}])
    assert status == 1
    Expected({0: tuple(ids[:256])}).check(tmp_path / "out")
    [error] = errors_in(tmp_path / "out")
    assert error["reason"] == "PROMPT_TOO_LONG"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stride", 5], "--stride needs --context"),
        (["--truncate", "--context", 9], "--truncate and --context: choose one of them"),
        (["--truncate", "--truncate-prompt-tokens", 9], "--truncate and --truncate-prompt-tokens: choose"),
        (["--context", 1], "--context: 1 is not at least 2"),
        (["--context", 9, "--stride", 9], "--stride: 9 is outside 1..8, below --context"),
        (["--context", 9, "--stride", 0], "--stride: 0 is outside 1..8, below --context"),
        (["--context", 9, "--max-tokens", 2], "--context is for prompts alone: it needs --max-tokens 0"),
        (["--context", 9, "--pooling", "mean"], "--context: the rows of several windows are not pooled"),
        (["--context", 257], "--context: 257 is above the longest prompt, 256 tokens"),
        (
            ["--context", 9, "--steering", '{"layers": {"1": []}, "positions": "prompt"}'],
            "--context: steering with positions is for whole prompts",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(
    flags: list[object], said: str, serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, requests = capture(serve, tmp_path, *flags)
    assert (status, requests) == (2, [])
    assert f"steer: {said}" in capsys.readouterr().err
