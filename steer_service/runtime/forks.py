"""What an object that has threads, event loops or connections does in a process that was forked.

Only the thread that forks lives on in a child. The child shares the parent's descriptors: to close a connection or an
event loop there would end or change those of the parent.
"""

import ctypes
import os
from typing import Protocol
from weakref import WeakSet

from steer_service.core.errors import EngineFailed


class Forked(Protocol):
    """An object that is told when it is in a forked process."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_told: WeakSet[Forked] = WeakSet()


def tell_after_fork(one: Forked) -> None:
    """Lets `one.after_fork` be called in every child that is forked while `one` exists."""
    _told.add(one)


def keep_for_ever(one: object) -> None:
    """Lets this process never free `one`: its finalizer would act on what belongs to the parent."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def forked_error() -> EngineFailed:
    """The error of a call that cannot work in a forked process."""
    return EngineFailed(
        "this process was forked while a client was open, and gRPC cannot be used after that: start workers with "
        "multiprocessing's spawn or forkserver method, or fork them before the first call or after `close`",
        reason="FORKED",
    )


def _tell() -> None:
    for one in list(_told):
        one.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_tell)
