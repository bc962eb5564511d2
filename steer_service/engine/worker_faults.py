"""Notices that the engine cannot go on: a process of vLLM has died, or a worker has a fault.

vLLM itself learns of a worker that ends, but takes about ten seconds to give up if other workers wait for that one.
Here requests in flight fail at once, and the processes of vLLM are killed: none may go on beside a worker with a fault.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.errored`, and `OutputProcessor.propagate_error`, which fails all requests.
tests/engine/test_seams.py notices a change.
"""

import asyncio
import logging

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.errors import EngineFailed
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.processes import EngineProcesses

logger = logging.getLogger(__name__)

WATCH_S = 0.25
"""Interval at which faults are looked for, in seconds."""


async def watch_for_end(llm: AsyncLLM, counters: FailureCounters, processes: EngineProcesses) -> None:
    """Returns when the engine cannot go on; requests in flight have failed then."""
    while not llm.errored:
        try:
            counters.check_faults()
        except EngineFailed as fault:
            logger.error("the engine ends: %s", fault)
            llm.output_processor.propagate_error(EngineDeadError())
            processes.kill()
            return
        await asyncio.sleep(WATCH_S)
