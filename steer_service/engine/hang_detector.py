"""Decides from the signs of life of vLLM's processes whether the engine hangs."""

from collections.abc import Sequence
from dataclasses import dataclass

from steer_service.engine.heart import Pulse

SILENCE_S = 10.0
"""Seconds without a beat and without processor time after which a process hangs."""

SHORTEST_STEP_TIMEOUT_S = 60.0
"""The default step timeout is this many seconds, or more if steps were long."""

LONGEST_STEP_FACTOR = 10
"""The default step timeout is at least this many times the longest step."""

MOST_WAITING = 0.9
"""The share of the time without a step that waiting for a processor may explain at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """The signs of life of one process at one time."""

    name: str
    """The process, for messages."""
    pulse: Pulse
    """What it has stamped."""
    cpu_s: float
    """Processor time that it has used, in seconds."""
    waited_s: float
    """Time for which its main thread, which runs the steps, was ready to run and waited for a processor, in seconds."""


class HangDetector:
    """Finds processes that are silent, and engines that complete no step while requests run.

    A process that is busy may be late with its beats, because its other threads hold Python's lock. It is silent only
    if it uses no processor time either. A stopped or deadlocked process is silent; an endless loop is not, but
    completes no step.

    A step takes long on a machine that is busy with something else. Time in which a process waits for a processor
    is therefore subtracted from the time without a step.
    """

    def __init__(self, step_timeout_s: float) -> None:
        """`step_timeout_s`: 0 chooses it from the longest step."""
        self._step_timeout_s = step_timeout_s
        self._seen: dict[str, Vitals] = {}
        self._silent_s: dict[str, float] = {}
        self._steps = 0
        self._without_step_s = 0.0
        self._waited_s: dict[str, float] = {}  # of each process, at the last step

    def check(self, passed_s: float, vitals: Sequence[Vitals], *, is_running: bool) -> str:
        """Why the engine hangs, or "".

        `passed_s`: seconds since the last check. Leave out time in which the caller was stopped itself: the processes
        may have been stopped with it. `is_running`: True if vLLM has requests to work on.
        """
        return self._silent(passed_s, vitals) or self._stuck(passed_s, vitals, is_running)

    def _silent(self, passed_s: float, vitals: Sequence[Vitals]) -> str:
        for now in vitals:
            before = self._seen.get(now.name)
            self._seen[now.name] = now
            is_alive = before is None or (now.pulse.beats, now.cpu_s) != (before.pulse.beats, before.cpu_s)
            self._silent_s[now.name] = 0.0 if is_alive else self._silent_s[now.name] + passed_s
        for name, silent_s in self._silent_s.items():
            if silent_s >= SILENCE_S:
                return f"{name} has given no sign of life for {silent_s:.0f} s"
        return ""

    def _stuck(self, passed_s: float, vitals: Sequence[Vitals], is_running: bool) -> str:
        steps = sum(one.pulse.steps for one in vitals)
        has_stepped = steps != self._steps or not steps  # without any step, nobody counts them
        self._steps = steps
        if has_stepped or not is_running:
            self._without_step_s, self._waited_s = 0.0, {one.name: one.waited_s for one in vitals}
            return ""
        self._without_step_s += passed_s
        waited_s = max((one.waited_s - self._waited_s.get(one.name, one.waited_s) for one in vitals), default=0.0)
        if self._without_step_s - min(waited_s, MOST_WAITING * self._without_step_s) >= self._timeout_s(vitals):
            return f"no step has completed for {self._without_step_s:.0f} s while requests run"
        return ""

    def _timeout_s(self, vitals: Sequence[Vitals]) -> float:
        longest_s = max((one.pulse.longest_step_s for one in vitals), default=0.0)
        return self._step_timeout_s or max(SHORTEST_STEP_TIMEOUT_S, LONGEST_STEP_FACTOR * longest_s)
