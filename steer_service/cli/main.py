"""The `steer` command: each subcommand is a module with `add_arguments` and `run`, imported when it is needed."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
from types import ModuleType

from steer_service.cli.exit_status import BAD_USAGE, FAILED, INTERRUPTED
from steer_service.cli.parser import CommandParser
from steer_service.cli.terminal import prepare_streams
from steer_service.core.environment import unknown_variable_warnings
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.processes import end_process
from steer_service.core.setting_rules import check_environment

COMMANDS = {
    "serve": "serve a model over gRPC, with steering and capture",
    "info": "show the model and the limits of a running server",
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

SERVING = frozenset({"serve", "demo"})
"""Subcommands with a server, of which gRPC's own lines are the only word of a failed handshake."""

HELP = frozenset({"-h", "--help", "--help-all"})
"""With one of these nothing is loaded."""
CHECKS_ITSELF = "doctor"
"""The subcommand that reports environment variables that are not valid, with everything else."""

EXAMPLES = """\
examples:
  steer serve Qwen/Qwen3-0.6B
  steer generate "The sea is" --max-tokens 20
  steer capture prompts.txt --layers 7 --out states

exit status: 0 success, 1 failure, 2 wrong command line, file or environment, 130 ended by Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the subcommand that the command line names and returns its exit status.

    Without `arguments`, they are those of the process. If it has loaded torch, it ends here.
    """
    prepare_streams()
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # while modules are imported; a command that runs ends in its own way
        status = INTERRUPTED
    except BrokenPipeError:
        status = FAILED
    finally:
        _flush()
    if arguments is None and "torch" in sys.modules:
        end_process(status)
    return status


def _flush() -> None:
    """Writes what standard output still has; is silent if its reader, such as `head`, has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails again


def _main(arguments: list[str]) -> int:
    own = len(list(takewhile(lambda word: word.startswith("-"), arguments)))
    top = _top_parser()
    chosen = top.parse_args(arguments[: own + 1])
    if chosen.version:
        from steer_service.cli.versions import version_lines

        print("\n".join(version_lines(is_verbose=chosen.verbose)), flush=True)
        return 0
    command, rest = chosen.command, arguments[own + 1 :]
    if command is None:
        top.print_help(sys.stderr)
        return BAD_USAGE
    for warning in unknown_variable_warnings(os.environ):
        print(f"steer: warning: {warning}", file=sys.stderr)
    parser = CommandParser(prog=f"steer {command}", description=_sentence(COMMANDS[command]))
    try:
        if command != CHECKS_ITSELF:
            check_environment(os.environ)
        if command in CACHING and not HELP & {*rest}:
            _use_cache_folders()  # before libraries that read these variables are imported
        if command not in SERVING:  # before gRPC is imported; the error of the command has the cause
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        module = importlib.import_module(f"steer_service.cli.{MODULES.get(command, command)}")
        refused = _refuse(module, rest)
        if refused is not None:
            return refused
        _add_arguments(module, parser, rest)
    except EngineFailed as error:
        print(f"steer: {error}", file=sys.stderr)
        return FAILED
    except SteerError as error:  # an environment variable that gives a default is not valid
        print(f"steer: {error}", file=sys.stderr)
        return BAD_USAGE
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("steer"):
            raise
        extra = EXTRAS.get(command, "vllm")
        print(f"steer {command} needs {error.name}; run: pip install 'steerllm[{extra}]'", file=sys.stderr)
        return FAILED
    return int(module.run(parser.parse_args(rest)))


def _use_cache_folders() -> None:
    from steer_service.runtime.cache_folders import use_cache_folders

    for warning in use_cache_folders():
        print(f"steer: warning: {warning}", file=sys.stderr)


def _refuse(module: ModuleType, rest: list[str]) -> int | None:
    """The exit status of what a command refuses before it imports what takes seconds; None if it does not."""
    refuse = getattr(module, "refuse", None)
    status: int | None = refuse(rest) if refuse is not None and not HELP & {*rest} else None
    return status


def _add_arguments(module: ModuleType, parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Adds the arguments of a command; for its help only its own, where others take seconds to import."""
    asks_for_help = "-h" in rest or "--help" in rest
    add_own = getattr(module, "add_own_arguments", None)
    (add_own if asks_for_help and add_own is not None else module.add_arguments)(parser)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _top_parser() -> CommandParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    parser = CommandParser(
        prog="steer",
        usage="steer COMMAND [options]; `steer COMMAND --help` describes the options",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["commands:", *lines, "", EXAMPLES]),
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="print the version and end")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --version: also of Python, vLLM, torch, ...")
    return parser


if __name__ == "__main__":
    sys.exit(main())
