"""Files that other projects wrote, or have read, do here what they do there: `peers/make.py` has recorded it."""

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
from steer_service.formats.layer_vectors import spec_of_additions
from steer_service.formats.vector_files import read_vectors, write_vectors
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.results import Output
from tests.engine.oracle import relative_error
from tests.hf.test_model import run

PEERS = Path(__file__).parent / "peers"

TOLERANCE = 1e-5

LAYERS = 4
FOUND = {"repeng.gguf": [0, 2, 3], "steering_vectors.pt": [0, 2, 3]}
"""File that a project wrote -> the layers that it was asked for."""
GIVEN = {"for_repeng.gguf": [1, 3], "for_steering_vectors.pt": [0, 1, 3]}
"""File that was written here and read there -> the layers it was written for."""


@dataclass(frozen=True)
class Recorded:
    """What a project made of the model with one of the files."""

    scale: float
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    streams: np.ndarray
    """The stream behind each block, [layers, tokens - 1, width]."""

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
    imported, recorded = read_vectors(PEERS / name), Recorded.of(name)
    assert list(imported.layers) == (FOUND | GIVEN)[name]
    output = await steered(model, imported.to_spec(recorded.scale), recorded)
    for layer in range(LAYERS):
        assert relative_error(output.captures[layer], recorded.streams[layer]) <= TOLERANCE
    assert tuple(output.token_ids) == recorded.generated


@pytest.mark.parametrize("name", FOUND | GIVEN)
@pytest.mark.parametrize("shift", [-1, 1])
async def test_a_layer_off_would_be_noticed(name: str, shift: int, model: HFSteeringModel):
    vectors, recorded = read_vectors(PEERS / name).layers, Recorded.of(name)
    shifted = {layer + shift: vectors[layer] for layer in vectors if layer + shift in range(LAYERS)}
    output = await steered(model, spec_of_additions(shifted, recorded.scale), recorded)
    prompt = slice(len(recorded.prompt))  # other tokens may follow, and other rows with them
    errors = [
        relative_error(output.captures[layer][prompt], recorded.streams[layer][prompt]) for layer in range(LAYERS)
    ]
    assert max(errors) > 1000 * TOLERANCE


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
