"""How a command runs: it is parsed first, and every way to end has a message and an exit status."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

from steer_service.cli.arguments import format_error, print_error
from steer_service.cli.exit_status import BAD_USAGE, FAILED, INTERRUPTED
from steer_service.cli.sampling_arguments import FlagError
from steer_service.core.errors import SteerError

Options = TypeVar("Options")


def run_command(parse: Callable[[], Options], execute: Callable[[Options], int]) -> int:
    """Calls `execute` with what `parse` returns and returns the exit status.

    FlagError from either, and SteerError from `parse`, mean that the command line is wrong. SteerError and OSError
    from `execute` mean that it cannot be carried out.
    """
    try:
        options = parse()
    except (FlagError, SteerError) as error:
        return print_error(f"steer: {error}", BAD_USAGE)
    try:
        return execute(options)
    except FlagError as error:
        return print_error(f"steer: {error}", BAD_USAGE)
    except SteerError as error:
        return print_error(format_error(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails again
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return print_error(f"steer: {where}{error.strerror or error}", FAILED)
