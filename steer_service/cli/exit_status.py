"""How the `steer` commands end, as shells expect it; 0 is success."""

FAILED = 1
"""There is no server, or it cannot execute the request."""
BAD_USAGE = 2
"""The command line itself, or a file that it names, is wrong."""
INTERRUPTED = 130
"""Ended by Ctrl-C: 128 + SIGINT."""
