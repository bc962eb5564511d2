"""Operations of every kind, with vectors from a seed: hypothesis chooses the shape of a case, not each number."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from steer_service.core.specs import AblationSpec, AddSpec, ProjectionCapSpec, SteeringOp

WIDTHS = st.sampled_from([1, 2, 3, 16, 37, 64, 200])
"""Hidden sizes: below, at and beside the widths of vector instructions."""

SEEDS = st.integers(0, 2**32 - 1)
NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-4.0, 4.0, width=32))


ANYWHERE = st.none()
"""No positions of an operation's own."""


@st.composite
def vectors(draw: st.DrawFn, width: int) -> np.ndarray:
    """A float32 vector of any direction, its norm between about 0.01 and 100 times the square root of the width."""
    direction = np.random.default_rng(draw(SEEDS)).normal(size=width)
    direction[draw(st.integers(0, width - 1))] += 0.1  # a single element may come out as almost nothing
    return (direction * 10.0 ** draw(st.integers(-2, 2))).astype(np.float32)


@st.composite
def operations(draw: st.DrawFn, width: int, positions: st.SearchStrategy[Any] = ANYWHERE) -> SteeringOp:
    """One operation of any kind."""
    vector, where = draw(vectors(width)), draw(positions)
    match draw(st.sampled_from(["add", "cap", "ablation"])):
        case "add":
            return AddSpec(vector, draw(NUMBERS), positions=where)
        case "ablation":
            return AblationSpec(vector, draw(NUMBERS), positions=where)
    low, high = sorted([draw(NUMBERS), draw(NUMBERS)])
    low, high = draw(st.sampled_from([(low, None), (None, high), (low, high)]))
    return ProjectionCapSpec(vector, low, high, positions=where)


def operation_lists(
    width: int, least: int = 0, most: int = 4, positions: st.SearchStrategy[Any] = ANYWHERE
) -> st.SearchStrategy[list[SteeringOp]]:
    """Some operations of one layer, in order."""
    return st.lists(operations(width, positions), min_size=least, max_size=most)
