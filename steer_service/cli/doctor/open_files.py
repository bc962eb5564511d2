"""The limit of open files. Each connection has one and, before Python 3.13, each capture in shared memory."""

import resource
from collections.abc import Iterator

from steer_service.cli.doctor.findings import Finding, fail, ok, warn

OWN_FILES = 256
"""Files of the server and vLLM besides those of requests."""

RAISE = "raise it with `ulimit -Hn 65536`, `docker run --ulimit nofile=65536`, or LimitNOFILE= of systemd"


def check_open_files(most_requests: int, hard: int | None = None) -> Iterator[Finding]:
    """Whether as many clients as requests fit. `hard`: the limit; None for that of this process.

    The server raises its soft limit to the hard one.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    needed = OWN_FILES + 2 * most_requests
    if limit == resource.RLIM_INFINITY:
        yield ok("open files", "no limit")
    elif limit < OWN_FILES:
        yield fail("open files", f"the hard limit is {limit}, and a server needs {OWN_FILES} for itself; {RAISE}")
    elif limit < needed:
        yield warn(
            "open files",
            f"the hard limit is {limit}; {most_requests} requests (--max-concurrent-requests), each of a client of its "
            f"own and with a capture, need {needed}: {RAISE}",
        )
    else:
        yield ok("open files", f"{limit} for {most_requests} requests")
