"""The folder that `steer capture` writes: complete shards, and a manifest that lists them.

A shard is written under a temporary name, made durable, renamed, and only then listed. After any interruption, the next
run reads in the manifest how far the last one came, removes the one shard that may be incomplete, and continues.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from steer_service.cli.arguments import UsageError
from steer_service.cli.capture.settings import differences
from steer_service.formats.capture_dataset import ERRORS, FORMAT, LABELS, MANIFEST, prompts_name, shard_name
from steer_service.formats.safetensors_file import write_tensors

PART = ".part"
"""Ends the name of a file that is being written, or of the folder in which it is."""

BEGINNING = json.dumps({"format": FORMAT}).encode()[:-1]
"""How a manifest begins: of one line that is not complete, a killed run has written this much, or less."""

UNSEEN = ""
"""The digest of no prompts."""


class CaptureFolder:
    """A data set to write, by one process at a time."""

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        """Opens or creates it; `head` is the first line of the manifest.

        Raises UsageError for a folder with another first line or another writer, and OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder
        """Its path."""
        self._manifest = os.open(folder / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._errors: BinaryIO | None = None
        try:
            self._lock()
            listed = self._lines(head)
        except BaseException:
            os.close(self._manifest)
            raise
        self.shards = len(listed)
        """Finished shards."""
        self.next_prompt = listed[-1]["prompts"][1] if listed else 0
        """Index of the first prompt that the finished shards do not cover."""
        self.digest = listed[-1]["digest"] if listed else UNSEEN
        """`PromptLine.digest` of the last of them."""
        self._remove_leftovers()
        self.failed = self._keep_errors()
        """Prompts among them that failed."""

    def put(
        self,
        tensors: Mapping[str, npt.NDArray[Any]],
        prompts: bytes,
        *,
        end: int,
        digest: str,
        about: Mapping[str, str],
    ) -> None:
        """Adds a shard with the prompts from `next_prompt` to `end` - 1; when this returns, it is durable."""
        number, rows = self.shards, len(tensors["position"])
        _write(self.path / prompts_name(number), lambda file: file.write(prompts))
        _write_shard(self.path / shard_name(number), tensors, about)
        if self._errors is not None:
            os.fsync(self._errors.fileno())
        _sync_folder(self.path)
        line = {"shard": shard_name(number), "prompts": [self.next_prompt, end], "rows": rows, "digest": digest}
        self._append(line)
        self.shards, self.next_prompt, self.digest = number + 1, end, digest

    def put_error(self, record: Mapping[str, Any]) -> None:
        """Records a prompt that failed. It counts once a shard covers it, and is tried again otherwise."""
        if self._errors is None:
            self._errors = (self.path / ERRORS).open("ab")
        self._errors.write(json.dumps(record).encode() + b"\n")
        self._errors.flush()

    def close(self) -> None:
        """Closes the files, so that another process can write."""
        if self._errors is not None:
            self._errors.close()
        os.close(self._manifest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(
                self._manifest, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # is released when the process ends, even if it is killed
        except BlockingIOError:
            raise UsageError(f"--out: another process writes to {self.path}") from None

    def _lines(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines of finished shards; an incomplete last line is cut off, of a manifest of captures alone."""
        if not stat.S_ISREG(os.fstat(self._manifest).st_mode):
            raise self._not_a_manifest()
        text = (self.path / MANIFEST).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            if not (text.startswith(BEGINNING) or BEGINNING.startswith(text)):
                raise self._not_a_manifest()
            os.ftruncate(self._manifest, 0)
            self._begin(head)
            return []
        try:
            first, *listed = map(json.loads, whole.splitlines())
        except (ValueError, RecursionError):
            raise self._not_a_manifest() from None
        if not isinstance(first, dict) or first.get("format") != FORMAT or not all(map(_is_shard_line, listed)):
            raise self._not_a_manifest()
        _check_same(self.path, first, head)
        if len(whole) < len(text):
            os.ftruncate(self._manifest, len(whole))
        return listed

    def _not_a_manifest(self) -> UsageError:
        return UsageError(f"--out: {self.path / MANIFEST} is not a manifest of captures; choose another folder")

    def _begin(self, head: Mapping[str, Any]) -> None:
        for name in (shard_name(0), prompts_name(0), ERRORS):  # those that are written over or removed
            if os.path.lexists(self.path / name):
                raise UsageError(
                    f"--out: {self.path} holds {name}, but no manifest describes it; choose another folder"
                )
        self._append(head)
        _sync_folder(self.path)

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line).encode() + b"\n"
        written = os.write(self._manifest, text)
        if written < len(text):  # the disk is full; half a line is cut off when the folder is opened again
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._manifest)

    def _remove_leftovers(self) -> None:
        for name in (shard_name(self.shards), prompts_name(self.shards)):
            for path in (self.path / name, self.path / (name + PART)):
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
        (self.path / (ERRORS + PART)).unlink(missing_ok=True)

    def _keep_errors(self) -> int:
        """Removes errors of prompts that will be tried again; returns how many remain."""
        path = self.path / ERRORS
        if not path.exists():
            return 0
        kept = [line for line in path.read_bytes().splitlines(keepends=True) if self._is_covered(line)]
        if kept:
            _write(path, lambda file: file.write(b"".join(kept)))
        else:
            path.unlink()
        return len(kept)

    def _is_covered(self, line: bytes) -> bool:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last one may be half a line
            return line.endswith(b"\n") and bool(json.loads(line)["prompt_index"] < self.next_prompt)
        return False


class ShardBuffer:
    """The rows of the next shard, in memory that every shard reuses."""

    def __init__(
        self,
        arrays: Mapping[str, np.dtype[Any]],
        hidden_size: int,
        shard_bytes: int,
        more_labels: Mapping[str, np.dtype[Any]],
    ) -> None:
        """`arrays` are the tensors of the layers, each with rows of `hidden_size`.

        Those of `LABELS` and `more_labels` are added.
        """
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._shapes |= {name: (dtype, (hidden_size,)) for name, dtype in arrays.items()}
        self._shapes |= {name: (dtype, ()) for name, dtype in {**LABELS, **more_labels}.items()}
        row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._shapes.values())
        self.rows = 0
        """The number of rows."""
        self.prompts: list[bytes] = []
        """One JSON line for each prompt."""
        self._reserve(max(1, shard_bytes // row_bytes))

    def has_room(self, rows: int) -> bool:
        """True if this number of rows still fits into the shard; an empty shard takes any number."""
        return not self.prompts or self.rows + rows <= self._capacity

    def add(self, tensors: Mapping[str, npt.NDArray[Any]], prompt: Mapping[str, Any]) -> None:
        """Copies the rows of one prompt, all arrays by name; `prompt` is its entry in the shard's list."""
        count = len(tensors["position"])
        if not self.prompts and count > self._capacity:
            self._reserve(count)
        end = self.rows + count
        for name, array in self._arrays.items():
            array[self.rows : end] = tensors[name]
        line = {**prompt, "first_row": self.rows, "rows": count}
        self.prompts.append(json.dumps(line).encode() + b"\n")
        self.rows = end

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays, valid until `clear`."""
        return {name: array[: self.rows] for name, array in self._arrays.items()}

    def empty(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays of no row."""
        return {name: array[:0] for name, array in self._arrays.items()}

    def clear(self) -> None:
        """Empties it."""
        self.rows, self.prompts = 0, []

    def _reserve(self, rows: int) -> None:
        self._capacity = rows
        self._arrays = {name: np.empty((rows, *shape), dtype) for name, (dtype, shape) in self._shapes.items()}


def _is_shard_line(line: object) -> bool:
    """True for a line of a manifest that names a finished shard, as `CaptureFolder.put` writes it."""
    match line:
        case {"prompts": [int(), int()], "digest": str()}:
            return True
    return False


def _check_same(folder: Path, held: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    found = differences(held, head)
    if found is not None:
        raise UsageError(f"--out: {folder} was filled {found[0]}; this run is {found[1]}; choose another folder")


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces `path` by what `write` writes, completely and durably. Its new name is not yet durable."""
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _write_shard(path: Path, tensors: Mapping[str, npt.NDArray[Any]], about: Mapping[str, str]) -> None:
    """The same for a shard. It is written in a folder: safetensors puts temporary files of its own beside it."""
    folder = path.with_name(path.name + PART)
    folder.mkdir()
    part = folder / path.name
    write_tensors(part, tensors, about)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder.rmdir()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
