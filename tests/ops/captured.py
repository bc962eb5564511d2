"""The contract of docs/numerics.md on rows that a whole backend has captured."""

import numpy as np
import torch

from steer_service.core.specs import SteeringSpec
from steer_service.ops.truth import acts_on, truth_of
from steer_service.runtime.results import Output
from tests.ops.conformance import DTYPES, judge


def check_captured(output: Output, steering: SteeringSpec | None, dtype: str) -> float:
    """Asserts that rows of a model of this dtype, captured at both sites in float32, keep the contract.

    Each steered row is within the tolerance of the truth about the row before it, rounded to the model's dtype; all
    others keep their bits. Positions of operations are numbers. Returns the largest error in units of the tolerance.
    """
    assert output.labels is not None
    active = steering.active_layers() if steering is not None else {}
    positions_T = output.labels.positions
    is_steered_T = np.zeros(len(positions_T), bool)
    errors = [0.0]
    for layer, before_TD in output.captured.before.items():
        after_TD = output.captured.after[layer]
        operations = active[layer].operations if layer in active else ()
        steered_T = np.any([np.zeros_like(is_steered_T), *(acts_on(one, positions_T) for one in operations)], axis=0)
        is_steered_T |= steered_T
        assert after_TD[~steered_T].tobytes() == before_TD[~steered_T].tobytes(), f"layer {layer}"
        if steered_T.any():
            rows_TD = torch.from_numpy(after_TD[steered_T])
            assert torch.equal(rows_TD.to(DTYPES[dtype]).float(), rows_TD), f"layer {layer} is not rounded"
            truth = truth_of(before_TD[steered_T].astype(np.float64), operations, positions_T[steered_T])
            errors.append(float(judge(dtype, rows_TD, np.zeros(len(rows_TD), bool), truth).max()))
    if set(active) <= set(output.captured.before):
        np.testing.assert_array_equal(output.labels.is_steered, is_steered_T)
    return max(errors)
