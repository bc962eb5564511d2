"""Standard streams that may be closed or have another encoding, and text of others on a terminal.

A terminal obeys control characters: with them, a model or a server could change its title, its clipboard, or lines that
are already there.
"""

import io
import os
import sys
from typing import TextIO

ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
"""Control characters -> how they are shown."""

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""Standard streams in the order of their descriptors, and their modes."""


def shown(text: str, stream: TextIO) -> str:
    """The text as it is printed to `stream`: with its control characters as escapes if that is a terminal."""
    return text.translate(ESCAPES) if stream.isatty() else text


def print_text(text: str, *, end: str = "\n") -> None:
    """Prints what a server or a file has to standard output, at once."""
    print(shown(text, sys.stdout), end=end, flush=True)


def prepare_streams() -> None:
    """Lets a command use its standard streams, whatever its caller made of them.

    A stream that is closed is the null device: else the next file or socket would have its descriptor. Characters that
    standard output cannot encode are escaped.
    """
    for name, mode in STREAMS.items():
        if getattr(sys, name) is None:
            null = open(os.devnull, mode)  # noqa: SIM115  # as long as the process
            os.set_inheritable(null.fileno(), True)
            setattr(sys, name, null)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
