"""Devices with hooks, and those without."""

import pytest

from steer_service.core.errors import Unsupported
from steer_service.engine.worker.devices import check_device


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_device_with_hooks_needs_no_flag(device_type: str) -> None:
    check_device(device_type)


@pytest.mark.parametrize("device_type", ["xpu", "tpu", "meta"])
def test_a_device_without_hooks_is_refused(device_type: str) -> None:
    """Their memory has addresses that the kernel of a CPU would write to."""
    with pytest.raises(Unsupported, match=f"type '{device_type}', only for cpu and cuda") as raised:
        check_device(device_type)
    assert raised.value.reason == "DEVICE_NOT_SUPPORTED"
