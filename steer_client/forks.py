"""Refuses gRPC in a process that was forked from one in which gRPC ran, and keeps gRPC from acting there itself.

gRPC's threads do not exist in a child: calls there hang, or the process crashes. When a process forks, gRPC can start
them anew. Its asyncio part does not survive that, so this is switched off. gRPC reads the setting when it is imported;
if that was before this module, a fork with an open client warns.
"""

import gc
import os
import re
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from steer_service.runtime.event_loop_thread import wait_for_dropped
from steer_service.runtime.forks import forked_error

FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
"""gRPC's setting; one that the user made is kept."""

POLLER = "_poll_wrapper"
"""In the name of the thread of gRPC's asyncio part, which lives while there is an asynchronous channel or server."""

CORE_THREAD = re.compile(r"event_engine|grpc_global_tim|lifeguard")
"""Names of gRPC's own threads in Linux; they end when nothing uses gRPC any more."""

LINGERING_S = 2.0
"""Seconds for which a fork waits, once, for gRPC's threads to end if all clients are closed."""

_open: WeakSet[object] = WeakSet()
"""What has open channels in this process."""
_may_linger = False
"""Whether channels were opened since a fork last waited for gRPC's threads to end."""
_ran = False
"""Whether gRPC ran when this process was last about to fork; a child inherits the answer."""
_is_unusable = False
"""Whether gRPC cannot be used in this process."""

OFF = ("0", "f", "false", "n", "no")
"""What switches gRPC's setting off."""

WARNING = (
    "gRPC starts threads of its own in forked processes, which can crash them: import steer_client before any library"
    f" that imports grpc, set {FORK_SUPPORT}=0, or start processes with spawn or forkserver"
)

_acts_in_children = os.environ.get(FORK_SUPPORT, "1" if "grpc" in sys.modules else "0").lower() not in OFF
"""Whether gRPC was imported before this module, or a setting of the user keeps its part in children switched on."""


def check_grpc_usable() -> None:
    """Raises EngineFailed (FORKED) if gRPC cannot be used in this process."""
    if _is_unusable:
        raise forked_error()


def note_open(one: object) -> None:
    """Counts the channels of `one` among the open ones, until `note_closed` or until it is freed."""
    global _may_linger
    _open.add(one)
    _may_linger = True


def note_closed(one: object) -> None:
    """Takes back `note_open`."""
    _open.discard(one)


def _before() -> None:
    global _ran, _may_linger
    wait_for_dropped(LINGERING_S)  # a client that was dropped is as good as closed, and may still be closing
    _ran = _grpc_runs()
    if _ran and _open and _acts_in_children:
        warnings.warn(WARNING, RuntimeWarning, stacklevel=2)
    if not _ran or _open or not _may_linger:
        return
    _may_linger = False
    gc.collect()  # the traceback of a failed call keeps its closed channel in a cycle
    until = time.monotonic() + LINGERING_S
    while (_ran := _grpc_runs()) and time.monotonic() < until:
        time.sleep(0.002)


def _grpc_runs() -> bool:
    return any(POLLER in thread.name for thread in threading.enumerate()) or _has_core_threads()


def _has_core_threads() -> bool:
    if "grpc" not in sys.modules:
        return False
    with suppress(OSError):  # no Linux
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError):  # the thread has ended
                if CORE_THREAD.match(Path(f"/proc/self/task/{task}/comm").read_text()):
                    return True
    return False


def _after_in_child() -> None:
    global _is_unusable
    _is_unusable = _is_unusable or _ran
    if _is_unusable:
        gc.freeze()  # to free what gRPC's threads left in cycles would take locks that nobody gives back here


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_before, after_in_child=_after_in_child)

_is_given = FORK_SUPPORT in os.environ
os.environ.setdefault(FORK_SUPPORT, "0")
import grpc  # noqa: E402, F401  # reads the setting, which is then removed: other programs get no setting of ours

if not _is_given:
    del os.environ[FORK_SUPPORT]
