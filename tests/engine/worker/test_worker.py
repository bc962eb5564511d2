"""The worker: what it refuses, and what it runs when it has refused."""

from typing import Any

import pytest

from steer_service.engine.worker.worker import PlatformWorker, SteeringWorker


def test_a_refused_model_runs_the_warm_up_and_never_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's V2 runner warms up by real steps; what was refused is reported only afterwards."""
    monkeypatch.setattr(PlatformWorker, "execute_model", lambda *_: "ran")
    worker: Any = SteeringWorker.__new__(SteeringWorker)
    worker.steering, worker.is_warm = None, False

    assert worker.execute_model(None) == "ran"
    worker.is_warm = True
    with pytest.raises(AssertionError, match="warm-up only"):
        worker.execute_model(None)
