"""The `steer` command: each subcommand is a module with `add_arguments` and `run`, imported when it is needed."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from steer_service.cli.exit_status import BAD_USAGE, FAILED
from steer_service.core.environment import unknown_variable_warnings
from steer_service.core.errors import SteerError
from steer_service.runtime.cache_folders import use_cache_folders

COMMANDS = {
    "serve": "serve a model over gRPC, with steering and capture",
    "healthcheck": "ask a server for its health, for probes of containers",
    "generate": "generate text with a running server",
    "render": "show the tokens and positions of a prompt or chat, with a running server",
    "capture": "write the hidden states of many prompts to a folder, with a running server",
    "train": "make steering from contrastive prompts and evaluate it",
    "vectors": "inspect steering vectors, convert them between formats, and measure their effect",
    "token": "make a bearer token for a client of a server",
    "doctor": "check whether a server can start here, and say what to do",
    "selftest": "prove that steering and capture are right on this device, without a model",
    "demo": "steer, cap and ablate a small model in one batch, through a real server",
}
"""Subcommand -> what it does; `x` is the module `steer_service.cli.x`, or as `MODULES` says."""

MODULES = {"capture": "capture.command", "doctor": "doctor.command", "vectors": "vectors.command"}
"""Subcommand -> its module, where that has another name."""

EXTRAS = {"train": "huggingface", "vectors": "huggingface", "healthcheck": "server", "doctor": "server"}
"""Subcommand -> the extra that it needs, where that is not vllm."""

CACHING = frozenset({"serve", "train", "selftest"})
"""Subcommands that load a model or compile here, so that their caches need folders."""

HELP = frozenset({"-h", "--help"})
"""With one of these nothing is loaded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the command line names and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = _command_parser().parse_args(arguments[:1]).command
    for warning in unknown_variable_warnings(os.environ):
        print(f"steer: warning: {warning}", file=sys.stderr)
    try:
        for warning in use_cache_folders() if command in CACHING and not HELP & {*arguments} else ():
            print(f"steer: warning: {warning}", file=sys.stderr)
    except SteerError as error:
        print(f"steer: {error}", file=sys.stderr)
        return FAILED
    parser = argparse.ArgumentParser(prog=f"steer {command}", description=f"{COMMANDS[command].capitalize()}.")
    try:
        module = importlib.import_module(f"steer_service.cli.{MODULES.get(command, command)}")
        module.add_arguments(parser)
    except SteerError as error:  # an environment variable that gives a default is not valid
        print(f"steer: {error}", file=sys.stderr)
        return BAD_USAGE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("steer"):
            raise
        extra = EXTRAS.get(command, "vllm")
        print(f"steer {command} needs {error.name}; run: pip install 'steerllm[{extra}]'", file=sys.stderr)
        return 1
    return int(module.run(parser.parse_args(arguments[1:])))


def _command_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="steer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())]),
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do; `steer COMMAND --help` describes its options")
    return parser


if __name__ == "__main__":
    sys.exit(main())
