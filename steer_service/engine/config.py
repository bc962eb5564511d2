"""Engine arguments: vLLM's under their own names, and those of this project (`steer_...`).

Relies on (vLLM 0.24 to 0.33): the fields of `AsyncEngineArgs`, of which `worker_cls` and `scheduler_cls` name classes,
and `additional_config` reaches the workers and the compile cache's key. tests/engine/test_seams.py notices a change.
"""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs

from steer_service.core.errors import InvalidRequest
from steer_service.core.setting_rules import gib_from, switch_from
from steer_service.engine.generation_config import ARGUMENT as GENERATION_CONFIG
from steer_service.engine.generation_config import OF_THE_MODEL
from steer_service.engine.prompt_room import RoomyEngineArgs
from steer_service.engine.refusals import SCHEDULER_CLS, WORKER_CLS, check_honoured, with_one_backend
from steer_service.engine.steering_config import (
    ADDITIONAL_CONFIG_KEY,
    LORA_MODULES,
    OURS,
    add_steering_arguments,
    parse_lora_modules,
)
from steer_service.engine.steering_config import SteeringConfig as SteeringConfig
from steer_service.engine.steering_config import flag_of as flag_of
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory

EXTRA_ARGS_KEY = "steer"
"""Key of this project's entry in `SamplingParams.extra_args`."""

CHAT_ARGUMENTS = ("chat_template", "default_chat_template_kwargs")
"""Arguments of chats, which vLLM's own server has under the same names and its engine has not."""

CAPTURE_METADATA = "STEERLLM_CAPTURE_METADATA"

CLIENT_SHARE = 4
"""By default, one client may have 1/4 of all capture memory."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds vLLM's engine flags and this project's to a command-line parser."""
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(**{GENERATION_CONFIG: None})  # vLLM's default would not differ from the same value given
    add_steering_arguments(parser)


def engine_arguments_from(namespace: argparse.Namespace) -> dict[str, Any]:
    """The engine arguments in a parsed command line, as keywords of `VLLMEngine.start` without `model`."""
    parsed = AsyncEngineArgs.from_cli_args(namespace)
    arguments = {
        field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed) if field.name != "model"
    }
    for field in dataclasses.fields(SteeringConfig):
        arguments[OURS + field.name] = getattr(namespace, OURS + field.name)
    if namespace.lora_modules:
        arguments[LORA_MODULES] = parse_lora_modules(namespace.lora_modules)
    for name in CHAT_ARGUMENTS:
        if getattr(namespace, name) is not None:
            arguments[name] = getattr(namespace, name)
    return arguments


def default_of(name: str) -> Any:
    """The default of one of vLLM's engine arguments."""
    return next(field.default for field in dataclasses.fields(AsyncEngineArgs) if field.name == name)


def engine_args_for(model: str, arguments: dict[str, Any]) -> AsyncEngineArgs:
    """vLLM's engine arguments, with this project's worker, scheduler and configuration.

    Raises InvalidRequest for an unknown argument, Unsupported for one that cannot be honoured.
    """
    ours = {name.removeprefix(OURS): value for name, value in arguments.items() if name.startswith(OURS)}
    theirs = {name: value for name, value in arguments.items() if not name.startswith(OURS)}
    if theirs.get(GENERATION_CONFIG, OF_THE_MODEL) is None:
        del theirs[GENERATION_CONFIG]  # vLLM has no such value; its default has the end-of-sequence tokens
    _check_known(ours, {field.name for field in dataclasses.fields(SteeringConfig)}, OURS)
    _check_known(theirs, {field.name for field in dataclasses.fields(AsyncEngineArgs)}, "")
    check_honoured(theirs)
    theirs["worker_cls"] = WORKER_CLS
    theirs["scheduler_cls"] = SCHEDULER_CLS
    theirs["additional_config"] = _additional_config(theirs.get("additional_config"), SteeringConfig(**ours))
    try:
        made = RoomyEngineArgs(model=model, **theirs)
        made.structured_outputs_config = with_one_backend(made.structured_outputs_config)
        return made
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"vLLM refuses the arguments: {error}", reason="BAD_ARGUMENT") from error


def _additional_config(theirs: dict[str, Any] | None, ours: SteeringConfig) -> dict[str, Any]:
    if ADDITIONAL_CONFIG_KEY in (theirs or {}):
        raise InvalidRequest(
            f"the key {ADDITIONAL_CONFIG_KEY!r} is this project's own; use the {OURS}... arguments",
            field="additional_config",
        )
    return {**(theirs or {}), **ours.to_additional_config()}


def _check_known(given: dict[str, Any], known: set[str], prefix: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise InvalidRequest(f"no such engine argument{hint}", reason="UNKNOWN_ARGUMENT", field=prefix + name)


def segment_pool(
    directory: SegmentDirectory, client_budget_of: Callable[[str], int | None] | None = None
) -> SegmentPool:
    """Memory for the captures of an engine, within the budgets of the environment.

    `client_budget_of`: the bytes of clients that have a budget of their own, by their id; None for the others.
    """
    budget = shared_memory_budget()
    return SegmentPool(budget, directory, client_memory_budget(budget, directory.total_bytes()), client_budget_of)


def shared_memory_budget() -> int:
    """Largest amount of shared memory in bytes, from STEERLLM_MAX_SHM_GB (GiB, default 128)."""
    return _bytes_from("STEERLLM_MAX_SHM_GB", "128")


def client_memory_budget(budget: int, file_system_bytes: int | None) -> int:
    """Largest amount of shared memory of one client in bytes, from STEERLLM_CLIENT_SHM_GB (GiB).

    Default: a quarter of what exists, which is the smaller of the `budget` of all clients and the file system.
    """
    if "STEERLLM_CLIENT_SHM_GB" in os.environ:
        return _bytes_from("STEERLLM_CLIENT_SHM_GB", "")
    return (budget if file_system_bytes is None else min(budget, file_system_bytes)) // CLIENT_SHARE


def _bytes_from(variable: str, default: str) -> int:
    return int(gib_from(variable, os.environ.get(variable, default)) * (1 << 30))


def sends_labels() -> bool:
    """False if STEERLLM_CAPTURE_METADATA disables the labels of captured rows (0, false, no, off, or empty)."""
    return switch_from(CAPTURE_METADATA, os.environ.get(CAPTURE_METADATA, "1"))
