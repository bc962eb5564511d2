"""Forward passes that a device may still be at when vLLM schedules the next: completed in order, before they are seen.

Relies on (vLLM 0.32): `AsyncModelRunnerOutput.get_output`, called once for an output that is handed on, perhaps in a
thread of its own, before anybody sees its tokens. tests/engine/worker/test_in_flight_steps.py notices a change.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput

from steer_service.engine.worker.hooks import HookedForward
from steer_service.ops.plan import RequestRows

MAX_IN_FLIGHT = 2
"""Forward passes that may wait to be completed; an older one has long ended, as vLLM schedules no further ahead."""


@dataclass(frozen=True, slots=True, eq=False)
class InFlightStep:
    """A step whose forward pass has ended."""

    hooked: HookedForward
    """What its hooks did, or are at."""
    batch: Sequence[RequestRows]
    """All rows of the step, steered or not."""


class InFlightSteps:
    """Steps to complete, each once, in the order of their forward passes, by whichever thread needs one of them."""

    def __init__(self, complete: Callable[[InFlightStep], None]) -> None:
        self._complete = complete
        self._steps: deque[InFlightStep] = deque()  # a step leaves it when it has been completed
        self._noting = threading.Lock()  # never held while something is waited for
        self._completing = threading.Lock()

    def add(self, step: InFlightStep) -> None:
        """Notes a step whose forward pass has been handed to the device; not more than MAX_IN_FLIGHT are left waiting.

        The output of a tensor-parallel rank may be one that nobody reads.
        """
        with self._noting:
            self._steps.append(step)
            old = list(self._steps)[:-MAX_IN_FLIGHT]
        if old:
            self.complete(old[-1])

    def complete(self, last: InFlightStep | None = None) -> None:
        """Waits for all steps, or for those up to `last`, and completes them."""
        with self._completing:
            for step in self._until(last):
                self._complete(step)
                with self._noting:
                    self._steps.popleft()

    def release(self, request_ids: Iterable[str]) -> None:
        """Completes all steps if one of them has rows of these requests, whose memory may be another's soon."""
        going = set(request_ids)
        if any(part.request_id in going for step in self._until(None) for part in step.hooked.plan.rows):
            self.complete()

    def hand_over(self, output: Any) -> Any:
        """The output, whose tokens are seen only after all steps so far have been completed."""
        steps = self._until(None)
        if not steps:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _CompletedOutput(output, lambda: self.complete(steps[-1]))
        self.complete()
        return output

    def _until(self, last: InFlightStep | None) -> list[InFlightStep]:
        """The steps up to `last`, or all; none if `last` has been completed."""
        with self._noting:
            steps = list(self._steps)
        if last is None:
            return steps
        return steps[: steps.index(last) + 1] if last in steps else []


class _CompletedOutput(AsyncModelRunnerOutput):
    """An output that completes steps before it gives itself away."""

    def __init__(self, output: AsyncModelRunnerOutput, complete: Callable[[], None]) -> None:
        self._output = output
        self._complete = complete

    def get_output(self) -> Any:
        """vLLM's own, afterwards."""
        self._complete()
        return self._output.get_output()

    def get_kv_connector_output(self) -> Any:
        """vLLM's own, from 0.33 on: what is left of a step whose output failed."""
        return self._output.get_kv_connector_output()
