"""Random specs, and the constructors of each operation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steer_service.core.specs import (
    AblationSpec,
    AddSpec,
    LayerSteeringSpec,
    ProjectionCapSpec,
    SteeringOp,
    SteeringSpec,
)

UP = [0.0, 3.0, 4.0]
MAKERS: dict[str, Callable[[Any], SteeringOp]] = {
    "Steering": AddSpec,
    "Projection cap": lambda vector: ProjectionCapSpec(vector, min=0.0),
    "Ablation": AblationSpec,
}
UNNORMALIZED: dict[str, Callable[[Any], SteeringOp]] = {
    "Steering": AddSpec.from_unnormalized,
    "Projection cap": lambda vector: ProjectionCapSpec.from_unnormalized(vector, min=0.0),
    "Ablation": AblationSpec.from_unnormalized,
}
each_operation = pytest.mark.parametrize("name", MAKERS)
numbers = st.floats(-1e3, 1e3)
elements = st.floats(-1e3, 1e3, width=32)
vectors = hnp.arrays(np.float32, 4, elements=elements).filter(lambda v: float(np.abs(v).max()) > 1e-3)
bounds = st.tuples(numbers, numbers).map(sorted)
_plain = st.one_of(
    st.builds(AddSpec, vectors, numbers, scaling=st.sampled_from(["absolute", "relative"])),
    st.builds(lambda v, b: ProjectionCapSpec(v, min=b[0], max=b[1]), vectors, bounds),
    st.builds(lambda v, b: ProjectionCapSpec(v, min=b), vectors, numbers),
    st.builds(lambda v, b: ProjectionCapSpec(v, max=b), vectors, numbers),
    st.builds(AblationSpec, vectors, numbers),
)
operations = _plain | st.builds(
    dataclasses.replace, _plain, max_relative_change=st.none() | st.floats(0.01, 10.0), keep_norm=st.booleans()
)
layer_specs = st.lists(operations, max_size=3).map(tuple).map(LayerSteeringSpec)
specs = st.dictionaries(st.integers(0, 40), layer_specs, max_size=4).map(SteeringSpec)


def effect(spec: SteeringSpec) -> list[Any]:
    """Everything that can matter to what a spec does, written independently of the digest."""

    def of(operation: SteeringOp) -> tuple[Any, ...]:
        fields = {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
        bits = fields.pop("vector").tobytes()
        return (
            type(operation).__name__,
            bits,
            tuple(sorted((k, v + 0.0 if isinstance(v, float) else str(v)) for k, v in fields.items())),
        )

    return [
        (layer, [of(op) for op in part.operations])
        for layer, part in sorted(spec.layers.items())
        if not part.is_empty()
    ]
