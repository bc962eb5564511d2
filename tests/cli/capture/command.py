"""`steer capture` as tests run it, and what a data set must then hold."""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steer_client import (
    CaptureSite,
    load_captures,
)
from steer_service.cli.capture import command as capture_command
from steer_service.core.capture import CapturedRows
from steer_service.core.stored_capture import SegmentPlace, in_order
from steer_service.formats.capture_dataset import LABELS, tensor_name
from steer_service.shm.segments import SegmentDirectory
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend, encode_row, token_at
from steer_service.testing.fake_prompts import words_to_token_ids

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
    max_tokens: int = 0
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
            assert held.dtype == np.float32
            assert {shard.tensors[tensor_name(layer, site)].dtype for shard in shards} == {expected.dtype}
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
    """`steer capture` in a process of its own, which hears SIGINT even where this one is a background job."""
    line = [*before, "env", "--default-signal=INT", sys.executable, "-m", "steer_service.cli.main", "capture"]
    with subprocess.Popen([*line, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def errors_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text().splitlines()]
