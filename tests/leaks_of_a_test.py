"""A plugin that fails every test which leaves tasks, threads, child processes, descriptors or shared memory behind.

What fixtures of a module or of the session make belongs to them: it is counted as found.
"""

import asyncio
import contextlib
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest

SETTLE_S = 5.0
"""Seconds in which what a test has ended may still be on its way out."""

COLLECT_S = 0.2
"""Seconds in which it goes by itself. Only then is garbage collected, which takes long beside the heap of torch."""

KEPT_THREADS = re.compile(
    r"_poll_wrapper|steerllm-hf|steer-heart|ThreadPoolExecutor-|pydevd|tqdm|QueueFeeder|InductorSubproc"
    r"|Thread-\d+ \(_read_thread\)"
)
"""Names of threads that a library starts at its first use and keeps."""

KEPT_FILES = re.compile(
    r"anon_inode|pipe:|socket:|/dev/(null|urandom|pts)|\.(so|py|pyc|json|ttf|safetensors|log|gz)\b|/tmp/|/\.cache/"
    r"|steerllm\.[0-9a-f]+\.lock|memfd:steer-heart"
)
"""Targets of descriptors that libraries keep. gRPC closes its sockets in its own time; a process keeps its lock."""

KEPT_TASKS = "<_cython"
"""Tasks of gRPC itself, which ends calls in its own time."""

SHARED_MEMORY = Path("/dev/shm")

Things = dict[str, set[Any]]


def _threads() -> set[Any]:
    return {one for one in threading.enumerate() if not KEPT_THREADS.search(one.name)}


def _children() -> set[Any]:
    found = set[Any]()
    for _ in range(2):  # when a thread ends, its children become those of one that was read already
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # the thread has ended
                found.update((task / "children").read_text().split())
    return found


def _descriptors() -> set[Any]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it was closed
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return {one for one in found if not KEPT_FILES.search(one[1])}


def _segments() -> set[Any]:
    return {path.name for path in SHARED_MEMORY.iterdir() if not KEPT_FILES.search(path.name)}


KINDS: dict[str, Callable[[], set[Any]]] = {
    "threads": _threads,
    "child processes": _children,
    "descriptors": _descriptors,
    "shared memory": _segments,
}


def _present() -> Things:
    return {kind: look() for kind, look in KINDS.items()}


class Leaks:
    """The plugin."""

    def __init__(self) -> None:
        self._found: Things = {}
        self._tasks: list[str] = []
        # It lives as long as Python. The first engine would start it with the pipe of its start log, as if a leak.
        resource_tracker.ensure_running()
        cancel_all = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

        def cancel_and_note(loop: asyncio.AbstractEventLoop) -> None:
            coroutines = [repr(task.get_coro()) for task in asyncio.all_tasks(loop)]
            self._tasks += [one for one in coroutines if not one.startswith(KEPT_TASKS)]
            cancel_all(loop)

        asyncio.runners._cancel_all_tasks = cancel_and_note  # type: ignore[attr-defined]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        before = _present()
        try:
            return (yield)
        finally:
            for kind, now in _present().items():
                self._found.setdefault(kind, set()).update(now - before[kind])

    def pytest_collection_finish(self) -> None:
        gc.freeze()  # what was imported stays: no collection looks at it again

    def pytest_sessionfinish(self) -> None:
        gc.unfreeze()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[Any]:
        self._found = _present()
        self._tasks.clear()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: Any) -> Iterator[Any]:
        result = yield
        left = self._left()
        for marker in item.iter_markers("leaves"):
            left.pop(marker.args[0], None)
        if left:
            pytest.fail(f"the test left {left}", pytrace=False)
        return result

    def _left(self) -> Things:
        """What is there now and was not before, by kind, once nothing goes away any more."""
        now_s = time.monotonic()
        deadline, collect_at, pause_s = now_s + SETTLE_S, now_s + COLLECT_S, 0.001
        while True:
            now = _present()
            left = {kind: now[kind] - self._found[kind] for kind in KINDS}
            left = {kind: things for kind, things in left.items() if things}
            if not left or (now_s := time.monotonic()) > deadline:
                break
            if now_s > collect_at:
                gc.collect()
                collect_at = now_s + COLLECT_S
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        if self._tasks:
            left["tasks"] = set(self._tasks)
        return left
