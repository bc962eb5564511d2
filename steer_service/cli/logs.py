"""The log of `steer serve`: its level, its form, and vLLM's lines in the same form."""

import argparse
import logging
import sys

from steer_service.core.errors import SteerError
from steer_service.core.log_lines import FORMATS, FORMATTERS, LEVELS
from steer_service.server.config import ServerConfig

OURS = "steer_service"
"""Logger above all of this project's."""


def add_log_arguments(group: argparse._ArgumentGroup, defaults: ServerConfig) -> None:
    """Adds the flags. vLLM 0.32 has its own `--log-level`: this one takes its place, and sets vLLM's level too."""
    group.conflict_handler = "resolve"
    group.add_argument(
        "--log-level",
        dest="server_log_level",
        type=str.lower,
        choices=LEVELS,
        help=f"least level of the lines that are logged, by vLLM too (default: {defaults.log_level}, and vLLM's own)",
    )
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        default=defaults.log_format,
        help="one line of text or one JSON object per event (default: %(default)s)",
    )


def sentence_of(error: SteerError) -> str:
    """What an error says on the command line, with the code under which the documentation has it."""
    return f"{error} ({error.reason})" if error.reason != error.default_reason else str(error)


def begin_log(config: ServerConfig, given_level: str | None) -> None:
    """Logs to standard error from now on. `given_level`: the level of the flag, which is vLLM's too; None for none."""
    begin_own_log(config)
    if given_level is not None or config.log_format != "text":
        from steer_service.engine.vllm_logs import set_form_of_vllm, set_level_of_vllm

        if given_level is not None:
            set_level_of_vllm(given_level)
        if config.log_format == "json":
            set_form_of_vllm(OURS, _level_of(config))


def begin_own_log(config: ServerConfig) -> None:
    """The part of `begin_log` that needs no vLLM."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[config.log_format]())
    level = _level_of(config)
    # Libraries warn at most: their lines at lower levels may have anything in them.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))
    logging.getLogger(OURS).setLevel(level)


def _level_of(config: ServerConfig) -> int:
    return logging.getLevelNamesMapping()[config.log_level.upper()]
