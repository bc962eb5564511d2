"""vLLM's environment variables, which a server reads once."""

import pytest
from vllm import envs

from steer_service.engine.start import keep_settings

VARIABLE = "VLLM_COMPUTE_NANS_IN_LOGITS"


def test_a_variable_that_changes_later_has_no_effect_on_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        keep_settings()
        monkeypatch.setenv(VARIABLE, "1")
        assert getattr(envs, VARIABLE) is False
    finally:
        envs.disable_envs_cache()
    assert getattr(envs, VARIABLE) is True
