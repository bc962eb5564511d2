"""The parser of every command: an unknown name is answered with the nearest one."""

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from steer_service.cli.exit_status import BAD_USAGE

_UNKNOWN = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)", re.DOTALL)

WIDEST = 120
"""Columns of a help text at most."""


class WideHelp(argparse.RawDescriptionHelpFormatter):
    """Help of many flags, most of them in one line of a wide terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=min(shutil.get_terminal_size().columns, WIDEST))


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors name the nearest flag or word."""

    def error(self, message: str) -> NoReturn:
        """Prints the error with a suggestion and ends with the exit status of a wrong command line.

        The usage of a command has dozens of lines, above which the error would be lost: only its help is named.
        """
        print(f"{self.prog}: error: {message}{suggestion(message, self.flags())}", file=sys.stderr)
        self.exit(BAD_USAGE, f"see `{self.prog} --help`\n")

    def flags(self) -> Iterator[str]:
        """Its flags, and those of its subcommands."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.flags()


def suggestion(message: str, flags: Iterable[str]) -> str:
    """What to add to an error of argparse: "; did you mean --top-p?", or "" if nothing is near."""
    unknown, choice = _UNKNOWN.search(message), _CHOICE.search(message)
    if unknown is not None:
        known = list(flags)
        given = [word.partition("=")[0] for word in unknown[1].split() if word.startswith("--")]
        near = [match for word in given for match in difflib.get_close_matches(word, known, n=1)]
    elif choice is not None:
        near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
    else:
        near = []
    return f"; did you mean {' and '.join(near)}?" if near else ""
