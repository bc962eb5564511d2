"""Lets an error in one request's output fail that request alone.

vLLM processes the outputs of a step in one task. Whatever raises there fails every request and ends the engine.

Relies on (vLLM 0.24 to 0.33): `OutputProcessor.process_outputs`, which the task looks up for every step and which goes
over the outputs once, each on its own; `request_states`, whose `queue` hands an exception to the request's iterator,
which then aborts it. tests/engine/test_seams.py and tests/engine/vllm_patches/test_contained_outputs.py notice a
change.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.v1.engine.output_processor import OutputProcessorOutput

logger = logging.getLogger(__name__)


def contain_failures(processor: Any) -> None:
    """Makes this output processor hand an error to the request whose output raised it. Costs nothing per output."""
    process_outputs = processor.process_outputs

    def contained(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> OutputProcessorOutput:
        left = iter(outputs)
        aborted: list[str] = []
        current: list[Any] = []  # the output at work

        def watched() -> Iterator[Any]:
            for output in left:
                current[:] = [output]
                yield output

        while True:
            try:
                processed = process_outputs(watched(), *args, **kwargs)
            except Exception as error:
                _fail(processor, current[0].request_id, error)
                aborted += _lost(processor, outputs, current[0])
            else:
                processed.reqs_to_abort += aborted
                return processed

    processor.process_outputs = contained  # on the instance: other engines in this process are unchanged


def _lost(processor: Any, outputs: Sequence[Any], failed: Any) -> list[str]:
    """Requests before the failed one that vLLM would have named for an abort: they ended here, and not in its core."""
    before = outputs[: next(index for index, output in enumerate(outputs) if output is failed)]
    return [one.request_id for one in before if not one.finished and one.request_id not in processor.request_states]


def _fail(processor: Any, request_id: str, error: Exception) -> None:
    """Ends one request with `error`. Its text may hold a prompt: the log names its type and place only."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_qualname}:{place.tb_lineno}" if place is not None else "?"
    logger.error("vLLM failed on the output of one request: %s in %s", type(error).__name__, where)
    state = processor.request_states.get(request_id)
    if state is not None:  # vLLM may have ended it before it raised
        state.queue.put(error)
