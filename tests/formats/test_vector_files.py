"""Vectors in the files of other projects: there and back, and what is refused."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.formats.checkpoint import save_spec
from steer_service.formats.layer_vectors import CONVENTIONS
from steer_service.formats.vector_files import WRITERS, read_vectors, write_vectors
from steer_service.hf.model import HFSteeringModel
from tests.formats.vectors import TouchesAFile, direction, vectors, write_gguf
from tests.tiny_models import WIDTH

SUFFIXES = dict.fromkeys(WRITERS, ".pt") | {"gguf": ".gguf", "safetensors": ".safetensors"}


def refused(path: Path, reason: str, match: str | None = None, **options: Any) -> None:
    with pytest.raises(InvalidRequest, match=match) as caught:
        read_vectors(path, **options)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_is_read(kind: str, tmp_path: Path):
    path, written = tmp_path / f"x{SUFFIXES[kind]}", vectors(1, 3)
    write_vectors(path, written, kind=kind, model_hint="llama")
    known = {"rows": "embeddings-first"} if kind == "persona" else {}
    for imported in (read_vectors(path, **known), read_vectors(path, kind=kind)):
        assert imported.kind == kind
        assert imported.convention.startswith(CONVENTIONS[kind])
        assert imported.model_hint == ("llama" if kind == "gguf" else "")
        assert list(imported.layers) == [1, 3]
        for layer in written:
            np.testing.assert_array_equal(imported.layers[layer], written[layer])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_spec_adds_scale_times_each_vector_and_leaves_zeros_out(tmp_path: Path):
    written = vectors(1, 3) | {2: np.zeros(WIDTH, np.float32)}
    write_vectors(tmp_path / "x.safetensors", written, kind="safetensors")
    spec = read_vectors(tmp_path / "x.safetensors").to_spec(-2.0)
    assert list(spec.layers) == [1, 3]
    for layer, layer_spec in spec.layers.items():
        np.testing.assert_allclose(layer_spec.operations[0].materialize(), -2.0 * written[layer], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_element_types_become_float32(dtype: torch.dtype, tmp_path: Path):
    tensors = {str(layer): torch.tensor(vector).to(dtype) for layer, vector in vectors(0, 1).items()}
    torch.save(tensors, tmp_path / "x.pt")
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        for layer, vector in read_vectors(tmp_path / name).layers.items():
            np.testing.assert_array_equal(vector, tensors[str(layer)].float().numpy())


def test_a_checkpoint_of_additions_is_read_as_vectors(hf: HFSteeringModel, tmp_path: Path):
    add = AddSpec(direction(1), 2.0)
    save_spec(tmp_path, SteeringSpec({1: LayerSteeringSpec([add, add])}), model=hf.info)
    imported = read_vectors(tmp_path)
    assert (imported.kind, imported.model_hint) == ("trained-steering", "tiny")
    assert read_vectors(tmp_path, kind="checkpoint").kind == "trained-steering"
    np.testing.assert_allclose(imported.layers[1], 4.0 * add.vector, rtol=1e-6)
    save_spec(tmp_path, SteeringSpec({1: LayerSteeringSpec([add, ProjectionCapSpec(direction(2), 0)])}), model=hf.info)
    refused(tmp_path, "NOT_A_VECTOR", "load_spec")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(4)], "NEEDS_OPTION"),
        ([torch.ones(4), torch.ones(5)], "UNKNOWN_LAYOUT"),
        ("text", "UNKNOWN_LAYOUT"),
        ({}, "UNKNOWN_LAYOUT"),
        ({"model.layers.0.weight": torch.ones(4)}, "UNKNOWN_LAYOUT"),
        ({-1: torch.ones(4)}, "NEEDS_OPTION"),
        ({10**9: torch.ones(4)}, "UNKNOWN_LAYOUT"),
        ({"9" * 5000: torch.ones(4)}, "UNKNOWN_LAYOUT"),
        ({True: torch.ones(4)}, "UNKNOWN_LAYOUT"),
        ({1: torch.ones(4), 2: torch.ones(5)}, "WRONG_WIDTH"),
        ({1: torch.ones(2, 4)}, "BAD_SHAPE"),
        ({1: torch.tensor([1.0, torch.inf])}, "NON_FINITE"),
        (torch.ones(4), "NEEDS_OPTION"),
        (torch.ones(1, 4), "NEEDS_OPTION"),
        (torch.ones(3, 4, 5), "NEEDS_OPTION"),
        (torch.ones(2, 3, 4, 5), "UNKNOWN_LAYOUT"),
        (torch.tensor(1.0), "UNKNOWN_LAYOUT"),
        ({"layer_activations": {1: torch.ones(4)}, "layer_type": "mlp"}, "UNKNOWN_LAYOUT"),
        ({"layer_activations": [torch.ones(4)], "layer_type": "decoder_block"}, "UNKNOWN_LAYOUT"),
    ],
)
def test_a_torch_file_of_another_layout_is_refused(content: Any, reason: str, tmp_path: Path):
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", reason)


@pytest.mark.parametrize("kind", [None, "torch", "steering-vectors", "persona"])
def test_code_in_a_torch_file_is_not_run(kind: str | None, tmp_path: Path):
    torch.save({1: TouchesAFile(tmp_path / "touched")}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "BAD_TORCH_FILE", kind=kind)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", [None, "steering-vectors"])
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (b"", "UNKNOWN_LAYOUT"),  # none
        (b"}b", "UNKNOWN_LAYOUT"),  # an empty dict
        (b"K\x05b", "BAD_TORCH_FILE"),  # a number
        (b"}X\x01\x00\x00\x00aK\x05s}\x86b", "BAD_TORCH_FILE"),  # two dicts
        (b"}X\x01\x00\x00\x00acos\nsystem\nX\x04\x00\x00\x00true\x85Rsb", "BAD_TORCH_FILE"),  # a dict with a call
    ],
)
def test_a_steering_vector_of_other_fields_is_refused(kind: str | None, state: bytes, reason: str, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("x/version", "3\n")
        file.writestr("x/data.pkl", b"\x80\x02csteering_vectors.steering_vector\nSteeringVector\n)\x81" + state + b".")
    refused(tmp_path / "x.pt", reason, kind=kind)


def test_a_file_is_not_read_as_another_kind_than_is_asked_for(tmp_path: Path):
    for kind in ("torch", "persona", "steering-vectors"):
        write_vectors(tmp_path / f"{kind}.pt", vectors(1), kind=kind)
    for kind, name in [("torch", "persona"), ("persona", "torch"), ("steering-vectors", "torch")]:
        refused(tmp_path / f"{name}.pt", "UNKNOWN_LAYOUT", kind=kind)
    refused(tmp_path / "torch.pt", "BAD_GGUF", kind="gguf")
    refused(tmp_path / "torch.pt", "BAD_TENSORS", kind="safetensors")
    refused(tmp_path / "torch.pt", "UNKNOWN_KIND", kind="csv")


@pytest.mark.parametrize(
    ("tensors", "architecture", "reason"),
    [
        ({"direction.1": np.ones(4, np.float32)}, "llama", "UNKNOWN_LAYOUT"),
        ({"blk.1.weight": np.ones(4, np.float32)}, "controlvector", "UNKNOWN_LAYOUT"),
        ({"direction.one": np.ones(4, np.float32)}, "controlvector", "UNKNOWN_LAYOUT"),
        ({"direction.1": np.ones(4, np.int32)}, "controlvector", "UNKNOWN_LAYOUT"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "controlvector", "BAD_SHAPE"),
        ({"direction.1": np.float32([np.nan, 1])}, "controlvector", "NON_FINITE"),
        (
            {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)},
            "controlvector",
            "WRONG_WIDTH",
        ),
        ({}, "controlvector", "UNKNOWN_LAYOUT"),
    ],
)
def test_a_gguf_that_is_no_control_vector_is_refused(tensors: Any, architecture: str, reason: str, tmp_path: Path):
    refused(write_gguf(tmp_path / "x.gguf", tensors, architecture=architecture), reason)


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IIQ", 9, 0, 2**60),  # an array of bytes without an end
        struct.pack("<IQ", 8, 2**60),  # a text without an end
        struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000,  # arrays in arrays
    ],
)
def test_a_gguf_that_claims_more_than_it_holds_is_refused(value: bytes, tmp_path: Path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"x"
    (tmp_path / "x.gguf").write_bytes(head + value)
    refused(tmp_path / "x.gguf", "BAD_GGUF")


def test_damaged_and_unknown_files_are_refused_with_what_was_expected(tmp_path: Path):
    whole = write_gguf(tmp_path / "whole.gguf", {"direction.1": np.ones(4096, np.float32)}).read_bytes()
    for content in (b"", b"GGUF", b"hello world " * 20, whole[: len(whole) // 2]):
        (tmp_path / "x.gguf").write_bytes(content)
        refused(tmp_path / "x.gguf", "BAD_GGUF")
        (tmp_path / "x.safetensors").write_bytes(content)
        refused(tmp_path / "x.safetensors", "BAD_GGUF" if content.startswith(b"GGUF") else "BAD_TENSORS")
    (tmp_path / "x.txt").write_text("1,2")
    refused(tmp_path / "x.txt", "UNKNOWN_LAYOUT", "expected one vector, rows by layer")
    refused(tmp_path / "none.pt", "NO_FILE", "expected one vector, rows by layer")
    refused(tmp_path, "NOT_A_CHECKPOINT")


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path):
    for layers, kind, reason in [
        (vectors(0, 1), "gguf", "UNKNOWN_LAYER"),
        (vectors(1), "checkpoint", "UNKNOWN_KIND"),
        ({}, "torch", "UNKNOWN_LAYOUT"),
        ({1: [1.0, np.nan]}, "torch", "NON_FINITE"),
    ]:
        with pytest.raises(InvalidRequest) as caught:
            write_vectors(tmp_path / "x", layers, kind=kind)
        assert caught.value.reason == reason
    assert not list(tmp_path.iterdir())
