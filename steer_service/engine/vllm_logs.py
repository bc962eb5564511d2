"""The level and the form of the lines that vLLM logs, in this process and in those that it starts.

Relies on (vLLM 0.24 to 0.33): the variables VLLM_LOGGING_LEVEL, VLLM_LOGGING_STREAM, VLLM_CONFIGURE_LOGGING and
VLLM_LOGGING_CONFIG_PATH, a file for `logging.config.dictConfig`, which vLLM reads when it is imported or started.
tests/real_server/test_logs_and_traces.py notices a change.
"""

import atexit
import json
import logging
import logging.config
import os
import tempfile
from contextlib import suppress

LEVEL = "VLLM_LOGGING_LEVEL"
STREAM = "VLLM_LOGGING_STREAM"
CONFIGURED = "VLLM_CONFIGURE_LOGGING"
CONFIG_PATH = "VLLM_LOGGING_CONFIG_PATH"


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
    descriptor, path = tempfile.mkstemp(prefix="steerllm-log-", suffix=".json")
    with open(descriptor, "w") as file:
        json.dump(config, file)
    atexit.register(_remove, path)
    os.environ[CONFIG_PATH] = path
    logging.config.dictConfig(config)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
