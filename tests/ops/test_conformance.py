"""Ten thousand hostile cases on every backend of this machine, in every dtype, none outside the published tolerance."""

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.conformance import (
    KINDS,
    CaseShape,
    check_case,
    random_operation,
)
from tests.ops.strategies import SEEDS, WIDTHS

CASES = 10_000

SPECIAL_SCALES = (0.0, 1.0, -1.0, 1.0 + 1e-7, 2.0)
POOL = [random_operation(np.random.default_rng(index), KINDS[index % len(KINDS)]) for index in range(3000)]
POOL += [replace(shape, scale=SPECIAL_SCALES[index % 5]) for index, shape in enumerate(POOL[:300])]
"""Operations to draw whole, as drawing each of their numbers would take longer than all else."""

SHAPES = st.builds(
    CaseShape,
    width=WIDTHS,
    seed=SEEDS,
    magnitudes=st.sampled_from([(1.0, 1.0), (1e-3, 1e3), (1e3, 1e-3), (0.1, 10.0), (0.0, 1.0)]),
    operations=st.lists(st.sampled_from(POOL), max_size=6).map(tuple),
)


@settings(max_examples=CASES, database=None, suppress_health_check=list(HealthCheck))
@given(SHAPES)
def test_every_backend_keeps_the_contract_in_every_dtype(shape: CaseShape) -> None:
    check_case(shape)
