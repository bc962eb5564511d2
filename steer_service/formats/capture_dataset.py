"""Data sets of captured rows, as `steer capture` writes them: the files in their folder, and reading them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_service.core.arrays import Float32Array, as_float32
from steer_service.core.capture import CaptureSite
from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.formats.safetensors_file import LazyTensors

FORMAT = "steerllm-captures"
"""The name of the format, in the first line of a manifest."""
VERSION = 1
"""Version of the format."""
MANIFEST = "manifest.jsonl"
"""Its first line describes the model and the request. Each further line names the prompts of a finished shard."""
ERRORS = "errors.jsonl"
"""One line for each prompt that failed."""
LAYERS = "residual stream after decoder block L, 0-based"
"""The meaning of `layer_L`."""

LAYER = "layer_"
"""Begins the names of the tensors that hold rows of layers."""

LABELS: dict[str, np.dtype[Any]] = {
    "prompt_index": np.dtype(np.int64),
    "position": np.dtype(np.int32),
    "token_id": np.dtype(np.int32),
    "is_generated": np.dtype(np.bool_),
    "is_steered": np.dtype(np.bool_),
}
"""Tensors that describe the rows, one element per row -> their dtype."""

WINDOW = "window"
"""The label of rows of texts that were cut to windows: which window, from 0."""
WINDOW_LABELS: dict[str, np.dtype[Any]] = {WINDOW: np.dtype(np.int32)}
"""Labels that are there beside `LABELS` if long texts were cut to windows."""


def shard_name(number: int) -> str:
    """The file that holds the rows of a shard."""
    return f"capture-{number:05d}.safetensors"


def prompts_name(number: int) -> str:
    """The file with one line for each prompt of a shard: where its rows are, and the fields of its line."""
    return f"capture-{number:05d}.jsonl"


def tensor_name(layer: int, site: CaptureSite) -> str:
    """The tensor that holds the rows of a layer."""
    return f"{LAYER}{layer}.{site.value}"


@dataclass(frozen=True, kw_only=True)
class CaptureShard:
    """The rows of some prompts. Each access to an array reads it from the file: keep it to use it again."""

    folder: Path
    """The folder of the data set."""
    number: int
    """Number of the shard, from 0."""
    about: Mapping[str, Any]
    """Its line in the manifest: `prompts`, the first prompt and the one after the last, and `rows`."""

    def __len__(self) -> int:
        return int(self.about["rows"])

    @cached_property
    def tensors(self) -> Mapping[str, npt.NDArray[Any]]:
        """All arrays by name: `layer_7.after` and the like, shape [rows, hidden_size]; those of `LABELS`, [rows].

        They have the dtype of the file; bfloat16 uses ml_dtypes.
        """
        return LazyTensors(self.folder / shard_name(self.number))

    def hidden(self, layer: int, site: CaptureSite | str = CaptureSite.AFTER) -> Float32Array:
        """The rows of a layer as float32, which is exact, shape [rows, hidden_size].

        Raises InvalidRequest for a layer or site that was not captured.
        """
        name = tensor_name(layer, CaptureSite(site))
        captured = [one for one in self.tensors if one.startswith(LAYER)]
        if name not in captured:
            raise InvalidRequest(
                f"{name} was not captured; {self.folder} has {', '.join(captured)}",
                reason="NOT_IN_DATA_SET",
                field="layer",
            )
        return as_float32(self.tensors[name])

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """One entry per prompt: `prompt_index`, its `id`, `first_row` and `rows` here, and more.

        `fields` has what its line in the file of prompts had besides, such as a label.
        """
        text = (self.folder / prompts_name(self.number)).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def load_captures(folder: str | PathLike[str]) -> Iterator[CaptureShard]:
    """The finished shards of a data set that `steer capture` writes, in the order of their prompts.

    Raises InvalidRequest if there is no data set, Unsupported for one of another version.
    """
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"{folder} is no folder of `steer capture`: its {MANIFEST} cannot be read: {error.strerror}",
            reason="NO_DATA_SET",
            field="folder",
        ) from error
    complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the last may not be
    if not complete:
        raise InvalidRequest(f"the {MANIFEST} of {folder} is empty so far", reason="NO_DATA_SET", field="folder")
    first, *lines = map(json.loads, complete)
    if (first.get("format"), first.get("version")) != (FORMAT, VERSION):
        raise Unsupported(
            f"captures in the form {first.get('format')!r} {first.get('version')!r} are not supported here"
        )
    return (CaptureShard(folder=folder, number=number, about=line) for number, line in enumerate(lines))
