"""Notices that the engine cannot go on: a process of vLLM has died, or a worker has a fault.

vLLM itself learns of a worker that ends, but takes about ten seconds to give up if other workers wait for that one.
Here requests in flight fail at once, and the processes of vLLM are killed: none may go on beside a worker with a fault.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.errored`, and `OutputProcessor.propagate_error`, which fails all requests.
tests/engine/test_seams.py notices a change.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.errors import EngineFailed
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.processes import EngineProcesses

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WATCH_S = 0.25
"""Interval at which faults are looked for, in seconds."""


async def unless_dead(llm: AsyncLLM, exchange: Coroutine[Any, Any, Result]) -> Result:
    """The result of an exchange with the workers of an engine that starts.

    Raises EngineFailed if the engine dies first: vLLM would never answer.
    """
    exchanging = asyncio.ensure_future(exchange)
    try:
        while not exchanging.done():
            if llm.errored:
                raise EngineFailed(
                    "a process of vLLM died at the end of its start; the lines above may say why. The usual cause is "
                    "too little memory: raise the limit of the container, or give a smaller --kv-cache-memory-bytes",
                    reason="START_FAILED",
                )
            await asyncio.wait([exchanging], timeout=WATCH_S)
        return exchanging.result()
    finally:
        exchanging.cancel()


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
