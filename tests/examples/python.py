"""The programs in examples/python, run in this process as a user runs them."""

import re
import runpy
import sys

import pytest

from tests.examples.node import EXAMPLES

PROGRAMS = sorted(path.stem for path in (EXAMPLES / "python").glob("*.py"))
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def run_program(name: str, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / "python" / f"{name}.py"), run_name="__main__")


def numbers_in(line: str) -> list[float]:
    """The numbers with a decimal point in a line."""
    return [float(number) for number in NUMBER.findall(line)]
