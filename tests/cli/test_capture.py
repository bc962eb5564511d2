"""`steer capture` as a user meets it: what it writes, what it says, and what is there after it was killed."""

# ruff: noqa: F811  (fixtures of the client's tests)

import argparse
import asyncio
import collections
import io
import itertools
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from steer_client import (
    CaptureDelivery,
    CaptureSite,
    EngineFailed,
    SteeringSpec,
    Unsupported,
    load_captures,
    spec_to_json,
)
from steer_service.cli.capture import command as capture_command
from steer_service.core.capture import CapturedRows
from steer_service.core.stored_capture import SegmentPlace, in_order
from steer_service.formats.capture_dataset import LABELS, tensor_name
from steer_service.shm.segments import SegmentDirectory
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, encode_row, token_at, words_to_token_ids
from tests.client.conftest import (  # noqa: F401  (fixtures)
    BOUND_S,
    Serve,
    Server,
    dead_address,
    serve,
    short_folder,
)
from tests.shm.folders import open_files_limit

BFLOAT = replace(FAKE_MODEL, dtype="bfloat16")
TINY_SHARD = ("--shard-mb", 0.001)
"""About a thousand bytes: some fifteen rows of one layer of the fake model."""


def placed(captured: CapturedRows) -> tuple[CapturedRows, SegmentPlace, Callable[[], None]]:
    """Rows in a segment of their own, as an engine has them."""
    arrays = in_order(captured)
    starts = [0, *itertools.accumulate(-(-array.nbytes // 64) * 64 for _, _, array in arrays)]
    segment = SegmentDirectory().create(max(starts[-1], 64))
    views: dict[CaptureSite, dict[int, Any]] = {CaptureSite.BEFORE: {}, CaptureSite.AFTER: {}}
    for (layer, site, array), start in zip(arrays, starts, strict=False):
        view = np.ndarray(array.shape, array.dtype, segment.memory, start)
        view[:] = array
        views[site][layer] = view
    offsets = {(layer, site): start for (layer, site, _), start in zip(arrays, starts, strict=False)}
    place = SegmentPlace(name=segment.name, size=segment.size, offsets=offsets)
    rows = replace(captured, before=views[CaptureSite.BEFORE], after=views[CaptureSite.AFTER])
    return rows, place, segment.unlink


def fake(*arguments: Any, **options: Any) -> FakeBackend:
    """A backend that captures into segments, as engines do."""
    return FakeBackend(*arguments, place=placed, **options)


@pytest.fixture
def server(serve: Serve) -> Server:
    return serve(fake())


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("steer capture")
    capture_command.add_arguments(parser)
    return capture_command.run(parser.parse_args([str(argument) for argument in arguments]))


def words(count: int, prompt: int) -> str:
    return " ".join(f"w{prompt}-{number}" for number in range(count))


def texts(count: int) -> list[str]:
    """Prompts of 1 to 7 tokens."""
    return [words(1 + index % 7, index) for index in range(count)]


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def tokens_of(text: str) -> tuple[int, ...]:
    return words_to_token_ids(text, FAKE_MODEL.vocab_size)


@dataclass
class Expected:
    """What a data set must hold: nothing less, nothing twice, in the prompts' order."""

    prompts: dict[int, tuple[int, ...]]
    layers: Sequence[int] = (1,)
    sites: Sequence[CaptureSite] = (CaptureSite.AFTER,)
    positions: Callable[[int], Sequence[int]] | None = None
    """Length of a prompt -> positions captured; None for all."""
    max_tokens: int = 1
    dtype: str = "float32"

    def rows(self) -> Iterator[tuple[int, int, int, bool]]:
        for index, prompt in self.prompts.items():
            generated = [token_at(prompt, 0, n, FAKE_MODEL.vocab_size) for n in range(self.max_tokens - 1)]
            fed = (*prompt, *generated)
            chosen = range(len(fed)) if self.positions is None else self.positions(len(prompt))
            for position in chosen:
                yield index, position, fed[position], position >= len(prompt)

    def check(self, folder: Path) -> None:
        shards = list(load_captures(folder))
        rows = list(self.rows())
        columns = zip(*rows, strict=True)
        for name, column in zip(("prompt_index", "position", "token_id", "is_generated"), columns, strict=True):
            held = np.concatenate([shard.tensors[name] for shard in shards])
            assert held.dtype == LABELS[name]
            assert held.tolist() == list(column), name
        for layer, site in itertools.product(self.layers, self.sites):
            held = np.concatenate([shard.hidden(layer, site) for shard in shards])
            expected = np.stack(
                [encode_row(layer, position, token, FAKE_MODEL, site, self.dtype) for _, position, token, _ in rows]
            )
            assert held.dtype == expected.dtype
            np.testing.assert_array_equal(held, expected)
        names = {tensor_name(layer, site) for layer, site in itertools.product(self.layers, self.sites)}
        assert all(set(shard.tensors) == names | set(LABELS) for shard in shards)
        entries = [entry for shard in shards for entry in shard.prompts]
        assert [entry["prompt_index"] for entry in entries] == list(self.prompts)
        for shard in shards:
            for entry in shard.prompts:
                of_it = shard.tensors["prompt_index"][entry["first_row"] : entry["first_row"] + entry["rows"]]
                assert set(of_it.tolist()) <= {entry["prompt_index"]}
            assert sum(entry["rows"] for entry in shard.prompts) == len(shard)


def expect(lines: Sequence[str], **changes: Any) -> Expected:
    return Expected(prompts={index: tokens_of(line) for index, line in enumerate(lines)}, **changes)


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
        {"role": "system", "start": 0, "end": 3},
        {"role": "user", "start": 3, "end": 7},
    ]


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
        np.testing.assert_array_equal(hidden.float().numpy(), ours.hidden(2).astype(np.float32))
        for name in LABELS:
            np.testing.assert_array_equal(theirs.get_tensor(name).numpy(), ours.tensors[name])
        about = theirs.metadata()
    assert about["layer_convention"] == "residual stream after decoder block L, 0-based"
    assert (about["model"], about["layers"], about["dtype"], about["version"]) == ("fake", "[2]", dtype, "1")


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
    stdin = io.TextIOWrapper(io.BytesIO(b'{"text": "a b"}\n{"token_ids": [3]}\n'))
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

    with pytest.raises(Unsupported, match="2 are not known here"):
        load_captures(tmp_path / "out")


# Resuming


class Permits:
    """A step of the fake backend that lets as many tokens pass as it was told to, in the order in which they come."""

    def __init__(self) -> None:
        self.left = 0
        self._waiting: list[object] = []

    async def __call__(self, number: int) -> None:
        me = object()
        self._waiting.append(me)
        try:
            while self.left <= 0 or self._waiting[0] is not me:
                await asyncio.sleep(0.001)
            self.left -= 1
        finally:
            self._waiting.remove(me)


@contextmanager
def command(*arguments: object, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """`steer capture` in a process of its own, which hears SIGINT even where this one is a background options."""
    line = [*before, "env", "--default-signal=INT", sys.executable, "-m", "steer_service.cli.main", "capture"]
    with subprocess.Popen([*line, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_run_that_is_killed_goes_on_without_loss_or_duplicates(serve: Serve, tmp_path: Path):
    permits = Permits()
    server = serve(fake(step=permits))
    lines = [*texts(40), "ends", "here"]
    lines[13] = words(5000, 13)  # too long
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", "1", "--out", tmp_path / "out", *TINY_SHARD)
    arguments += ("--concurrency", 2)  # when p prompts are finished there, all but two of them were taken here

    for more in (0, 2, 11, 7, 9):
        permits.left = 0
        finished = server.backend.finished
        with command(*arguments) as process:
            server.wait_running(1)
            permits.left = more
            server.wait_until(lambda: server.backend.finished - finished >= more)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.wait(BOUND_S)
        server.wait_idle()
    covered = [shard.about["prompts"][1] for shard in load_captures(tmp_path / "out")]
    assert covered  # some had come, not all
    assert covered[-1] < 40
    permits.left = 1000

    assert run(*arguments) == 1
    expected = expect(lines)
    del expected.prompts[13]
    expected.check(tmp_path / "out")
    assert [error["prompt_index"] for error in errors_in(tmp_path / "out")] == [13]
    known = {"manifest.jsonl", "errors.jsonl"}
    known |= {f"capture-{n:05d}.{kind}" for n in range(len(covered) + 50) for kind in ("jsonl", "safetensors")}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= known


def errors_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]


@pytest.fixture
def half(server: Server, tmp_path: Path) -> Iterator[tuple[list[str], tuple[object, ...]]]:
    """The prompts and the command line of a run of which the first half has been done, in several shards."""
    lines = texts(40)
    prompts = write_lines(tmp_path / "prompts.txt", lines[:20])
    arguments = (prompts, "--address", server.address, "--layers", "1", "--out", tmp_path / "out", *TINY_SHARD)
    assert run(*arguments) == 0
    write_lines(prompts, lines)
    return lines, arguments


def test_what_a_killed_run_left_is_removed_and_nothing_else(half, tmp_path: Path):
    lines, arguments = half
    out = tmp_path / "out"
    number = len(list(load_captures(out)))
    for name in (f"capture-{number:05d}.safetensors", f"capture-{number:05d}.jsonl.part", "errors.jsonl.part"):
        (out / name).write_bytes(b"half of a")
    (out / "notes.txt").write_text("mine")
    (out / "capture-99999.safetensors").write_text("mine")
    with (out / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"shard": "capture-000')

    assert run(*arguments) == 0

    expect(lines).check(out)
    assert not list(out.glob("*.part"))
    assert (out / "notes.txt").read_text() == (out / "capture-99999.safetensors").read_text() == "mine"


def test_a_finished_run_does_nothing_again(half, server: Server, tmp_path: Path):
    lines, arguments = half
    run(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    asked = len(server.backend.requests)

    assert run(*arguments) == 0

    assert len(server.backend.requests) == asked == len(lines)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layers", "1,2"), "layers [1], asked for is [1, 2]"),
        (("--positions=-1",), 'positions null, asked for is "-1"'),
        (("--site", "both"), 'site "after", asked for is "both"'),
        (("--max-tokens", "2"), "max_tokens 1, asked for is 2"),
        (("--seed", "1"), "seed null, asked for is 1"),
    ],
)
def test_other_arguments_are_refused(half, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]):
    _, arguments = half
    capsys.readouterr()

    assert run(*arguments, *more) == 2

    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("steer: --out: ")
    assert error.count("\n") == 1


def test_another_model_and_another_steering_are_refused(
    half,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
):
    _, arguments = half
    other = serve(fake(replace(FAKE_MODEL, name="other")))

    assert run(*arguments, "--address", other.address) == 2
    assert 'model "fake", asked for is "other"' in capsys.readouterr().err
    assert run(*arguments, "--steering", json.dumps(spec_to_json(SteeringSpec.simple_add(1, [1.0] * 8)))) == 2
    assert "steering_digest null" in capsys.readouterr().err


def test_an_adapter_is_chosen_noted_and_not_mixed_with_another(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server = serve(fake(replace(FAKE_MODEL, adapters=("sea", "hill"))))
    lines = texts(3)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--model", "sea") == 0
    expect(lines).check(tmp_path / "out")
    assert {request.model for request in server.backend.requests} == {"sea"}
    about = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert (about["model"], about["adapter"]) == ("fake", "sea")

    for more, asked in ((("--model", "hill"), '"hill"'), ((), "null"), (("--model", "fake"), "null")):
        assert run(*arguments, *more) == 2
        assert f'adapter "sea", asked for is {asked}' in capsys.readouterr().err
    assert run(*arguments, "--model", "sea") == 0
    assert run(*arguments, "--model", "dale") == 1
    assert "model 'dale' is not served here" in capsys.readouterr().err


def test_the_model_may_be_named_and_is_the_same_without_its_name(half, tmp_path: Path):
    lines, arguments = half

    assert run(*arguments, "--model", "fake") == 0

    expect(lines).check(tmp_path / "out")


def test_other_prompts_are_refused(half, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines, arguments = half
    capsys.readouterr()
    for changed in ([*lines[:3], "changed", *lines[4:]], lines[:10], []):
        write_lines(tmp_path / "prompts.txt", changed)
        assert run(*arguments) == 2
        said = f"steer: --out: {tmp_path / 'out'} covers 20 prompts, which are not those that PROMPTS begins with\n"
        assert capsys.readouterr().err == said


def test_a_folder_without_a_manifest_is_not_written_over(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "capture-00000.safetensors").write_text("mine")
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path) == 2
    assert "no manifest says what it is" in capsys.readouterr().err
    assert (tmp_path / "capture-00000.safetensors").read_text() == "mine"


def test_two_runs_do_not_write_to_one_folder(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    server = serve(fake(step=Permits()))
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    with command(*arguments):
        server.wait_running(1)
        assert run(*arguments) == 2
    assert "another process writes to" in capsys.readouterr().err


def test_ctrl_c_keeps_what_has_come_and_says_how_to_go_on(serve: Serve, tmp_path: Path):
    permits = Permits()
    server = serve(fake(step=permits))
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    with command(*arguments, "--concurrency", 1) as process:
        permits.left = 9
        server.wait_until(lambda: server.backend.finished == 9 and server.backend.running == 1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=BOUND_S)

    assert process.returncode == 130
    assert f"steer: stopped; {tmp_path / 'out'} covers 9 prompts, the same command goes on from there" in error
    assert "Traceback" not in error
    expect(lines[:9]).check(tmp_path / "out")
    server.wait_idle()
    permits.left = 100
    assert run(*arguments) == 0
    expect(lines).check(tmp_path / "out")


def test_a_disk_without_room_is_one_sentence_and_no_loss(server: Server, tmp_path: Path):
    lines = texts(60)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", "0-3", "--out", tmp_path / "out", "--shard-mb", 0.02)

    with command(*arguments, before=("bash", "-c", 'ulimit -f 8; exec "$@"', "limited")) as process:
        _, error = process.communicate(timeout=BOUND_S)

    assert process.returncode == 1
    assert "File too large" in error
    assert "Traceback" not in error
    assert run(*arguments) == 0
    expect(lines, layers=(0, 1, 2, 3)).check(tmp_path / "out")


# What goes wrong


def test_a_prompt_that_fails_is_noted_and_does_not_stop_the_others(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines: list[object] = [
        {"text": "a b"},
        "{no json",
        {"text": words(5000, 2), "id": "long"},
        {"token_ids": [99_999]},
        {"id": 4},
        {"text": "a", "token_ids": [1]},
        {"messages": [{"role": "user", "text": "hi"}]},
        {"text": "", "id": ["x"]},
        {"text": "c d"},
    ]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    for _ in range(2):
        assert run(*arguments) == 1
        assert f"steer: 7 prompts failed; {tmp_path / 'out' / 'errors.jsonl'} says why\n" in capsys.readouterr().err
        Expected({0: tokens_of("a b"), 8: tokens_of("c d")}).check(tmp_path / "out")
        errors = errors_in(tmp_path / "out")
        assert [error["prompt_index"] for error in errors] == list(range(1, 8))
        assert [error["line"] for error in errors] == list(range(2, 9))
        assert [error["id"] for error in errors] == [None, "long", None, 4, None, None, None]
        assert {error["error"] for error in errors} == {"InvalidRequest"}
        assert [error["reason"] for error in errors[:2]] == ["BAD_JSON", "PROMPT_TOO_LONG"]
        assert errors[5]["field"] == "messages[0]"


def test_fail_fast_stops_at_the_first_and_the_prompt_may_be_mended(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = ["a b", "c", words(5000, 2), "d e"]
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = (prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out")

    assert run(*arguments, "--fail-fast") == 1
    assert "steer: prompt 2 (line 3) failed: " in capsys.readouterr().err
    expect(lines[:2]).check(tmp_path / "out")
    write_lines(prompts, mended := [*lines[:2], "shorter", "d e"])
    assert run(*arguments) == 0
    expect(mended).check(tmp_path / "out")
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_a_failure_of_the_engine_is_of_its_prompt(serve: Serve, tmp_path: Path):
    server = serve(fake(failure=EngineFailed("a row is not finite", reason="NON_FINITE_ROW")))
    prompts = write_lines(tmp_path / "prompts.txt", ["a", "b"])

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 1
    assert [(error["error"], error["reason"]) for error in errors_in(tmp_path / "out")] == [
        ("EngineFailed", "NON_FINITE_ROW")
    ] * 2


def test_a_server_without_room_is_asked_again(serve: Serve, tmp_path: Path):
    server = serve(fake(), max_concurrent_requests=1, retry_after_s=0.0)
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
    expect(lines).check(tmp_path / "out")


def test_a_server_that_comes_back_is_asked_again(
    serve: Serve,
    short_folder: str,
    tmp_path: Path,
):
    address = f"unix:{short_folder}/socket"
    permits = Permits()
    first = serve(fake(step=permits), address)
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    with command(prompts, "--address", address, "--layers", 1, "--out", tmp_path / "out") as process:
        permits.left = 11
        first.wait_until(lambda: first.backend.finished == 11)
        first.stop()
        serve(fake(), address)
        _, error = process.communicate(timeout=30)

    assert process.returncode == 0, error
    assert "; trying again for 120 s" in error
    expect(lines).check(tmp_path / "out")


def test_retries_end(serve: Serve, short_folder: str, tmp_path: Path):
    address = f"unix:{short_folder}/socket"
    first = serve(fake(step=Permits()), address)
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    with command(
        prompts, "--address", address, "--layers", 1, "--out", tmp_path / "out", "--retry-timeout", 0.01
    ) as process:
        first.wait_running(1)
        first.stop()
        _, error = process.communicate(timeout=30)

    assert process.returncode == 1
    assert error.splitlines()[-2:] == [
        f"steer: stopped; {tmp_path / 'out'} covers 0 prompts, the same command goes on from there",
        f"steer: no server answers at {address}; `steer serve` starts one.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.txt",), "steer: PROMPTS: nowhere.txt is not a file\n"),
        (("prompts.txt", "--layers", "x"), "steer: --layers: 'x' is not a layer or a range such as 7-9\n"),
        (("prompts.txt", "--positions", "9..8"), "steer: capture.positions: positions 9 to 8 are reversed\n"),
        (
            ("prompts.txt", "--positions", "generated"),
            "steer: --positions: the last token is never fed to the model; generated needs --max-tokens 2\n",
        ),
        (("prompts.txt", "--concurrency", "0"), "steer: --concurrency: 0 is not above 0\n"),
        (("prompts.txt", "--shard-mb", "nan"), "steer: --shard-mb: nan is not above 0\n"),
        (("prompts.txt", "--steer-positions", "0"), "steer: --steer-positions needs --steering\n"),
        (("prompts.txt", "--address", "http://x"), "steer: address: 'http://x' is a URL; write host:port or"),
    ],
)
def test_bad_usage_is_one_line_and_needs_no_server(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("prompts.txt"), ["a"])

    assert run(arguments[0], "--layers", "1", "--out", "out", *arguments[1:]) == 2

    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--layers", "4"), "steer: capture.layers[0]: Capture layer index 4 is out of range."),
        (("--dtype", "float16"), "steer: capture.dtype: fake has a stream of float32"),
    ],
)
def test_what_every_prompt_would_meet_is_said_once(
    server: Server, more: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out", *more) == 1

    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_server_is_one_plain_sentence(dead_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = write_lines(tmp_path / "prompts.txt", texts(3))

    assert run(prompts, "--address", dead_address, "--layers", 1, "--out", tmp_path / "out") == 1
    assert capsys.readouterr().err == f"steer: no server answers at {dead_address}; `steer serve` starts one.\n"
    assert not (tmp_path / "out").exists()


# Shared memory, and memory


@pytest.mark.parametrize("delivery", ["auto", "shared"])
def test_rows_come_through_shared_memory_and_leave_nothing_there(
    serve: Serve,
    tmp_path: Path,
    delivery: str,
    capsys: pytest.CaptureFixture[str],
):
    server = serve(fake(BFLOAT))
    lines = texts(30)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = ("--address", server.address, "--layers", "0,3", "--site", "both", "--out", tmp_path / "out")

    assert run(prompts, *arguments, "--delivery", delivery, *TINY_SHARD) == 0

    both = (CaptureSite.BEFORE, CaptureSite.AFTER)
    expect(lines, layers=(0, 3), sites=both, dtype="bfloat16").check(tmp_path / "out")
    assert {request.capture.delivery.is_shared for request in server.backend.requests} == {True}
    assert "through shared memory" in capsys.readouterr().err
    server.wait_until(lambda: server.backend.holding == 0)


def test_as_many_files_may_be_open_as_rows_of_prompts_are_mapped(server: Server, tmp_path: Path):
    lines = texts(40)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    with open_files_limit(500):
        assert run(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)

    expect(lines).check(tmp_path / "out")


def test_rows_that_wait_for_an_earlier_prompt_do_not_hold_the_server_s_memory(
    serve: Serve,
    tmp_path: Path,
):
    class FirstWaits:
        """Lets the first prompt's token pass once it is told to."""

        opened = False
        is_first = True

        async def __call__(self, number: int) -> None:
            is_first, self.is_first = self.is_first, False
            while is_first and not self.opened:
                await asyncio.sleep(0.001)

    gate = FirstWaits()
    server = serve(fake(step=gate))
    lines = texts(6)
    prompts = write_lines(tmp_path / "prompts.txt", lines)

    with command(prompts, "--address", server.address, "--layers", 1, "--out", tmp_path / "out") as process:
        server.wait_until(lambda: server.backend.finished == 5 and server.backend.holding == 0)
        gate.opened = True
        assert process.wait(BOUND_S) == 0
    expect(lines).check(tmp_path / "out")


def test_a_server_that_shares_no_memory_sends_rows_inline_and_it_says_so(
    serve: Serve,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    server = serve(fake(), shared_memory=0)
    lines = texts(5)
    prompts = write_lines(tmp_path / "prompts.txt", lines)
    arguments = ("--address", server.address, "--layers", 1)

    assert run(prompts, *arguments, "--out", tmp_path / "auto") == 0
    assert capsys.readouterr().err.count("captures come inline, not through shared memory: switched off") == 1
    expect(lines).check(tmp_path / "auto")
    assert run(prompts, *arguments, "--out", tmp_path / "shared", "--delivery", "shared") == 1
    assert "captures cannot go through shared memory" in capsys.readouterr().err
    assert run(prompts, *arguments, "--out", tmp_path / "inline", "--delivery", "inline") == 0
    assert server.backend.requests[-1].capture.delivery is CaptureDelivery.INLINE


@pytest.mark.parametrize(
    "tokens", [pytest.param(20_000, marks=pytest.mark.slow), pytest.param(200_000, marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize("delivery", ["inline", "shared"])
def test_memory_does_not_grow_with_the_number_of_prompts(
    serve: Serve,
    tmp_path: Path,
    tokens: int,
    delivery: str,
):
    """2 KiB a row: 20,000 that were kept would be 39 MiB."""
    permits = Permits()
    model = replace(FAKE_MODEL, hidden_size=512)
    server = serve(fake(model, step=permits))
    server.backend.requests = collections.deque(maxlen=8)  # the only thing that is meant to grow
    count = tokens // 200
    prompts = write_lines(tmp_path / "prompts.txt", [words(200, index) for index in range(count)])
    arguments = ("--address", server.address, "--layers", 1, "--out", tmp_path / "out", "--shard-mb", 1)

    with command(prompts, *arguments, "--concurrency", 4, "--delivery", delivery) as process:
        client, me = psutil.Process(process.pid), psutil.Process()
        seen = []
        for share in (count // 4, count // 2, count - 1):
            permits.left = share - server.backend.finished
            server.wait_until(lambda: server.backend.finished == share, bound_s=300)  # noqa: B023
            seen.append((client.memory_info().rss, me.memory_info().rss))
        permits.left = 1
        assert process.wait(BOUND_S) == 0

    (client_before, server_before), *_, (client_after, server_after) = seen
    assert client_after - client_before < 8 << 20, seen
    assert server_after - server_before < 12 << 20, seen
    assert sum(len(shard) for shard in load_captures(tmp_path / "out")) == tokens
