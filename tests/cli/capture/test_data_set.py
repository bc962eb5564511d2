"""What `steer capture` writes."""

import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from steer_client import (
    CaptureSite,
    InvalidRequest,
    SteeringSpec,
    Unsupported,
    load_captures,
    spec_to_json,
)
from steer_service.core.capture import Pooling
from steer_service.core.events import Event, Started
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.formats.capture_dataset import LABELS
from steer_service.runtime.pooling import pooled
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.cli.capture.command import (
    BFLOAT,
    TINY_SHARD,
    Expected,
    expect,
    fake,
    placed,
    run,
    texts,
    tokens_of,
    words,
    write_lines,
)
from tests.client.conftest import Serve, Server


def test_each_line_of_a_text_file_is_a_prompt(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = texts(20)
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(("\ufeff" + "\r\n\n  \n".join(lines)).encode())  # a mark, empty lines, no end of the last

    status = run(prompts, "--address", server.address, "--layers", "0,2-3", "--out", tmp_path / "out")

    assert status == 0
    expect(lines, layers=(0, 2, 3)).check(tmp_path / "out")
    said = capsys.readouterr()
    assert said.out == ""
    assert "prompts: 20/20 [" in said.err
    assert f"steer: 20 prompts in 1 shard in {tmp_path / 'out'}" in said.err
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_the_manifest_has_the_special_tokens_of_the_model(serve: Serve, tmp_path: Path):
    server = serve(fake(replace(FAKE_MODEL, special_token_ids=(1, 2, 31_999))))
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"token_ids": [1, 5, 2]}])

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0

    head = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert head["special_token_ids"] == [1, 2, 31_999]


def test_json_lines_are_texts_tokens_and_chats(server: Server, tmp_path: Path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how are you"}]
    lines = [
        {"text": "a b c", "id": "first", "label": 1},
        {"token_ids": [5, 6, 7, 8]},
        {"messages": chat, "id": 17},
        json.dumps("just text"),
    ]

    status = run(
        write_lines(tmp_path / "prompts.jsonl", lines),
        *("--address", server.address, "--layers", 1, "--max-tokens", 3, "--out", tmp_path / "out"),
    )

    assert status == 0
    chat_tokens = tokens_of("<system> be brief <user> how are you <assistant>")
    prompts = {0: tokens_of("a b c"), 1: (5, 6, 7, 8), 2: chat_tokens, 3: tokens_of("just text")}
    Expected(prompts, max_tokens=3).check(tmp_path / "out")
    [shard] = load_captures(tmp_path / "out")
    assert [entry["id"] for entry in shard.prompts] == ["first", None, 17, None]
    assert [entry.get("fields") for entry in shard.prompts] == [{"label": 1}, None, None, None]
    assert [entry["generated_tokens"] for entry in shard.prompts] == [3] * 4
    assert shard.prompts[2]["messages"] == [
        {"role": "system", "start": 1, "end": 3},
        {"role": "user", "start": 4, "end": 7},
    ]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_texts_that_have_their_special_tokens_get_none(server: Server, tmp_path: Path, name: str):
    lines = ["<s> a", "<s> b"] if name.endswith("txt") else [{"text": "<s> a"}, '"<s> b"']
    more = [] if name.endswith("txt") else [{"text": "c", "add_special_tokens": True}, {"token_ids": [1]}]
    prompts = write_lines(tmp_path / name, [*lines, *more])
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--no-special-tokens") == 0

    sent = sorted((request.prompt for request in server.backend.requests), key=repr)
    assert sent[:2] == [TextPrompt(text=text, add_special_tokens=False) for text in ("<s> a", "<s> b")]
    assert sent[2:] == [TextPrompt(text="c"), TokenPrompt(token_ids=(1,))][: len(more)]
    assert run(*arguments) == 2  # a folder of other arguments


class Ordered(FakeBackend):
    """A backend whose requests may have a priority."""

    has_priority = True


def test_requests_have_the_priority_of_the_command_line(serve: Serve, tmp_path: Path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"text": "a b"}])

    server = serve(Ordered())
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")
    assert run(*arguments, "--delivery", "inline", "--priority", 3) == 0
    assert [request.priority for request in server.backend.requests] == [3]


def test_long_prompts_are_cut_to_their_last_tokens(server: Server, tmp_path: Path):
    lines = ["a b c d e", "f", {"messages": [{"role": "user", "content": "how are you"}]}]
    prompts = write_lines(tmp_path / "prompts.jsonl", [json.dumps(line) for line in lines])
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--truncate-prompt-tokens", 3) == 0

    kept = {0: tokens_of("c d e"), 1: tokens_of("f"), 2: tokens_of("are you <assistant>")}
    Expected(kept, max_tokens=0).check(tmp_path / "out")
    [shard] = load_captures(tmp_path / "out")
    assert shard.prompts[2]["messages"] == [{"role": "user", "start": 0, "end": 2}]
    assert run(*arguments) == 2  # a folder of other arguments


class WithoutPlaces(FakeBackend):
    """A model whose template does not tell where its messages are."""

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        async with aclosing(super().submit(request)) as events:
            async for event in events:
                if isinstance(event, Started):
                    event = replace(event, message_boundaries=(), boundaries_missing_reason="it repeats texts")
                yield event


def test_a_chat_without_places_of_its_messages_says_why(serve: Serve, tmp_path: Path):
    chat = [{"role": "user", "content": "how are you"}]
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"messages": chat}])

    server = serve(WithoutPlaces(place=placed))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0

    [shard] = load_captures(tmp_path / "out")
    assert "messages" not in shard.prompts[0]
    assert shard.prompts[0]["messages_missing_reason"] == "it repeats texts"


def test_rows_sites_and_steering_are_chosen(serve: Serve, tmp_path: Path):
    server = serve(fake(BFLOAT))
    spec = SteeringSpec.simple_add(1, [1.0] * 8)
    lines = texts(9)

    status = run(
        write_lines(tmp_path / "prompts.txt", lines),
        *("--address", server.address, "--layers", "1,3", "--site", "both", "--positions=-1,generated"),
        *("--max-tokens", 3, "--temperature", 0, "--seed", 5, "--out", tmp_path / "out"),
        *("--steering", json.dumps(spec_to_json(spec)), "--steer-positions", "generated"),
    )

    assert status == 0
    expect(
        lines,
        layers=(1, 3),
        sites=(CaptureSite.BEFORE, CaptureSite.AFTER),
        positions=lambda length: range(length - 1, length + 2),
        max_tokens=3,
        dtype="bfloat16",
    ).check(tmp_path / "out")
    [shard] = load_captures(tmp_path / "out")
    assert shard.tensors["is_steered"].tolist() == [False, True, True] * 9
    request = server.backend.requests[0]
    assert request.steering == replace(spec, positions="generated")
    assert (request.sampling.temperature, request.sampling.seed, request.model) == (0.0, 5, "fake")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_read_by_safetensors(serve: Serve, tmp_path: Path, dtype: str):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    server = serve(fake(BFLOAT))
    run(
        write_lines(tmp_path / "prompts.txt", texts(6)),
        *("--address", server.address, "--layers", 2, "--dtype", dtype, "--out", tmp_path / "out"),
    )
    [ours] = load_captures(tmp_path / "out")

    with safetensors.safe_open(tmp_path / "out" / "capture-00000.safetensors", framework="pt") as theirs:
        assert set(theirs.keys()) == set(ours.tensors)
        hidden = theirs.get_tensor("layer_2.after")
        assert hidden.dtype == getattr(torch, dtype)
        np.testing.assert_array_equal(hidden.float().numpy(), ours.hidden(2))
        for name in LABELS:
            np.testing.assert_array_equal(theirs.get_tensor(name).numpy(), ours.tensors[name])
        about = theirs.metadata()
    assert about["layer_convention"] == "residual stream after decoder block L, 0-based"
    assert (about["model"], about["layers"], about["dtype"], about["version"]) == ("fake", "[2]", dtype, "1")


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_a_prompt_has_one_row_if_its_rows_are_pooled(serve: Serve, tmp_path: Path, pooling: str):
    server = serve(fake(BFLOAT))
    lines = texts(5)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    options = [*("--address", server.address, "--layers", "0,2", "--site", "both")]
    options += ["--max-tokens", 3, "--positions", "0..1,generated"]

    assert run(prompts, *options, "--out", tmp_path / "all") == 0
    assert run(prompts, *options, "--pooling", pooling, "--out", tmp_path / "pooled") == 0

    [whole], [one] = load_captures(tmp_path / "all"), load_captures(tmp_path / "pooled")
    assert len(one) == len(lines)
    dtype = np.float32 if pooling == "mean" else whole.tensors["layer_0.after"].dtype
    for line, (before, after) in enumerate(zip(whole.prompts, one.prompts, strict=True)):
        rows = slice(before["first_row"], before["first_row"] + before["rows"])
        assert (after["first_row"], after["rows"], after["pooled_rows"]) == (line, 1, before["rows"])
        for name in ("layer_0.before", "layer_0.after", "layer_2.before", "layer_2.after"):
            want = pooled(whole.tensors[name][rows], Pooling(pooling))
            assert one.tensors[name].dtype == dtype
            assert np.array_equal(one.tensors[name][line], want[0])
        for name in LABELS:
            assert one.tensors[name][line] == whole.tensors[name][rows][-1]
    head = json.loads((tmp_path / "pooled" / "manifest.jsonl").read_text().splitlines()[0])
    assert (head["pooling"], head["dtype"]) == (pooling, np.dtype(dtype).name)
    assert run(prompts, *options, "--out", tmp_path / "pooled") == 2  # a data set of another kind is not continued


def test_shards_are_no_larger_than_asked_and_keep_a_prompt_together(server: Server, tmp_path: Path):
    lines = [*texts(30), words(100, 30), *texts(5)]

    run(
        write_lines(tmp_path / "prompts.txt", lines),
        *("--address", server.address, "--layers", 1, "--out", tmp_path / "out", *TINY_SHARD),
    )

    expect(lines).check(tmp_path / "out")
    shards = list(load_captures(tmp_path / "out"))
    rows = [len(shard) for shard in shards]
    most = 1048 // (8 * 4 + 18)
    assert sorted(rows)[-1] == 100  # a prompt that is larger than a shard has one of its own
    assert all(count <= most for count in rows if count != 100)
    assert len(rows) > 5
    covered = [shard.about["prompts"] for shard in shards]
    assert [first for first, _ in covered] == [0, *(end for _, end in covered[:-1])]
    assert covered[-1][1] == len(lines)


def test_prompts_come_from_standard_input(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = write_lines(tmp_path / "prompts", ['{"text": "a b"}', '{"token_ids": [3]}'])
    with prompts.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        status = run("-", "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert status == 0
    Expected({0: tokens_of("a b"), 1: (3,)}).check(tmp_path / "out")


def test_an_empty_file_is_an_empty_data_set(server: Server, tmp_path: Path):
    prompts = write_lines(tmp_path / "prompts.txt", [])

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
    assert list(load_captures(tmp_path / "out")) == []


def test_a_data_set_of_another_version_is_not_read(server: Server, tmp_path: Path):
    prompts = write_lines(tmp_path / "prompts.txt", texts(2))
    run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))

    with pytest.raises(Unsupported, match="2 are not supported here"):
        load_captures(tmp_path / "out")


def test_a_layer_that_was_not_captured_is_refused_with_those_that_were(server: Server, tmp_path: Path):
    prompts = write_lines(tmp_path / "prompts.txt", texts(2))
    run(prompts, "--address", server.address, "--layers", "1,2", "--out", tmp_path / "out")
    [shard] = load_captures(tmp_path / "out")

    with pytest.raises(
        InvalidRequest, match=r"layer_0\.after was not captured; .*out has layer_1\.after, layer_2\.after"
    ):
        shard.hidden(0)


def test_a_folder_without_a_data_set_is_refused_by_name(tmp_path: Path):
    with pytest.raises(InvalidRequest, match=r"states is no folder of `steer capture`: its manifest\.jsonl cannot"):
        load_captures(tmp_path / "states")
