"""vLLM's warnings that mean nothing to a user are dropped, and nothing else is."""

import json
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from steer_service.core.log_lines import Without
from steer_service.engine import vllm_logs
from steer_service.engine.vllm_logs import CONFIG_PATH, LEVEL, NOISE, hide_noise


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without settings of logs, and loggers without our filters after the test."""
    for name in (CONFIG_PATH, LEVEL, "PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    for name in NOISE:
        logging.getLogger(name).filters.clear()


def shown(logger: str, level: int, message: str) -> Any:
    return logging.getLogger(logger).filter(logging.LogRecord(logger, level, "", 0, message, (), None))


def test_warnings_without_meaning_are_dropped_and_errors_are_not() -> None:
    hide_noise()
    for logger, beginnings in NOISE.items():
        assert shown(logger, logging.WARNING, "something else")
        for beginning in beginnings:
            assert not shown(logger, logging.WARNING, f"{beginning} and more")
            assert shown(logger, logging.ERROR, f"{beginning} and an error")


def test_the_processes_that_vllm_starts_get_the_same_filter() -> None:
    hide_noise()
    config = json.loads(Path(os.environ[CONFIG_PATH]).read_text())
    vllm_logs._remove(os.environ[CONFIG_PATH])

    configured = logging.config.DictConfigurator(config)
    [noise] = config["handlers"]["vllm"]["filters"]
    made = configured.configure_filter(dict(config["filters"][noise]))
    assert isinstance(made, Without)
    for beginning in (beginning for beginnings in NOISE.values() for beginning in beginnings):
        assert not made.filter(logging.LogRecord("vllm", logging.WARNING, "", 0, beginning, (), None))


@pytest.mark.parametrize("variable", [LEVEL, CONFIG_PATH])
def test_a_user_who_chose_what_vllm_logs_sees_all_of_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "WARNING")
    hide_noise()
    assert all(shown(logger, logging.WARNING, beginnings[0]) for logger, beginnings in NOISE.items())
    assert os.environ.get(CONFIG_PATH, "WARNING") == "WARNING"


@pytest.mark.parametrize("logger", NOISE)
def test_vllm_still_has_the_lines(logger: str) -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / f"{logger.removeprefix('vllm.').replace('.', '/')}.py").read_text()
    for beginning in NOISE[logger]:
        assert beginning.partition(" steer_service.")[0] in source
