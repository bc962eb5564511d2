"""`--steering` with a file of vectors: what the server's model decides, and what the options say."""

import json
from pathlib import Path

import numpy as np
import pytest

from steer_client import AddSpec, InvalidRequest, LayerSteeringSpec, SteeringSpec
from steer_service.core.backend import ModelInfo
from steer_service.formats.checkpoint import load_spec, save_spec
from steer_service.formats.vector_files import write_vectors
from tests.cli.test_generate import run
from tests.client.conftest import Server


def steered_by(server: Server, path: Path, *options: object) -> SteeringSpec | None:
    """The steering of a request with this file; None if the command is refused."""
    before = len(server.backend.requests)
    status = run("hello", "--address", server.address, "--max-tokens", 1, "--steering", path, *options)
    assert (status == 0) is (len(server.backend.requests) > before)
    return server.backend.requests[-1].steering if status == 0 else None


def test_steering_comes_from_a_file_of_vectors_of_the_servers_model(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = server.backend.info
    axis = np.random.default_rng(0).normal(size=(info.layer_count, info.hidden_size)).astype(np.float32)
    np.save(tmp_path / "axis.npy", axis)
    spec = steered_by(server, tmp_path / "axis.npy", "--layer", 2, "--scale", -3)
    assert spec == SteeringSpec.simple_add(2, axis[2], scale=-3.0)
    assert f"{info.layer_count} rows for {info.layer_count} layers" in capsys.readouterr().err
    np.save(tmp_path / "layer_1.npy", axis[1])
    assert steered_by(server, tmp_path / "layer_1.npy") == SteeringSpec.simple_add(1, axis[1])
    (tmp_path / "vectors.json").write_text(json.dumps({"layer_1": axis[1].tolist()}))
    assert steered_by(server, tmp_path / "vectors.json") == SteeringSpec.simple_add(1, axis[1])


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("axis.npy", (40, 8), (), "it has 40 rows and the model"),
        ("v.npy", (8,), (), "--layer (layer= in Python) says it"),
        ("layer_99.npy", (8,), (), "layer 99 is outside 0.."),
        ("layer_1.npy", (7,), (), "has 7 numbers and the model's hidden size is 8"),
        ("layer_1.npy", (8,), ("--scale", "inf"), "--scale: inf is not finite"),
        (
            "layer_1.npy",
            (8,),
            ("--feature", "-1"),
            "steer: layer_1.npy: --feature (feature= in Python): -1 is not one of",
        ),
    ],
)
def test_a_file_of_vectors_that_does_not_fit_is_refused(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    shape: tuple,
    options: tuple,
    message: str,
) -> None:
    np.save(tmp_path / name, np.ones(shape, np.float32))
    assert steered_by(server, tmp_path / name, *options) is None
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("steering", [(), ("--steering", '{"layers": {}}')])
@pytest.mark.parametrize("option", [("--layer", 1), ("--rows", "after-layer")])
def test_options_of_a_file_of_vectors_need_one(
    steering: tuple, option: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("hello", *steering, *option) == 2
    assert f"{option[0]}: it is for --steering with a file of vectors" in capsys.readouterr().err


def trained(folder: Path, model: ModelInfo) -> Path:
    """A folder as `steer train` writes it, for the model of the server."""
    axis = np.eye(4, 8, dtype=np.float32)
    save_spec(folder, SteeringSpec.simple_add(1, axis[1]), model=model)
    write_vectors(folder / "directions.safetensors", dict(enumerate(axis)), kind="safetensors")
    return folder


@pytest.mark.parametrize("name", ["steering.json", "steering.safetensors"])
def test_one_file_of_trained_steering_leads_to_its_folder(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = trained(tmp_path / "cold", server.backend.info)
    assert steered_by(server, folder / name) is None
    assert f"give the folder {folder}, or {folder / 'directions.safetensors'}" in capsys.readouterr().err
    (folder / "directions.safetensors").unlink()
    with pytest.raises(InvalidRequest, match=f"which is a folder; give the folder {folder}$"):
        load_spec(folder / name)
    assert load_spec(folder) == SteeringSpec.simple_add(1, np.eye(8)[1])


def test_a_layer_of_a_trained_folder_is_a_layer_of_its_directions(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path / "cold", server.backend.info)
    directions = folder / "directions.safetensors"
    assert steered_by(server, folder, "--layer", 2) is None
    assert f"--layer: it is for --steering with a file of vectors; this folder has one: {directions}\n" in (
        capsys.readouterr().err
    )
    assert steered_by(server, directions, "--layer", 2) == SteeringSpec.simple_add(2, np.eye(8)[2])
    assert "--layer N" not in capsys.readouterr().err
    spec = steered_by(server, directions)
    assert spec is not None
    assert list(spec.layers) == [0, 1, 2, 3]
    said = "steer: it has 4 layers, which are all steered; --layer N steers one of them alone\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"positive": "a", "negative": "b"}\n{"positive": "c", "negative": "d"}\n', "it is a file for `steer train`"),
        (
            "root:x:0:0\n",
            "is not JSON: Expecting value: line 1 column 1 (char 0); expected a JSON document of a spec, a",
        ),
        ('{"layers": {}}\n{}', "is not JSON: Extra data: line 2"),
    ],
)
def test_a_file_that_is_not_one_document_is_named_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "given").write_text(content)
    assert run("hello", "--steering", tmp_path / "given") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"steer: --steering: {tmp_path / 'given'} ")
    assert message in printed


def test_the_steered_layers_of_a_table_are_said_on_standard_error(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = server.backend.info
    np.save(tmp_path / "axis.npy", np.ones((info.layer_count, info.hidden_size), np.float32))
    assert steered_by(server, tmp_path / "axis.npy", "--scale", -3) is not None
    printed = capsys.readouterr()
    assert f"steer: steering layers 0-{info.layer_count - 1} (addition, scale x norm -8.485)\n" in printed.err
    assert "steering" not in printed.out
    document = {"layers": {"1": [{"op": "add", "vector": [1.0] * 8}]}}
    (tmp_path / "one.json").write_text(json.dumps(document))
    assert steered_by(server, tmp_path / "one.json") is not None
    assert capsys.readouterr().err == "steer: steering layer 1 (addition, scale x norm 2.828)\n"
    assert steered_by(server, json.dumps(document)) is not None  # the command line shows it
    assert capsys.readouterr().err == ""


def test_a_scale_multiplies_the_additions_of_any_steering(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    addition = {"op": "add", "vector": [1.0] * 8, "scale": 0.5}
    document = tmp_path / "steering.json"
    document.write_text(json.dumps({"layers": {"2": [addition]}}))
    spec = steered_by(server, document, "--scale", -3)
    assert spec == SteeringSpec({2: LayerSteeringSpec([AddSpec([1.0] * 8, scale=-1.5)])})

    cap = {"op": "cap", "vector": [1.0] * 8, "max": 1.0}
    document.write_text(json.dumps({"layers": {"2": [addition, cap]}}))
    assert steered_by(server, document, "--scale", 2) is None
    assert "--scale: only additions can be scaled" in capsys.readouterr().err
    assert run("hello", "--scale", 2) == 2
    assert "--scale needs --steering" in capsys.readouterr().err
