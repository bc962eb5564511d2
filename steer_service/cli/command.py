"""How a command runs: what it is asked is understood first, and every way to end has its line and its exit status."""

from collections.abc import Callable
from typing import TypeVar

from steer_service.cli.arguments import UsageError, complain, sentence
from steer_service.cli.exit_status import BAD_USAGE, FAILED, INTERRUPTED
from steer_service.core.errors import SteerError

Options = TypeVar("Options")


def run_command(understand: Callable[[], Options], work: Callable[[Options], int]) -> int:
    """Gives what `understand` makes of the command line to `work` and returns the exit status.

    UsageError from either, and SteerError from `understand`, say that the command line is wrong; SteerError and OSError
    from `work` that what it asks for cannot be done.
    """
    try:
        options = understand()
    except (UsageError, SteerError) as error:
        return complain(f"steer: {error}", BAD_USAGE)
    try:
        return work(options)
    except UsageError as error:
        return complain(f"steer: {error}", BAD_USAGE)
    except SteerError as error:
        return complain(sentence(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return complain(f"steer: {error.filename or '--out'}: {error.strerror or error}", FAILED)
