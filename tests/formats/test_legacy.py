"""Folders that the in-process steerllm saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import SteeringSpec
from steer_service.formats.checkpoint import load_spec
from steer_service.hf.model import HFSteeringModel
from tests.formats.vectors import TouchesAFile, direction
from tests.tiny_models import WIDTH


def save_legacy(folder: Path, vectors: Any, **config: Any) -> None:
    torch.save(vectors, folder / "steering_vectors.pt")
    if config:
        (folder / "steering_config.json").write_text(json.dumps(config))


def test_the_folder_of_steerllm_is_read(fresh: Callable[..., HFSteeringModel], tmp_path: Path):
    vector = torch.tensor(direction(1), dtype=torch.float32)
    save_legacy(
        tmp_path,
        {"3": vector, "0": torch.zeros(WIDTH)},
        model_name="tiny",
        target_layers=[0, 3],
        hidden_size=WIDTH,
    )
    with fresh() as model:
        model.load_steering(tmp_path)
        assert model.target_layers == (0, 3)
        assert torch.equal(model.get_steering_vector(3), vector)
        assert load_spec(tmp_path, model=model.info) == model.to_spec()
        assert model.to_spec() == SteeringSpec.simple_add(3, vector)


@pytest.mark.parametrize(
    ("vectors", "config", "reason"),
    [
        ({"1": torch.ones(64)}, {}, "WRONG_WIDTH"),
        ({"9": torch.ones(WIDTH)}, {}, "UNKNOWN_LAYER"),
        ({"one": torch.ones(WIDTH)}, {}, "UNKNOWN_LAYOUT"),
        ({1: torch.ones(WIDTH), "1": torch.ones(WIDTH)}, {}, "UNKNOWN_LAYOUT"),
        ({"1": torch.full((WIDTH,), torch.nan)}, {}, "NON_FINITE"),
        ({"1": torch.ones(WIDTH), "2": torch.ones(3)}, {}, "WRONG_WIDTH"),
        ({"1": torch.ones(2, WIDTH)}, {}, "BAD_SHAPE"),
        ({"1": "text"}, {}, "BAD_VECTOR"),
        ({}, {}, "UNKNOWN_LAYOUT"),
        ([torch.ones(WIDTH)], {}, "UNKNOWN_LAYOUT"),
        ({"1": torch.ones(WIDTH)}, {"model_name": "another"}, "WRONG_MODEL"),
        ({"1": torch.ones(WIDTH)}, {"hidden_size": 64}, "BAD_CHECKPOINT"),
        ({"1": torch.ones(WIDTH)}, {"target_layers": [1, 2]}, "BAD_CHECKPOINT"),
    ],
)
def test_a_folder_of_steerllm_that_does_not_fit_is_refused(
    hf: HFSteeringModel, tmp_path: Path, vectors: Any, config: Any, reason: str
):
    save_legacy(tmp_path, vectors, **config)
    with pytest.raises(InvalidRequest) as caught:
        hf.load_steering(tmp_path)
    assert caught.value.reason == reason
    assert hf.target_layers == ()


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_torch_file_is_refused_and_not_run(hf: HFSteeringModel, tmp_path: Path, old_format: bool):
    content = {"1": torch.ones(WIDTH), "2": TouchesAFile(tmp_path / "touched")}
    torch.save(content, tmp_path / "steering_vectors.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(InvalidRequest) as caught:
        hf.load_steering(tmp_path)
    assert caught.value.reason == "BAD_TORCH_FILE"
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "steering_vectors.pt", weights_only=False)
    assert (tmp_path / "touched").exists()  # the file would have done it


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 and no more"])
def test_a_garbled_torch_file_is_refused(hf: HFSteeringModel, tmp_path: Path, content: bytes):
    (tmp_path / "steering_vectors.pt").write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        hf.load_steering(tmp_path)
    assert caught.value.reason == "BAD_TORCH_FILE"
