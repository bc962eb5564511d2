"""Files of lm-eval's steered models: additions and clamps at the outputs of layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_service.core.arrays import as_torch
from steer_service.core.specs import AddSpec, ProjectionCapSpec
from steer_service.formats.vector_files import read_vectors
from steer_service.ops.reference import apply_operations
from tests.formats.layouts.files import refusal, rows, write

VECTOR, BIAS = rows(2)


def hook(**changes: Any) -> dict[str, Any]:
    return {"action": "add", "steering_vector": VECTOR, "steering_coefficient": 2.0, "head_index": None,
            "bias": None} | changes  # fmt: skip


def test_an_addition_has_its_coefficient(tmp_path: Path) -> None:
    path = write(tmp_path / "steer.pt", {"layers.13": hook(), "layers.2": {"action": "add", "steering_vector": VECTOR}})
    found = read_vectors(path, layer_count=14)
    assert (found.kind, found.layer_numbers) == ("lm-eval", (2, 13))
    for scale in (1.0, -3.0):
        spec = found.to_spec(scale)
        for layer, coefficient in ((13, 2.0), (2, 1.0)):
            [added] = spec.layers[layer].operations
            assert isinstance(added, AddSpec)
            np.testing.assert_allclose(added.materialize(), scale * coefficient * VECTOR, rtol=1e-6)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_a_clamp_does_what_lm_eval_does(bias: np.ndarray | None, tmp_path: Path) -> None:
    """The formula of `SteeredModel.clamp`: without the bias, the projection becomes the coefficient."""
    path = write(tmp_path / "steer.pt", {"layers.13": hook(action="clamp", bias=bias, steering_vector=VECTOR[None])})
    states = rows(50)
    unit = VECTOR / np.linalg.norm(VECTOR)
    shifted = states if bias is None else states - bias
    want = shifted + (2.0 - shifted @ unit)[:, None] * unit + (0 if bias is None else bias)
    [operation] = read_vectors(path).to_spec().layers[13].operations
    assert isinstance(operation, ProjectionCapSpec)
    got = apply_operations(as_torch(states.copy()), (operation,))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "changes", "said"),
    [
        ("layers.3.mlp", {}, "another place"),
        ("embed_tokens", {}, "not a decoder layer"),
        ("layers.3", {"head_index": 4}, "attention heads are another place"),
        ("layers.3", {"bias": BIAS}, "no bias with the action add"),
        ("layers.3", {"action": "ablate"}, "neither add nor clamp"),
        ("layers.3", {"steering_coefficient": "x"}, "is not a number"),
        ("layers.3", {"steering_vector": 1.0}, "not an array"),
        ("layers.3", {"action": "clamp", "bias": BIAS[:2]}, "bias has 2 numbers"),
        ("layers.3", {"extra": 1}, "'extra' is not known"),
    ],
)
def test_what_steering_here_cannot_do_is_refused(key: str, changes: dict, said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path / "x.pt", {key: hook(**changes)}), "UNKNOWN_LAYOUT")


def test_a_table_of_lm_eval_is_refused_with_the_lines_that_make_a_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "steer.csv").write_text(
        "loader,action,sparse_model,hookpoint,feature_index\nsae_lens,add,x,layers.1,2\n"
    )
    said = refusal(tmp_path / "steer.csv", "UNKNOWN_LAYOUT")
    assert said.startswith("steer.csv is a table of lm-eval")
    assert 'SteeredModel.derive_steer_config("steer.csv")' in said
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n")
    assert 'numpy.loadtxt("rows.csv"' in refusal(tmp_path / "rows.csv", "UNKNOWN_LAYOUT")
