"""vLLM's processes end without Python's teardown.

When the engine core and a worker have shut down, Python destroys every module and looks through 700,000 objects of
torch and vLLM for garbage. That takes 2.5 s of processor time in each process, one after the other, and frees nothing
that the system does not free anyway. A worker that needs more than 5 s, as on a busy host, is sent SIGTERM.

Relies on (vLLM 0.24 to 0.33): the names of the two kinds of processes; `Worker.shutdown` and `Scheduler.shutdown`, each
called once, before the end of its process, and while the exception is handled that ends it.
tests/real_server/test_start_and_end.py notices a change.
"""

import atexit
import multiprocessing
import sys
from typing import NoReturn

from steer_service.core.processes import end_process

NAMES = ("EngineCore", "VllmWorker")
"""Beginnings of the names of vLLM's processes in `multiprocessing`."""


def skip_teardown() -> None:
    """Makes this process, if it is one of vLLM's, end as soon as its exit handlers have run. Call it at its shutdown.

    The exit status stays as it would be: 0 if the engine was asked to end, 1 if an error ends it.
    """
    if multiprocessing.parent_process() is None or not multiprocessing.current_process().name.startswith(NAMES):
        return  # the engine core is within the user's own process
    error = sys.exc_info()[1]
    status = 0 if error is None or isinstance(error, SystemExit) else 1
    atexit.register(_end, status)  # the last handler to be registered is the first to run


def _end(status: int) -> NoReturn:
    atexit.unregister(_end)  # or the handlers that run now would be run with this one among them
    end_process(status)
