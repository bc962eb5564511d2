"""The worker: what it refuses, and what it runs when it has refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from steer_service.engine.worker.worker import PlatformWorker, SteeringWorker


def test_a_region_is_fetched_with_the_rows_of_every_step_that_has_run() -> None:
    """A step may still be in flight when the token of a later pipeline stage is visible."""
    worker: Any = SteeringWorker.__new__(SteeringWorker)
    happened: list[str] = []
    worker.steering = SimpleNamespace(
        complete_steps=lambda: happened.append("complete"), snapshot=lambda *_: happened.append("snapshot")
    )

    assert worker.fetch_region("a", 1) is None
    assert happened == ["complete", "snapshot"]


def test_a_refused_model_runs_the_warm_up_and_never_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's V2 runner warms up by real steps; what was refused is reported only afterwards."""
    monkeypatch.setattr(PlatformWorker, "execute_model", lambda *_: "ran")
    worker: Any = SteeringWorker.__new__(SteeringWorker)
    worker.steering, worker.is_warm = None, False

    assert worker.execute_model(None) == "ran"
    worker.is_warm = True
    with pytest.raises(AssertionError, match="warm-up only"):
        worker.execute_model(None)
