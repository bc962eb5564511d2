"""The axis, the vectors of roles and the capping configurations of assistant-axis."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.core.arrays import as_torch
from steer_service.core.specs import ProjectionCapSpec
from steer_service.formats.vector_files import read_vectors
from steer_service.ops.reference import apply_operations
from tests.formats.layouts.files import HIDDEN, assert_layers, refusal, rows, write

AXIS = rows(30)
IDS = ("layers_46:54-p0.25", "layers_46:54-p0.5")


def config(**first: Any) -> dict[str, Any]:
    """Two experiments on three directions, of which two are at layer 5."""
    names = {"trait/a": 5, "trait/b": 5, "axis": 7}
    interventions = [{"vector": name, "cap": cap} for name, cap in zip(names, (1.5, -0.5, 2.0), strict=True)]
    return {
        "vectors": {name: {"layer": layer, "vector": rows(3)[at]} for at, (name, layer) in enumerate(names.items())},
        "experiments": [
            {"id": IDS[0], "interventions": interventions} | first,
            {"id": IDS[1], "interventions": [{"vector": "axis", "cap": 9.0}, {"vector": "axis", "coefficient": 1.0}]},
        ],
    }


@pytest.mark.parametrize(
    "others", [{"default_mean": AXIS}, {"default_mean": AXIS, "role_mean": AXIS, "n_default": 1, "n_roles": 275}]
)
def test_row_l_of_an_axis_is_after_layer_l(others: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "axis.pt", {"axis": AXIS, **others})
    for options in ({}, {"layer_count": 30}):
        found = read_vectors(path, **options)
        assert found.kind == "assistant-axis"
        assert_layers(found, dict(enumerate(AXIS)))
    assert_layers(read_vectors(path, layer=22), {22: AXIS[22]})
    for count in (29, 31):
        refusal(path, "WRONG_LAYER_COUNT", layer_count=count)


def test_the_vector_of_a_role_is_read_like_an_axis(tmp_path: Path) -> None:
    path = write(tmp_path / "pirate.pt", {"vector": AXIS, "type": "pos_3", "role": "pirate"})
    assert_layers(read_vectors(path, layer=4), {4: AXIS[4]})


def test_an_experiment_becomes_caps_from_above_in_its_order(tmp_path: Path) -> None:
    path = write(tmp_path / "capping_config.pt", config())
    message = refusal(path, "NEEDS_OPTION", "experiment")
    assert IDS[0] in message
    assert IDS[1] in message
    spec = read_vectors(path, experiment=IDS[0], layer_count=8, hidden_size=HIDDEN).to_spec()
    assert spec.layers[5].operations == (
        ProjectionCapSpec(rows(3)[0], max=1.5),
        ProjectionCapSpec(rows(3)[1], max=-0.5),
    )
    assert spec.layers[7].operations == (ProjectionCapSpec(rows(3)[2], max=2.0),)
    second = read_vectors(path, experiment=IDS[1])
    assert "1 interventions without a cap left out" in second.convention
    assert list(second.to_spec().layers) == [7]


def test_the_caps_do_what_the_project_does(tmp_path: Path) -> None:
    """Its formula, of `ActivationSteering._apply_cap`: what exceeds tau along v is taken away."""
    states = 3 * rows(50)
    spec = read_vectors(write(tmp_path / "x.pt", config()), experiment=IDS[0]).to_spec()
    want = states.astype(np.float64)
    for vector, tau in ((rows(3)[0], 1.5), (rows(3)[1], -0.5)):
        unit = vector / np.linalg.norm(vector.astype(np.float64))
        want = want - np.outer(np.clip(want @ unit - tau, 0.0, None), unit)
    got = apply_operations(as_torch(states.copy()), spec.layers[5].operations)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-5)


def test_the_only_experiment_needs_no_name_and_caps_have_no_scale(tmp_path: Path) -> None:
    one = {"vectors": {"n": {"layer": 5, "vector": rows()}},
           "experiments": [{"id": "e", "interventions": [{"vector": "n", "cap": 1.5}]}]}  # fmt: skip
    found = read_vectors(write(tmp_path / "x.pt", one))
    assert (found.kind, found.layer_numbers) == ("capping", (5,))
    assert found.to_spec().layers[5].operations == (ProjectionCapSpec(rows(), max=1.5),)
    with pytest.raises(ValueError, match=r"layers\[5\]\.scale: scale 2 is for additions"):
        found.to_spec(2.0)


@pytest.mark.parametrize(
    "first",
    [
        {"interventions": []},
        {"interventions": "x"},
        {"interventions": [1]},
        {"interventions": [{"vector": "nothing", "cap": 1.0}]},
        {"interventions": [{"vector": "axis", "cap": "much"}]},
        {"interventions": [{"vector": ["axis"], "cap": 1.0}]},
    ],
)
def test_a_damaged_configuration_is_refused(first: dict[str, Any], tmp_path: Path) -> None:
    refusal(write(tmp_path / "x.pt", config(**first)), "UNKNOWN_LAYOUT", experiment=IDS[0])


def test_other_damage_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", config())
    refusal(path, "OUT_OF_RANGE", "experiment", experiment="x")
    refusal(path, "UNKNOWN_LAYER", experiment=IDS[0], layer_count=6)
    refusal(path, "WRONG_WIDTH", experiment=IDS[0], hidden_size=8)
    for changes in ({"vectors": 1}, {"experiments": 1}, {"experiments": []}):
        with pytest.raises(ValueError, match=r"x\.pt"):
            read_vectors(write(tmp_path / "x.pt", config() | changes))
    torch.save({"axis": torch.ones(3), "default_mean": torch.ones(3)}, tmp_path / "y.pt")
    refusal(tmp_path / "y.pt", "UNKNOWN_LAYOUT")
