"""Checks of single fields."""

import pytest

from steer_service.core.errors import InvalidRequest
from steer_service.core.field_checks import check_layer


@pytest.mark.parametrize(
    ("layer", "last", "said"),
    [
        (-1, 29, "layer -1 is negative; layers count from 0: this model has 30, so -1 would be 29"),
        (-30, 29, "layer -30 is negative; layers count from 0: this model has 30, so -30 would be 0"),
        (-31, 29, "layer -31 is negative; layers count from 0: this model has 30, 0..29"),
        (30, 29, "layer 30 is outside 0..29"),
    ],
)
def test_a_layer_that_the_model_lacks_is_explained_in_numbers(layer: int, last: int, said: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_layer(layer, last)
    assert (raised.value.message, raised.value.reason) == (said, "UNKNOWN_LAYER")


def test_without_a_model_a_negative_layer_is_explained_by_the_rule() -> None:
    with pytest.raises(InvalidRequest) as raised:
        check_layer(-2)
    assert raised.value.message == (
        "layer -2 is negative; layers count from 0: counted from the end it is layer_count - 2, and "
        "`model.layer_count` has the number"
    )
