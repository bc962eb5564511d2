"""Ends vLLM's processes once the front end that started them is gone.

vLLM's core waits for requests for ever, and its workers for the core: a front end that is killed can tell neither, and
would leave them running with the model in memory. So would the process that balances replicas, in which no code of ours
runs: its siblings, the cores, end it.

Relies on (vLLM 0.24 to 0.33): the core being a process of `multiprocessing`, in which the scheduler is made when the
workers have loaded the model; SIGTERM ending it together with its workers, also while it starts; workers that end with
a core that is gone; titles that begin with VLLM_PROCESS_NAME_PREFIX; psutil, which vLLM requires.
tests/engine/test_real_hygiene.py notices a change.
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
"""Seconds that the core is given to end its workers, for which vLLM allows them some 8 s, and to remove its memory."""


def exit_with_parent() -> None:
    """From now on vLLM's core, in which this is called, ends soon after the process that started it."""
    front_end = multiprocessing.parent_process()
    if front_end is not None:  # otherwise the core is not a process of its own
        arguments = (front_end, _siblings(front_end))
        threading.Thread(target=_end_after, args=arguments, daemon=True, name="steer-parent-watchdog").start()


def _siblings(front_end: BaseProcess) -> list[psutil.Process]:
    """vLLM's other processes that the front end started; once it is gone, nothing tells whose they were."""
    with suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(front_end.pid).children() if _is_vllm_s(child)]
    return []


def _is_vllm_s(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.pid != os.getpid() and process.name().startswith(f"{envs.VLLM_PROCESS_NAME_PREFIX}::")
    return False


def _end_after(front_end: BaseProcess, siblings: Sequence[psutil.Process]) -> None:
    front_end.join()
    for sibling in siblings:
        with suppress(psutil.NoSuchProcess):
            sibling.terminate()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORDERLY_S)
    os._exit(1)
