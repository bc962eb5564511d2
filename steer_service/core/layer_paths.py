"""Where models keep their decoder layers: paths of attributes, in the order in which they are tried."""

from collections.abc import Iterator, Sequence
from typing import Any

VLLM_LAYER_PATHS = (
    "model.layers",
    "language_model.model.layers",
    "transformer.h",
    "model.h",
    "model.decoder.layers",
    "transformer.encoder.layers",
    "transformer.blocks",
)
"""Paths in the models of vLLM."""

TRANSFORMERS_LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "model.decoder.layers",
    "transformer.h",
    "transformer.blocks",
    "gpt_neox.layers",
    "model.model.layers",
)
"""Paths in the models of transformers."""


def attributes_at(model: object, paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each path that exists in the model, in the order of `paths`, with the attribute that it leads to."""
    for path in paths:
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            yield path, found
