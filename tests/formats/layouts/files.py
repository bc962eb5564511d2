"""Files of vectors that the tests of layouts make, and how they are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from steer_service.core.errors import InvalidRequest
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.vector_files import read_vectors

HIDDEN = 6


def rows(*shape: int) -> np.ndarray:
    """Different numbers in every place, float32, shape [*shape, HIDDEN]."""
    return np.random.default_rng(len(shape)).normal(size=(*shape, HIDDEN)).astype(np.float32)


def write(path: Path, content: Any) -> Path:
    """Writes `content`, with NumPy arrays in it, as the ending of the name says."""
    match path.suffix:
        case ".pt":
            torch.save(as_tensors(content), path)
        case ".npy":
            np.save(path, content)
        case ".npz":
            np.savez(path, **content)
        case ".safetensors":
            safetensors.numpy.save_file(content, path)
        case ".json":
            path.write_text(json.dumps(content, default=np.ndarray.tolist))
    return path


def as_tensors(content: Any) -> Any:
    if isinstance(content, np.ndarray):
        return torch.from_numpy(content.copy())
    if isinstance(content, dict):
        return {key: as_tensors(value) for key, value in content.items()}
    return [as_tensors(value) for value in content] if isinstance(content, list) else content


def assert_layers(found: Imported, want: dict[int, np.ndarray]) -> None:
    assert list(found.layers) == list(want)
    for layer, vector in want.items():
        np.testing.assert_allclose(found.layers[layer], vector, rtol=1e-6)
        assert found.layers[layer].dtype == np.float32


def refusal(path: Path, reason: str, field: str | None = None, **options: Any) -> str:
    """The message with which a file is refused; it names the file."""
    with pytest.raises(InvalidRequest) as caught:
        read_vectors(path, **options)
    assert caught.value.reason == reason
    assert path.name in caught.value.message
    assert field in (None, caught.value.field)
    return caught.value.message
