"""Vectors and files of them that tests of several formats make."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny_models import WIDTH


def direction(seed: int, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=width)


def vectors(*layers: int) -> dict[int, np.ndarray]:
    return {layer: direction(layer + 1).astype(np.float32) for layer in layers}


def write_gguf(path: Path, tensors: dict[str, np.ndarray], *, architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TouchesAFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)
