"""Asynchronous scheduling on a CPU: vLLM's default on a GPU, which its CPU platform turns off without asking."""

from typing import Any

import pytest
from vllm.platforms.cpu import CpuPlatform


def force_async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns it on again after the platform has turned it off, for every engine of this test."""
    turn_off = CpuPlatform.check_and_update_config

    def leave_on(cls: type, vllm_config: Any) -> None:
        turn_off(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(leave_on))
