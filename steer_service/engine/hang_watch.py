"""Watches an engine for a server, and kills its processes if they hang.

vLLM itself waits 300 s for a worker that hangs, and forever for an engine core.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.errored`; `OutputProcessor.has_unfinished_requests`.
tests/engine/test_seams.py notices a change.
"""

import asyncio
import logging

from vllm.v1.engine.async_llm import AsyncLLM

from steer_service.engine.hang_detector import HangDetector
from steer_service.engine.processes import EngineProcesses

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""Seconds between two looks at the processes."""

LONGEST_PASSED_S = 2 * CHECK_S
"""The most that one look counts: a server that was stopped itself must not blame its processes."""


async def end_when_hung(llm: AsyncLLM, processes: EngineProcesses, step_timeout_s: float) -> None:
    """Returns once the engine has died; if it hangs, its processes are killed and vLLM notices their death."""
    if not processes.vitals():
        logger.warning("no process of the engine can be watched: if one hangs, the server does not notice it")
    detector = HangDetector(step_timeout_s)
    loop = asyncio.get_running_loop()
    looked_at = loop.time()
    while not llm.errored:
        await asyncio.sleep(CHECK_S)
        passed_s = min(loop.time() - looked_at, LONGEST_PASSED_S)
        looked_at = loop.time()
        is_running = llm.output_processor.has_unfinished_requests()
        cause = detector.check(passed_s, processes.vitals(), is_running=is_running)
        if cause:
            logger.error("the engine hangs: %s; its processes are killed", cause)
            processes.kill()
            return
