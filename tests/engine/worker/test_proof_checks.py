"""How far a row may be from what another class of steps captured for the same input."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.engine.worker.proof_checks import ModelFault, PassChecks, ProofPass, Reference

LAYERS, HIDDEN = 30, 16
STREAMS_LID = np.random.default_rng(0).standard_normal((LAYERS, 2, HIDDEN)).astype(np.float32)


def check(read_LND: np.ndarray) -> None:
    context: Any = SimpleNamespace(layers=range(LAYERS), dtype="bfloat16")
    output_TD = torch.zeros(2, HIDDEN)
    checks = PassChecks(
        context=context,
        reference=Reference(streams_LID=STREAMS_LID, start=0, aim=1, layers=[0]),
        rows=[0, 1],
        kept=[0, 1],
        idle_TD=output_TD,
        aim_TD=output_TD,
        is_steady=True,
    )
    nothing: Any = None
    checks.check_reading(ProofPass(forward=nothing, output_TD=output_TD, streams_LND=read_LND, calls=nothing))


def off(*distances: float) -> np.ndarray:
    """The streams, of which the second row is so far off after each layer, over its norm."""
    read_LND = STREAMS_LID.copy()
    norms_L = np.linalg.norm(read_LND[:, 1], axis=-1)
    read_LND[:, 1, 0] += norms_L * np.array(distances, np.float32)
    return read_LND


def test_a_difference_that_grows_from_layer_to_layer_is_rounding() -> None:
    """As of the bundled model when it is compiled: 0.002 after layer 2 and 0.107 after layer 29."""
    check(off(0, 0, *np.geomspace(0.002, 0.107, LAYERS - 2)))


@pytest.mark.parametrize("layer", [0, 12, LAYERS - 1])
def test_a_difference_that_comes_at_once_is_refused(layer: int) -> None:
    distances = np.zeros(LAYERS)
    distances[layer] = 0.1
    with pytest.raises(ModelFault, match=f"after layer {layer} is 0.1 of its norm off .*allowed: 0.08"):
        check(off(*distances))


def test_a_difference_of_half_a_row_is_refused_however_slowly_it_came() -> None:
    with pytest.raises(ModelFault, match=r"is 0\.\d+ of its norm off .*allowed: 0\.5"):
        check(off(*np.geomspace(0.002, 1.0, LAYERS)))


def test_rows_that_were_swapped_and_rows_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ModelFault, match="after layer 0 "):
        check(STREAMS_LID[:, ::-1])
    read_LND = STREAMS_LID.copy()
    read_LND[5, 1, 3] = np.nan
    with pytest.raises(ModelFault, match="after layer 5 is inf"):
        check(read_LND)
