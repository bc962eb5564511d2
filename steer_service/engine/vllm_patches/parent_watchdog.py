"""Ends vLLM's processes once the API server process that started them is gone.

vLLM's engine core waits for requests forever, and its workers wait for the engine core. If the API server process is
killed, they would keep running with the model in memory. vLLM's DP coordinator would too; it runs no code of this
project, so the engine cores terminate it.

Relies on (vLLM 0.24 to 0.33): the engine core being a process of `multiprocessing`, in which the scheduler is made when
the workers have loaded the model; SIGTERM ending it together with its workers, also while it starts; workers that end
with an engine core that is gone; titles that begin with VLLM_PROCESS_NAME_PREFIX; psutil, which vLLM requires.
tests/engine/test_real_leaks.py notices a change.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

import psutil  # type: ignore[import-untyped]
import vllm.envs as envs

ORDERLY_S = 15.0
"""Seconds in which the engine core can end its workers and remove its memory. vLLM gives the workers about 8 s."""


def exit_with_parent() -> None:
    """Makes the engine core, in which this is called, end soon after the process that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:  # None if the engine core is not a process of its own
        arguments = (parent, _siblings(parent))
        threading.Thread(target=_end_after, args=arguments, daemon=True, name="steer-parent-watchdog").start()


def _siblings(parent: BaseProcess) -> list[psutil.Process]:
    """vLLM's other processes with the same parent; they cannot be found once the parent is gone."""
    with suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(parent.pid).children() if _is_vllm_s(child)]
    return []


def _is_vllm_s(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.pid != os.getpid() and process.name().startswith(f"{envs.VLLM_PROCESS_NAME_PREFIX}::")
    return False


def _end_after(parent: BaseProcess, siblings: Sequence[psutil.Process]) -> None:
    parent.join()
    for sibling in siblings:
        with suppress(psutil.NoSuchProcess):
            sibling.terminate()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORDERLY_S)
    os._exit(1)
