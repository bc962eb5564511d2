"""The level and the form of the lines that vLLM logs, in this process and in those that it starts.

Relies on (vLLM 0.24 to 0.33): the variables VLLM_LOGGING_LEVEL, VLLM_LOGGING_STREAM, VLLM_CONFIGURE_LOGGING and
VLLM_LOGGING_CONFIG_PATH, a file for `logging.config.dictConfig`, which vLLM reads when it is imported or started;
`vllm.logger.DEFAULT_LOGGING_CONFIG`, what it uses without that file.
tests/real_server/test_logs_and_traces.py notices a change.
"""

import atexit
import copy
import json
import logging
import logging.config
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from steer_service.core.log_lines import Without

LEVEL = "VLLM_LOGGING_LEVEL"
STREAM = "VLLM_LOGGING_STREAM"
CONFIGURED = "VLLM_CONFIGURE_LOGGING"
CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"

NOISE: Mapping[str, tuple[str, ...]] = {
    "vllm.config.vllm": (
        "Enforce eager set, disabling",
        "Inductor compilation was disabled by user settings",
        "Model Runner V2 requires Triton; using the V1",
    ),
    "vllm.config.scheduler": ("Using custom scheduler class steer_service.",),
    "vllm.platforms.cpu": ("Reset SSM cache type to", "Triton is not installed. triton-cpu is expected"),
    "vllm.v1.engine.input_processor": ("Passing raw prompts to InputProcessor is deprecated",),
}
"""Logger -> beginnings of warnings about what this project has chosen itself, or what no user of a CPU can change."""


def set_level_of_vllm(level: str) -> None:
    """Logs lines of vLLM from this level on, in place of what VLLM_LOGGING_LEVEL says."""
    os.environ[LEVEL] = level.upper()
    logger = logging.getLogger("vllm")
    logger.setLevel(level.upper())
    for handler in logger.handlers:
        handler.setLevel(level.upper())


def set_form_of_vllm(ours: str, our_level: int) -> None:
    """Logs vLLM's lines as JSON, and those of the logger `ours` in vLLM's processes.

    Does nothing for a user whose variables configure vLLM's log already.
    """
    if CONFIG_PATH in os.environ or os.environ.get(CONFIGURED, "1") == "0":
        return
    level = os.environ.get(LEVEL, "INFO").upper()
    form = {"()": "steer_service.core.log_lines.JsonLines"}
    handler = {"class": "logging.StreamHandler", "level": level}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        # vLLM's exceptions say why an engine did not start.
        "formatters": {"ours": form, "vllm": {**form, "shows_exceptions": True}},
        "handlers": {
            "vllm": {**handler, "formatter": "vllm", "stream": os.environ.get(STREAM, "ext://sys.stdout")},
            "ours": {**handler, "formatter": "ours", "stream": "ext://sys.stderr", "level": our_level},
        },
        "loggers": {
            "vllm": {"handlers": ["vllm"], "level": level, "propagate": False},
            ours: {"handlers": ["ours"], "level": our_level, "propagate": False},
        },
    }
    _keep(config)
    logging.config.dictConfig(config)


def hide_noise() -> None:
    """Drops the lines of `NOISE`, in this process and in those that vLLM starts.

    Does nothing for a user who chose a level of vLLM's log, or configured it.
    """
    if CONFIG_PATH in os.environ or LEVEL in os.environ or os.environ.get(CONFIGURED, "1") == "0":
        return
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    for name, beginnings in NOISE.items():  # vLLM configures this process when it starts, after its first lines
        logging.getLogger(name).addFilter(Without(beginnings))
    config = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
    lines = [beginning for beginnings in NOISE.values() for beginning in beginnings]
    config["filters"] = {"noise": {"()": "steer_service.core.log_lines.Without", "beginnings": lines}}
    config["handlers"]["vllm"]["filters"] = ["noise"]
    _keep(config)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:vllm.triton_utils.dispatcher")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it says how vLLM binds memory to the processors


def _keep(config: dict[str, Any]) -> None:
    """Configures vLLM's log in the processes that it starts."""
    descriptor, path = tempfile.mkstemp(prefix="steerllm-log-", suffix=".json")
    with open(descriptor, "w") as file:
        json.dump(config, file)
    atexit.register(_remove, path)
    os.environ[CONFIG_PATH] = path


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
