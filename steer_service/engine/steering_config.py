"""This project's part of vLLM's configuration and its flags. Importing it imports neither vLLM nor torch."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from steer_service.core.errors import InvalidRequest
from steer_service.engine.slots import BankSize
from steer_service.runtime.chat_defaults import ChatDefaults, template_from
from steer_service.shm.segments import SegmentDirectory, segment_directory

ADDITIONAL_CONFIG_KEY = "steer"
"""Key of this project's entry in `VllmConfig.additional_config`."""

GRAPH_VERSION = 3
"""Part of the key of vLLM's compile cache. Increase it if the hooks change as torch.compile sees them."""

LAYER_OUTPUTS = ("hidden_and_residual", "one_tensor", "first_of_two")
"""Values of `worker.layer_outputs.LayerOutput`, which needs torch; the first is by far the most common."""

OURS = "steer_"
"""Prefix of this project's arguments."""

LORA_MODULES = "lora_modules"
"""The engine argument with the LoRA adapters."""

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
        if not (isinstance(self.allow_unverified, bool) or self.allow_unverified in LAYER_OUTPUTS):
            raise InvalidRequest(
                f"{self.allow_unverified!r} is not True, False or one of {', '.join(LAYER_OUTPUTS)}",
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
        return LAYER_OUTPUTS[0] if self.allow_unverified else ""

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


def add_steering_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of SteeringConfig, and those of chats and adapters, to a command-line parser."""
    group = parser.add_argument_group("steering")
    for field in dataclasses.fields(SteeringConfig):
        flag = flag_of(field.name)
        if field.name == "allow_unverified":
            group.add_argument(
                flag, nargs="?", const=True, default=False, choices=LAYER_OUTPUTS, help=FLAG_HELP[field.name]
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
    group = parser.add_argument_group("chats and adapters")
    group.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="LoRA adapters, each chosen by a request that names it as its model",
    )
    group.add_argument(
        "--chat-template",
        type=_checked(template_from),
        metavar="PATH",
        help="file of a chat template, or its text, in place of the tokenizer's own",
    )
    group.add_argument(
        "--default-chat-template-kwargs",
        type=_checked(lambda text: ChatDefaults.of(None, text)),
        metavar="JSON",
        help="arguments of the chat template where a chat does not give them, as a JSON object",
    )


def parse_lora_modules(texts: Sequence[str]) -> dict[str, str]:
    """Adapters from a command line, `NAME=PATH` each. Raises InvalidRequest for any other text."""
    modules: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (separator and name and path) or name in modules:
            raise InvalidRequest(f"{text!r} is not NAME=PATH, each name once", field=LORA_MODULES)
        modules[name] = path
    return modules


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
