"""Folders that `save_steering` of the in-process steerllm wrote: additions after decoder layers, counted from 0.

`steering_vectors.pt` is `{str(layer): tensor}`; `steering_config.json`, if it is there, names `model_name`,
`target_layers` and `hidden_size`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_service.core.arrays import Float32Array
from steer_service.core.errors import InvalidRequest
from steer_service.formats.layer_vectors import vectors_by_layer
from steer_service.formats.torch_file import read_torch

VECTORS = "steering_vectors.pt"
CONFIG = "steering_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacySteering:
    """The content of such a folder."""

    vectors: Mapping[int, Float32Array]
    """Layer -> the vector added to its residual stream, float32, shape [hidden_size]; zeros if it was never trained."""
    model_name: str
    """The model that it was made for; "" if it is not known."""
    hidden_size: int
    """Hidden size of the model."""


def read_legacy(directory: Path) -> LegacySteering:
    """What steerllm saved there; raises InvalidRequest if the files are damaged or contradict each other."""
    vectors = vectors_by_layer(read_torch(directory / VECTORS))
    hidden_size = next(iter(vectors.values())).size
    config = _config(directory / CONFIG)
    _check_equal(config, "hidden_size", hidden_size)
    if isinstance(config.get("target_layers"), list):
        config["target_layers"] = sorted(config["target_layers"], key=str)
    _check_equal(config, "target_layers", sorted(vectors, key=str))
    return LegacySteering(vectors=vectors, model_name=str(config.get("model_name") or ""), hidden_size=hidden_size)


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{CONFIG} is not JSON", reason="BAD_JSON", field=CONFIG) from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{CONFIG} is not an object", reason="BAD_JSON", field=CONFIG)
    return config


def _check_equal(config: Mapping[str, Any], name: str, found: Any) -> None:
    if config.get(name, found) != found:
        raise InvalidRequest(
            f"{CONFIG} has {config[name]!r}, {VECTORS} has {found!r}", reason="BAD_CHECKPOINT", field=name
        )
