"""The worker: what it refuses, and what it runs when it has refused."""

from typing import Any

import pytest

from steer_service.core.errors import Unsupported
from steer_service.engine.config import SteeringConfig
from steer_service.engine.worker.worker import PlatformWorker, SteeringWorker, check_device


def test_a_gpu_is_refused_unless_unverified_devices_are_allowed() -> None:
    check_device("cpu", SteeringConfig())
    check_device("cuda", SteeringConfig(allow_unverified=True))
    with pytest.raises(Unsupported, match=r"never run on one.*--steer-allow-unverified") as raised:
        check_device("cuda", SteeringConfig())
    assert raised.value.reason == "DEVICE_NOT_VERIFIED"


@pytest.mark.parametrize("device_type", ["xpu", "tpu", "meta"])
def test_a_device_without_hooks_is_refused_whatever_is_allowed(device_type: str) -> None:
    """Their memory has addresses that the kernel of a CPU would write to."""
    with pytest.raises(Unsupported, match=f"type '{device_type}', only for cpu and cuda") as raised:
        check_device(device_type, SteeringConfig(allow_unverified=True))
    assert raised.value.reason == "DEVICE_NOT_VERIFIED"


def test_a_refused_model_runs_the_warm_up_and_never_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's V2 runner warms up by real steps; what was refused is reported only afterwards."""
    monkeypatch.setattr(PlatformWorker, "execute_model", lambda *_: "ran")
    worker: Any = SteeringWorker.__new__(SteeringWorker)
    worker.steering, worker.is_warm = None, False

    assert worker.execute_model(None) == "ran"
    worker.is_warm = True
    with pytest.raises(AssertionError, match="warm-up only"):
        worker.execute_model(None)
