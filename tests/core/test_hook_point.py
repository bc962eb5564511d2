"""Hook points in Python."""

from typing import Any

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import Unsupported
from steer_service.core.hook_point import HookPoint
from steer_service.core.specs import AddSpec, LayerSteeringSpec


def test_a_hook_point_is_given_by_name_or_by_value() -> None:
    assert CaptureSpec(layers=(0,), hook="residual_stream") == CaptureSpec(layers=(0,))
    layer = LayerSteeringSpec([AddSpec([1.0])], hook="residual_stream")
    assert layer.hook is layer.clone().hook is HookPoint.RESIDUAL_STREAM


@pytest.mark.parametrize("bad", ["attention", "", None, 2, ["residual_stream"]], ids=str)
def test_another_hook_point_is_refused_with_those_that_there_are(bad: Any) -> None:
    for make in (lambda: LayerSteeringSpec(hook=bad), lambda: CaptureSpec(layers=(0,), hook=bad)):
        with pytest.raises(Unsupported, match="not one of 'residual_stream'") as refused:
            make()
        assert (refused.value.reason, refused.value.field) == ("UNKNOWN_HOOK_POINT", "hook")
