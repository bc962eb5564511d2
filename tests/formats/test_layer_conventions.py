"""Which layer a file means: each holds what its project finds in the model, under its own index."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from steer_service.core.arrays import as_torch
from steer_service.core.capture import CaptureSpec
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.formats.layer_vectors import Imported
from steer_service.formats.vector_files import read_vectors, write_vectors
from steer_service.hf.model import HFSteeringModel
from tests.formats.vectors import direction, vectors, write_gguf
from tests.hf.test_model import run
from tests.tiny_models import LAYERS, WIDTH

TOKENS = tuple(range(500, 509))


@pytest.fixture
async def streams(hf: HFSteeringModel) -> dict[int, np.ndarray]:
    """Layer, in our convention -> the stream after it at the prompt's last token."""
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=TOKENS),
        sampling=SamplingOptions(max_tokens=1, temperature=0.0, ignore_eos=True),
        capture=CaptureSpec(layers=range(LAYERS)),
    )
    captures = (await run(hf, request)).outputs[0].captures
    return {layer: captures[layer][-1] for layer in range(LAYERS)}


@pytest.fixture
def hidden_states(hf: HFSteeringModel) -> list[torch.Tensor]:
    with torch.no_grad():
        out = hf.model(input_ids=torch.tensor([TOKENS]), output_hidden_states=True)
    return [state[0, -1] for state in out.hidden_states]


def assert_same(imported: Imported, streams: dict[int, np.ndarray]) -> None:
    for layer, vector in imported.layers.items():
        np.testing.assert_allclose(vector, streams[layer], rtol=1e-5, atol=1e-5)


def test_repeng_finds_direction_n_in_hidden_states_n_plus_1(
    hidden_states: list[torch.Tensor], streams: dict[int, np.ndarray], tmp_path: Path
):
    found = {f"direction.{layer}": hidden_states[layer + 1].numpy() for layer in range(LAYERS - 1)}
    imported = read_vectors(write_gguf(tmp_path / "x.gguf", found))
    assert list(imported.layers) == [0, 1, 2]  # repeng names block 0 as well, if it is asked to
    assert_same(imported, streams)
    assert imported.model_hint == "llama"
    assert "after decoder block N, counted from 0" in imported.convention


def test_llama_cpp_adds_direction_n_behind_block_n_counted_from_0(tmp_path: Path):
    write_vectors(tmp_path / "x.gguf", vectors(1, 3), kind="gguf")
    buffer = np.zeros(WIDTH * (LAYERS - 1), dtype=np.float32)
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:  # as common_control_vector_load_one
        start = WIDTH * (int(tensor.name.split(".")[1]) - 1)
        buffer[start : start + WIDTH] += tensor.data
    added = {il: buffer[WIDTH * (il - 1) : WIDTH * il] for il in range(1, LAYERS)}  # as llama_adapter_cvec::apply
    for layer, vector in vectors(1, 3).items():
        np.testing.assert_array_equal(added[layer], vector)
    assert not added[2].any()


def test_steering_vectors_count_the_outputs_of_blocks_from_0(
    hf: HFSteeringModel, streams: dict[int, np.ndarray], tmp_path: Path
):
    found: dict[int, torch.Tensor] = {}
    blocks = [hf.model.get_submodule(f"model.layers.{number}") for number in range(LAYERS)]
    hooks = [
        block.register_forward_hook(lambda _m, _i, output, number=number: found.update({number: output[0, -1]}))
        for number, block in enumerate(blocks)
    ]
    with torch.no_grad():
        hf(input_ids=torch.tensor([TOKENS]))
    for hook in hooks:
        hook.remove()
    torch.save({"layer_activations": found, "layer_type": "decoder_block"}, tmp_path / "x.pt")
    imported = read_vectors(tmp_path / "x.pt")
    assert (imported.kind, list(imported.layers)) == ("steering-vectors", list(range(LAYERS)))
    assert_same(imported, streams)


def test_row_r_of_a_persona_vector_is_the_stream_after_block_r_minus_1(
    hf: HFSteeringModel, hidden_states: list[torch.Tensor], streams: dict[int, np.ndarray], tmp_path: Path
):
    torch.save(torch.stack(hidden_states), tmp_path / "x.pt")
    imported = read_vectors(tmp_path / "x.pt", layer_count=LAYERS)
    assert (imported.kind, list(imported.layers)) == ("persona", list(range(LAYERS)))
    last = LAYERS - 1
    normed = hf.model.model.norm(as_torch(streams[last].copy())[None]).detach()[0].numpy()
    assert_same(imported, streams | {last: normed})  # transformers returns the last one behind the final norm


def test_a_persona_vector_is_added_where_its_project_adds_it(hf: HFSteeringModel, tmp_path: Path):
    rows = torch.zeros(LAYERS + 1, WIDTH)
    rows[2] = torch.tensor(direction(5))
    torch.save(rows, tmp_path / "x.pt")
    [(layer, vector)] = read_vectors(tmp_path / "x.pt", layer_count=LAYERS).layers.items()
    assert layer == 1  # ActivationSteerer(vector=rows[2], layer_idx=2 - 1)
    np.testing.assert_array_equal(vector, rows[2].numpy())
