"""Every engine argument of vLLM under its own name, a few of ours, and what is refused with the reason."""

import argparse
import dataclasses
import difflib
import os
from dataclasses import dataclass
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs

from steer_service.core.errors import InvalidRequest
from steer_service.engine.lora import LORA_MODULES, parse_lora_modules
from steer_service.engine.refusals import SCHEDULER_CLS, WORKER_CLS, check_honoured
from steer_service.engine.slots import BankSize
from steer_service.engine.worker.layer_outputs import LayerOutput
from steer_service.shm.segments import SegmentDirectory, segment_directory

EXTRA_ARGS_KEY = "steer"
"""Key of our entry in `SamplingParams.extra_args`."""

ADDITIONAL_CONFIG_KEY = "steer"
"""Key of our entry in `VllmConfig.additional_config`."""

GRAPH_VERSION = 2
"""Raised whenever what torch.compile sees of the hooks changes: it keys vLLM's compile cache."""

OURS = "steer_"
"""Prefix of the arguments that are ours and not vLLM's."""

FLAG_HELP = {
    "slots": "distinct steering programs in use at once; more wait (default: %(default)s)",
    "bank_bytes": "memory for the programs' directions on each worker (default: %(default)s)",
    "operations_per_layer": "operations that one program may hold at one layer (default: %(default)s)",
    "allow_unverified": "serve a model family whose layers no test has compared with HuggingFace, as one whose layers "
    "return this (without a value: hidden_and_residual), or on a GPU; it is tested before it serves",
    "shm_dir": "directory in memory in which captures lie; clients that share it see the same (default: %(default)s)",
    "shm_mode": "permissions of captures in shared memory: 600, or 640 with --shm-group (default: %(default)s)",
    "shm_group": "group of captures in shared memory (default: this process's)",
    "trace": "write what every step did to which rows to files whose names begin so; for finding faults, slow",
}
"""Field of SteeringConfig -> what `steer serve --help` says of its flag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """What this project adds to vLLM's configuration; each field is an argument named `steer_<field>`."""

    slots: int = 128
    """Distinct programs that can be in use at once; more wait."""
    bank_bytes: int = 256 << 20
    """Memory for the programs' directions on each worker, in bytes."""
    operations_per_layer: int = 64
    """Operations one program may hold at one layer."""
    allow_unverified: bool | str = False
    """What the layers of a family return that no test has proven, see `layer outputs.LayerOutput`; True stands for
    hidden_and_residual, by far the commonest, and False refuses such a model, and any model on a GPU."""
    trace: str = ""
    """Where each worker writes what every step did (see trace.py), as the beginning of a path; "" for nowhere."""
    shm_dir: str = "/dev/shm"
    """Directory in memory in which captures lie."""
    shm_mode: str = "600"
    """Permissions of captures in shared memory, in octal."""
    shm_group: str = ""
    """Group of captures in shared memory, by name or number; "" for this process's."""

    def __post_init__(self) -> None:
        for name in ("slots", "bank_bytes", "operations_per_layer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequest(f"{value!r} is not a positive integer", field=OURS + name)
        if not (isinstance(self.allow_unverified, bool) or self.allow_unverified in [*LayerOutput]):
            raise InvalidRequest(
                f"{self.allow_unverified!r} is not True, False or one of {', '.join(LayerOutput)}",
                field=OURS + "allow_unverified",
            )
        if not isinstance(self.trace, str):
            raise InvalidRequest(f"{self.trace!r} is not a path", field=OURS + "trace")
        _ = self.segments  # raises what is wrong with it

    @property
    def segments(self) -> SegmentDirectory:
        """Where captures lie, and who may read them."""
        try:
            return segment_directory(self.shm_dir, self.shm_mode, self.shm_group)
        except InvalidRequest as error:
            error.field = OURS + error.field
            raise

    @property
    def unverified(self) -> str:
        """What layers of a family return that no test has proven; "" if such a model is refused."""
        if isinstance(self.allow_unverified, str):
            return self.allow_unverified
        return LayerOutput.HIDDEN_AND_RESIDUAL if self.allow_unverified else ""

    def bank_size(self, hidden_size: int) -> BankSize:
        """How much a bank of `bank_bytes` holds for a stream of this width."""
        rows = max(1, min(self.bank_bytes // (4 * hidden_size), 1 << 16))
        return BankSize(slots=self.slots, rows=rows, operations_per_layer=self.operations_per_layer)

    def to_additional_config(self) -> dict[str, Any]:
        """The form in which vLLM carries it to the workers and hashes it into its compile cache's key."""
        return {ADDITIONAL_CONFIG_KEY: {**dataclasses.asdict(self), "graph_version": GRAPH_VERSION}}

    @classmethod
    def from_vllm(cls, vllm_config: Any) -> "SteeringConfig":
        """The configuration that `to_additional_config` wrote."""
        values = dict(vllm_config.additional_config[ADDITIONAL_CONFIG_KEY])
        del values["graph_version"]
        return cls(**values)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every engine flag of vLLM under its own name, and ours, to a command-line parser."""
    AsyncEngineArgs.add_cli_args(parser)
    parser.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="LoRA adapters, each chosen by a request that names it as its model",
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


def flag_of(name: str) -> str:
    """The flag of a field of SteeringConfig: --steer-... but for shared memory, which is the server's as well."""
    return f"--{name if name.startswith('shm_') else OURS + name}".replace("_", "-")


def engine_arguments_from(namespace: argparse.Namespace) -> dict[str, Any]:
    """The engine arguments in a parsed command line, as keywords of `VLLMEngine.start`, `model` left out."""
    parsed = AsyncEngineArgs.from_cli_args(namespace)
    arguments = {
        field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed) if field.name != "model"
    }
    for field in dataclasses.fields(SteeringConfig):
        arguments[OURS + field.name] = getattr(namespace, OURS + field.name)
    if namespace.lora_modules:
        arguments[LORA_MODULES] = parse_lora_modules(namespace.lora_modules)
    return arguments


def default_of(name: str) -> Any:
    """vLLM's default of one engine argument."""
    return next(field.default for field in dataclasses.fields(AsyncEngineArgs) if field.name == name)


def engine_args_for(model: str, arguments: dict[str, Any]) -> AsyncEngineArgs:
    """vLLM's engine arguments with our worker and configuration in them.

    Raises InvalidRequest for an argument that neither knows, Unsupported for one that cannot be honoured.
    """
    ours = {name.removeprefix(OURS): value for name, value in arguments.items() if name.startswith(OURS)}
    theirs = {name: value for name, value in arguments.items() if not name.startswith(OURS)}
    _check_known(ours, {field.name for field in dataclasses.fields(SteeringConfig)}, OURS)
    _check_known(theirs, {field.name for field in dataclasses.fields(AsyncEngineArgs)}, "")
    check_honoured(theirs)
    theirs["worker_cls"] = WORKER_CLS
    theirs["scheduler_cls"] = SCHEDULER_CLS
    theirs["additional_config"] = _additional_config(theirs.get("additional_config"), SteeringConfig(**ours))
    try:
        return AsyncEngineArgs(model=model, **theirs)
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


def shared_memory_budget() -> int:
    """Bytes of shared memory at most, from STEERLLM_MAX_SHM_GB (GiB, default 128)."""
    return _bytes_from("STEERLLM_MAX_SHM_GB", "128")


def client_memory_budget() -> int:
    """Bytes of it that one client may have at once, from STEERLLM_CLIENT_SHM_GB (GiB, default 32)."""
    return _bytes_from("STEERLLM_CLIENT_SHM_GB", "32")


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
    """False if STEERLLM_CAPTURE_METADATA switches the labels of captured rows off (empty, 0, false, no or off)."""
    return os.environ.get("STEERLLM_CAPTURE_METADATA", "1").strip().lower() not in ("", "0", "false", "no", "off")
