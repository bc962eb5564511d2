"""Steering in a folder: what is saved comes back, and what does not belong there or here is refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import InvalidRequest
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.formats.checkpoint import (
    DOCUMENT,
    LAYER_CONVENTION,
    TENSORS,
    load_spec,
    read_checkpoint,
    save_spec,
    write_checkpoint,
)
from steer_service.hf.model import HFSteeringModel
from steer_service.hf.trainable import TrainableAblation, TrainableAdd, TrainableCap
from tests.formats.vectors import direction
from tests.tiny_models import LAYERS, WIDTH

SPEC = SteeringSpec(
    {
        1: LayerSteeringSpec([AddSpec(direction(1), 2.0), ProjectionCapSpec(direction(2), min=-0.1)]),
        3: LayerSteeringSpec([ProjectionCapSpec(direction(3), -1, 1), AblationSpec(direction(4), -0.5)]),
    },
    positions=["prompt", range(-3, 0)],
)


@pytest.fixture
def folder(hf: HFSteeringModel, tmp_path: Path) -> Path:
    save_spec(tmp_path / "saved", SPEC, model=hf.info, revision="abc", about={"method": "mean"})
    return tmp_path / "saved"


def edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / DOCUMENT).read_text())
    (folder / DOCUMENT).write_text(json.dumps(document | changes))


def test_a_spec_comes_back_as_it_was_saved(hf: HFSteeringModel, folder: Path):
    assert load_spec(folder, model=hf.info) == SPEC
    assert load_spec(folder).digest() == SPEC.digest()
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.model.name, checkpoint.model.revision) == ("tiny", "abc")
    assert checkpoint.about == {"method": "mean"}
    assert checkpoint.trained is None


def test_the_document_says_what_a_reader_has_to_know(folder: Path):
    document = json.loads((folder / DOCUMENT).read_text())
    assert document["layer_convention"] == LAYER_CONVENTION
    assert document["model"] == {"name": "tiny", "revision": "abc", "hidden_size": WIDTH, "layer_count": LAYERS}
    assert document["digest"] == SPEC.digest()
    add = document["steering"]["layers"]["1"][0]
    assert (add["op"], add["scale"]) == ("add", 2.0)
    vectors = safetensors.numpy.load_file(folder / add["vector"]["file"])
    np.testing.assert_array_equal(vectors[add["vector"]["tensor"]], SPEC.layers[1].operations[0].vector)


def test_saving_leaves_two_files_and_replaces_them(hf: HFSteeringModel, folder: Path):
    other = SteeringSpec.simple_ablation(0, direction(9))
    save_spec(folder, other, model=hf.info)
    assert sorted(path.name for path in folder.iterdir()) == [DOCUMENT, TENSORS]
    assert load_spec(folder) == other


def test_files_of_two_savings_are_not_mixed(hf: HFSteeringModel, folder: Path, tmp_path: Path):
    save_spec(tmp_path / "other", SteeringSpec.simple_add(1, direction(9)), model=hf.info)
    shutil.copy(tmp_path / "other" / TENSORS, folder)
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == ("WRONG_DIGEST", "tensors_sha256")


def test_nothing_is_written_of_what_cannot_be_saved(hf: HFSteeringModel, tmp_path: Path):
    with pytest.raises(InvalidRequest) as caught:
        save_spec(tmp_path / "x", SteeringSpec.simple_add(LAYERS, direction(1)), model=hf.info)
    assert caught.value.field == f"spec.layers[{LAYERS}]"
    with pytest.raises(InvalidRequest) as caught:
        save_spec(tmp_path / "x", SPEC, model=hf.info, about={"when": object()})
    assert (caught.value.reason, caught.value.field) == ("BAD_JSON", "about")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"format": "other"}, "UNKNOWN_FORMAT", "format"),
        ({"version": 2}, "UNKNOWN_FORMAT", "version"),
        ({"layer_convention": "layer L is before block L"}, "UNKNOWN_FORMAT", "layer_convention"),
        ({"site": "attention"}, "UNKNOWN_FORMAT", "site"),
        ({"digest": "0" * 64}, "WRONG_DIGEST", "digest"),
        ({"digest": None}, "WRONG_DIGEST", "digest"),
        ({"tensors_sha256": "0" * 64}, "WRONG_DIGEST", "tensors_sha256"),
        ({"steering": None}, "BAD_JSON", "steering"),
        ({"steering": {"layers": {"1": [{"op": "sub"}]}}}, "BAD_JSON", "steering.layers[1].operations[0].op"),
        ({"model": {}}, "BAD_JSON", "model.name"),
        ({"about": 1}, "BAD_JSON", "about"),
        ({"trained": []}, "BAD_JSON", "trained"),
        ({"trained": {"1": "add"}}, "BAD_CHECKPOINT", "trained[1]"),
        (
            {"model": {"name": "tiny", "hidden_size": WIDTH, "layer_count": 3}},
            "UNKNOWN_LAYER",
            "layers[3]",
        ),
        ({"model": {"name": "tiny", "hidden_size": 7, "layer_count": 4}}, "WRONG_WIDTH", "layers[1]"),
    ],
)
def test_a_document_that_is_not_what_was_saved_is_refused(folder: Path, changes: Any, reason: str, field: str):
    edit(folder, **changes)
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\x00\xff"])
def test_a_garbled_document_is_refused(folder: Path, text: str):
    (folder / DOCUMENT).write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == ("BAD_JSON", DOCUMENT)


def test_missing_and_garbled_tensors_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(InvalidRequest) as caught:
        load_spec(tmp_path / "nowhere")
    assert (caught.value.reason, caught.value.field) == ("NOT_A_CHECKPOINT", "directory")
    (folder / TENSORS).write_bytes(b"nothing of the kind")
    edit(folder, tensors_sha256=sha256_of(folder))
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == ("BAD_TENSORS", TENSORS)
    (folder / TENSORS).unlink()
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == ("BAD_TENSORS", TENSORS)


def test_a_vector_that_is_not_a_number_is_refused(folder: Path):
    rewrite_tensors(folder, "layers.1.0", lambda vector: vector * np.nan)
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder)
    assert (caught.value.reason, caught.value.field) == ("NON_FINITE", "steering.layers[1].operations[0].vector")


@pytest.mark.parametrize(
    ("other", "reason", "field"),
    [
        ({"hidden_size": 64}, "WRONG_WIDTH", "model.hidden_size"),
        ({"layer_count": 5}, "WRONG_LAYER_COUNT", "model.layer_count"),
        ({"name": "other"}, "WRONG_MODEL", "model.name"),
    ],
)
def test_steering_of_another_model_is_refused(hf: HFSteeringModel, folder: Path, other: Any, reason: str, field: str):
    model: ModelInfo = replace(hf.info, **other)
    with pytest.raises(InvalidRequest) as caught:
        load_spec(folder, model=model)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    if reason == "WRONG_MODEL":
        assert load_spec(folder, model=model, any_model=True) == SPEC
    else:
        with pytest.raises(InvalidRequest):
            load_spec(folder, model=model, any_model=True)


def test_steering_of_another_revision_is_refused_where_both_are_known(hf: HFSteeringModel, tmp_path: Path):
    save_spec(tmp_path, SPEC, model=hf.info, revision="1f3a")
    for revision in ("1f3a", None):
        assert load_spec(tmp_path, model=hf.info, revision=revision) == SPEC
    with pytest.raises(InvalidRequest) as caught:
        load_spec(tmp_path, model=hf.info, revision="77c0")
    assert (caught.value.reason, caught.value.field) == ("WRONG_REVISION", "model.revision")
    assert load_spec(tmp_path, model=hf.info, revision="77c0", any_model=True) == SPEC


def test_trained_steering_comes_back_exactly_zeros_included(fresh: Callable[..., HFSteeringModel], tmp_path: Path):
    with fresh(target_layers=[2]) as model, fresh(target_layers=[0, 1], init_scale=1.0) as other:
        model.set_steering(0, TrainableCap(direction(1), max=0.1))
        model.set_steering(1, TrainableAblation(direction(2), 0.3))
        model.set_steering(3, TrainableAdd(direction(3)))
        model.save_steering(tmp_path)
        other.load_steering(tmp_path)
        assert other.target_layers == (0, 1, 2, 3)
        assert not other.get_steering_vector(2).any()
        want, have = dict(model.steering.named_parameters()), dict(other.steering.named_parameters())
        assert want.keys() == have.keys()
        assert all(torch.equal(want[name], have[name]) and have[name].requires_grad for name in want)
        assert [type(other.steering[layer]) for layer in "0123"] == [type(model.steering[layer]) for layer in "0123"]
        assert load_spec(tmp_path, model=other.info) == other.to_spec() == model.to_spec()


def test_training_goes_on_from_a_folder_as_it_would_have_here(fresh: Callable[..., HFSteeringModel], tmp_path: Path):
    tokens = torch.arange(300, 312)[None]

    def step(model: HFSteeringModel) -> float:
        optimizer = torch.optim.SGD(model.get_trainable_parameters(), lr=0.5)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with fresh(target_layers=[1, 2]) as model, fresh() as other:
        first = step(model)
        model.save_steering(tmp_path)
        other.load_steering(tmp_path)
        assert step(other) == step(model) < first
        assert torch.equal(other.get_steering_vector(1), model.get_steering_vector(1))


def test_loading_what_does_not_fit_changes_nothing(fresh: Callable[..., HFSteeringModel], folder: Path, tmp_path: Path):
    with fresh(target_layers=[1], init_scale=1.0) as model:
        before = model.get_steering_vector(1)
        with pytest.raises(InvalidRequest) as caught:
            model.load_steering(folder)
        assert caught.value.reason == "NOT_TRAINED"
        model.save_steering(tmp_path)
        rewrite_tensors(tmp_path, "trained.1.vector", lambda vector: vector * np.nan)
        with pytest.raises(InvalidRequest) as caught:
            model.load_steering(tmp_path)
        assert (caught.value.reason, caught.value.field) == ("NON_FINITE", "trained[1].vector")
        model.save_steering(tmp_path)
        edit(tmp_path, trained={"1": "sum"})
        with pytest.raises(InvalidRequest) as caught:
            model.load_steering(tmp_path)
        assert (caught.value.reason, caught.value.field) == ("UNKNOWN_KIND", "trained[1].kind")
        edit(tmp_path, trained={"1": "add"}, model={"name": "x", "hidden_size": WIDTH, "layer_count": LAYERS})
        with pytest.raises(InvalidRequest) as caught:
            model.load_steering(tmp_path)
        assert caught.value.reason == "WRONG_MODEL"
        assert torch.equal(model.get_steering_vector(1), before)
        model.load_steering(tmp_path, any_model=True)


def sha256_of(folder: Path) -> str:
    return hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()


def rewrite_tensors(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    safetensors.numpy.save_file(tensors | {name: change(tensors[name])}, folder / TENSORS)
    edit(folder, tensors_sha256=sha256_of(folder))


def test_what_was_read_can_be_written_again(folder: Path, tmp_path: Path):
    write_checkpoint(tmp_path / "again", read_checkpoint(folder))
    assert (tmp_path / "again" / DOCUMENT).read_text() == (folder / DOCUMENT).read_text()
