"""Engine arguments: vLLM's under their own names, and those of this project (`steer_...`)."""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs

from steer_service.core.errors import InvalidRequest
from steer_service.engine.generation_config import ARGUMENT as GENERATION_CONFIG
from steer_service.engine.generation_config import OF_THE_MODEL
from steer_service.engine.lora import LORA_MODULES, parse_lora_modules
from steer_service.engine.prompt_room import RoomyEngineArgs
from steer_service.engine.refusals import SCHEDULER_CLS, WORKER_CLS, check_honoured, with_one_backend
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.layer_outputs import LayerOutput
from steer_service.runtime.chat_defaults import ChatDefaults, template_from
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory, segment_directory

EXTRA_ARGS_KEY = "steer"
"""Key of this project's entry in `SamplingParams.extra_args`."""

ADDITIONAL_CONFIG_KEY = "steer"
"""Key of this project's entry in `VllmConfig.additional_config`."""

GRAPH_VERSION = 3
"""Part of the key of vLLM's compile cache. Increase it if the hooks change as torch.compile sees them."""

CHAT_ARGUMENTS = ("chat_template", "default_chat_template_kwargs")
"""Arguments of chats, which vLLM's own server has under the same names and its engine has not."""

OURS = "steer_"
"""Prefix of this project's arguments."""

CLIENT_SHARE = 4
"""By default, one client may have 1/4 of all capture memory."""

FLAG_HELP = {
    "slots": "distinct steering programs in use at once; further requests wait (default: %(default)s)",
    "bank_bytes": "memory for the programs' directions on each worker (default: %(default)s)",
    "staging_bytes": "memory of a GPU in which captured rows wait for their copy to the host; a step that captures "
    "more runs without graphs (default: all layers of the largest graph)",
    "operations_per_layer": "operations that one program may hold at one layer (default: %(default)s)",
    "constraint_seconds": "processor time for compiling the constraint of structured outputs; one that needs more is "
    "refused (default: %(default)s)",
    "allow_unverified": "serve a model family that no test has compared with HuggingFace. The value is what its layers "
    "return (without a value: hidden_and_residual). The model is tested before it serves.",
    "shm_dir": "directory in memory for captures; clients on this host map the same files (default: %(default)s)",
    "shm_mode": "permissions of captures in shared memory: 600, or 640 with --shm-group (default: %(default)s)",
    "shm_group": "group of captures in shared memory (default: this process's)",
    "trace": "write a log of what each step did to which rows, to files whose paths begin with PATH; slow",
}
"""Field of SteeringConfig -> help text of its flag in `steer serve --help`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """This project's part of vLLM's configuration; each field is an argument named `steer_<field>`."""

    slots: int = 128
    """Distinct programs in use at once; further requests wait."""
    bank_bytes: int = 256 << 20
    """Memory for the programs' directions on each worker, in bytes."""
    staging_bytes: int = 0
    """Memory of a GPU in which captured rows wait for their copy to the host, in bytes; 0 for as much as the largest
    graph's rows at all layers need."""
    operations_per_layer: int = 64
    """Largest number of operations of one program at one layer."""
    constraint_seconds: int = 10
    """Processor time, in seconds, for compiling the constraint of structured outputs."""
    allow_unverified: bool | str = False
    """What the layers of an unverified model family return, see `worker.layer_outputs.LayerOutput`. True means
    hidden_and_residual, by far the most common. False refuses unverified models."""
    trace: str = ""
    """Beginning of the path of each worker's trace, see worker/trace.py; "" for no trace."""
    shm_dir: str = "/dev/shm"
    """Directory in memory for captures."""
    shm_mode: str = "600"
    """Permissions of captures in shared memory, in octal."""
    shm_group: str = ""
    """Group of captures in shared memory, by name or number; "" for this process's."""

    def __post_init__(self) -> None:
        for name in ("slots", "bank_bytes", "operations_per_layer", "constraint_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{value!r} is not a positive integer", field=OURS + name)
        if isinstance(self.staging_bytes, bool) or not isinstance(self.staging_bytes, int) or self.staging_bytes < 0:
            raise InvalidRequest(f"{self.staging_bytes!r} is not a number of bytes", field=OURS + "staging_bytes")
        if not (isinstance(self.allow_unverified, bool) or self.allow_unverified in [*LayerOutput]):
            raise InvalidRequest(
                f"{self.allow_unverified!r} is not True, False or one of {', '.join(LayerOutput)}",
                field=OURS + "allow_unverified",
            )
        if not isinstance(self.trace, str):
            raise InvalidRequest(f"{self.trace!r} is not a path", field=OURS + "trace")
        _ = self.segments  # raises InvalidRequest if the directory, mode or group is wrong

    @property
    def segments(self) -> SegmentDirectory:
        """The directory of captures, with their permissions."""
        try:
            return segment_directory(self.shm_dir, self.shm_mode, self.shm_group)
        except InvalidRequest as error:
            error.field = OURS + error.field
            raise

    @property
    def unverified(self) -> str:
        """What the layers of an unverified family return; "" if such a model is refused."""
        if isinstance(self.allow_unverified, str):
            return self.allow_unverified
        return LayerOutput.HIDDEN_AND_RESIDUAL if self.allow_unverified else ""

    def bank_size(self, hidden_size: int) -> BankSize:
        """The size of a bank of `bank_bytes`, for directions of `hidden_size` elements."""
        rows = max(1, min(self.bank_bytes // (4 * hidden_size), 1 << 16))
        return BankSize(slots=self.slots, rows=rows, operations_per_layer=self.operations_per_layer)

    def to_additional_config(self) -> dict[str, Any]:
        """The form in which vLLM carries it to the workers; of it, the GraphKey is in the key of its compile cache."""
        return {ADDITIONAL_CONFIG_KEY: GraphKey.of(self)}

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> "SteeringConfig":
        """The configuration that `to_additional_config` wrote."""
        key: GraphKey = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        return key.config


class GraphKey(str):
    """What of a SteeringConfig changes a compiled model, as text; the configuration travels with it.

    vLLM writes its additional configuration as JSON into the key of its compile cache: a server with other slots, or
    with another directory for captures, finds what was compiled before.
    """

    config: SteeringConfig

    @classmethod
    def of(cls, config: SteeringConfig) -> "GraphKey":
        """The key of a configuration: how the hooks look to torch.compile, and what unverified layers return."""
        key = cls(f"{GRAPH_VERSION} {config.unverified}")
        key.config = config
        return key


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds vLLM's engine flags and this project's to a command-line parser."""
    AsyncEngineArgs.add_cli_args(parser)
    parser.set_defaults(**{GENERATION_CONFIG: None})  # vLLM's default would not differ from the same value given
    parser.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="LoRA adapters, each chosen by a request that names it as its model",
    )
    parser.add_argument(
        "--chat-template",
        type=_checked(template_from),
        metavar="PATH",
        help="file of a chat template, or its text, in place of the tokenizer's own",
    )
    parser.add_argument(
        "--default-chat-template-kwargs",
        type=_checked(lambda text: ChatDefaults.of(None, text)),
        metavar="JSON",
        help="arguments of the chat template where a chat does not give them, as a JSON object",
    )
    group = parser.add_argument_group("steering")
    for field in dataclasses.fields(SteeringConfig):
        flag = flag_of(field.name)
        if field.name == "allow_unverified":
            group.add_argument(
                flag, nargs="?", const=True, default=False, choices=[*map(str, LayerOutput)], help=FLAG_HELP[field.name]
            )
        else:
            kind = type(field.default)
            metavar = "PATH" if kind is str else "N"
            group.add_argument(
                flag,
                dest=OURS + field.name,
                type=kind,
                default=field.default,
                metavar=metavar,
                help=FLAG_HELP[field.name],
            )


def _checked(read: Callable[[str], object]) -> Callable[[str], str]:
    """A type of an argument: the text itself, if `read` takes it."""

    def check(text: str) -> str:
        try:
            read(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(error.message) from error
        return text

    return check


def flag_of(name: str) -> str:
    """The flag of a field of SteeringConfig: --steer-..., or --shm-... for shared memory, which the server uses too."""
    return f"--{name if name.startswith('shm_') else OURS + name}".replace("_", "-")


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
    text = os.environ.get(variable, default)
    try:
        gib = float(text)
    except ValueError:
        gib = -1.0
    if not 0.0 < gib < float("inf"):
        raise InvalidRequest(f"{text!r} is not a positive number of GiB", field=variable)
    return int(gib * (1 << 30))


def sends_labels() -> bool:
    """False if STEERLLM_CAPTURE_METADATA disables the labels of captured rows (empty, 0, false, no or off)."""
    return os.environ.get("STEERLLM_CAPTURE_METADATA", "1").strip().lower() not in ("", "0", "false", "no", "off")
