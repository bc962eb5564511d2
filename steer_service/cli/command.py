"""How a command runs: what it is asked is understood first, and every way to end has its line and its exit status."""

from collections.abc import Callable
from typing import TypeVar

from steer_service.cli.arguments import UsageError, format_error, print_error
from steer_service.cli.exit_status import BAD_USAGE, FAILED, INTERRUPTED
from steer_service.core.errors import SteerError

Options = TypeVar("Options")


def run_command(parse: Callable[[], Options], execute: Callable[[Options], int]) -> int:
    """Gives what `parse` makes of the command line to `execute` and returns the exit status.

    UsageError from either, and SteerError from `parse`, say that the command line is wrong; SteerError and OSError
    from `execute` that what it asks for cannot be done.
    """
    try:
        options = parse()
    except (UsageError, SteerError) as error:
        return print_error(f"steer: {error}", BAD_USAGE)
    try:
        return execute(options)
    except UsageError as error:
        return print_error(f"steer: {error}", BAD_USAGE)
    except SteerError as error:
        return print_error(format_error(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return print_error(f"steer: {error.filename or '--out'}: {error.strerror or error}", FAILED)
