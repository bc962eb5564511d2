"""Steps that a device may still run when vLLM schedules the next one.

They are completed in order, before their tokens are visible.

Relies on (vLLM 0.24 to 0.33): `AsyncModelRunnerOutput.get_output`, called once for an output that is sent on, perhaps
in a thread of its own, before its tokens are visible. tests/engine/worker/test_in_flight_steps.py notices a change.
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
"""Largest number of steps in flight. vLLM schedules no further ahead, so an older step has ended on the device."""


@dataclass(frozen=True, slots=True, eq=False)
class InFlightStep:
    """A step whose forward pass has returned."""

    hooked: HookedForward
    """The forward pass, which the device may still run."""
    batch: Sequence[RequestRows]
    """All rows of the step, steered or not."""


class InFlightSteps:
    """Steps in flight. The first thread that needs a step completes it; each is completed once and in order."""

    def __init__(self, complete: Callable[[InFlightStep], None]) -> None:
        self._complete = complete
        self._steps: deque[InFlightStep] = deque()  # a step is removed when it has been completed
        self._steps_lock = threading.Lock()  # never held during a wait
        self._completing = threading.Lock()

    def add(self, step: InFlightStep) -> None:
        """Adds a step whose forward pass is queued on the device. Completes older steps than the last MAX_IN_FLIGHT.

        Otherwise they could pile up, because vLLM does not read the output of every tensor-parallel rank.
        """
        with self._steps_lock:
            self._steps.append(step)
            old = list(self._steps)[:-MAX_IN_FLIGHT]
        if old:
            self.complete(old[-1])

    def complete(self, last: InFlightStep | None = None) -> None:
        """Waits for all steps, or for those up to `last`, and completes them."""
        with self._completing:
            for step in self._until(last):
                self._complete(step)
                with self._steps_lock:
                    self._steps.popleft()

    def release(self, request_ids: Iterable[str]) -> None:
        """Completes all steps if one of them has rows of these requests, whose memory other requests may get."""
        leaving = set(request_ids)
        if any(part.request_id in leaving for step in self._until(None) for part in step.hooked.plan.rows):
            self.complete()

    def hand_over(self, output: Any) -> Any:
        """The output; its tokens become visible only after all steps so far have been completed."""
        steps = self._until(None)
        if not steps:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _CompletedOutput(output, lambda: self.complete(steps[-1]))
        self.complete()
        return output

    def _until(self, last: InFlightStep | None) -> list[InFlightStep]:
        """The steps up to `last`, or all; none if `last` has been completed."""
        with self._steps_lock:
            steps = list(self._steps)
        if last is None:
            return steps
        return steps[: steps.index(last) + 1] if last in steps else []


class _CompletedOutput(AsyncModelRunnerOutput):
    """An output that completes steps before it is read."""

    def __init__(self, output: AsyncModelRunnerOutput, complete: Callable[[], None]) -> None:
        self._output = output
        self._complete = complete

    def get_output(self) -> Any:
        """Completes the steps, then returns vLLM's output."""
        self._complete()
        return self._output.get_output()

    def get_kv_connector_output(self) -> Any:
        """vLLM's own, from 0.33 on, for a step whose output failed."""
        return self._output.get_kv_connector_output()
