"""When an engine hangs, and when it is only busy."""

import itertools
from dataclasses import replace

import pytest

from steer_service.engine.hang_detector import SHORTEST_STEP_TIMEOUT_S, SILENCE_S, HangDetector, Vitals
from steer_service.engine.heart import Pulse


class Engine:
    """A core and a worker whose signs of life a test writes, looked at once per second."""

    def __init__(self, step_timeout_s: float = 0.0) -> None:
        self.detector = HangDetector(step_timeout_s)
        self.core = Vitals(name="core", pulse=Pulse(beats=1, steps=0, longest_step_s=0.0), cpu_s=1.0, waited_s=0.0)
        self.worker = Vitals(name="worker", pulse=Pulse(beats=1, steps=1, longest_step_s=1.0), cpu_s=1.0, waited_s=0.0)

    def beat(self, *names: str) -> None:
        for name in names:
            one = getattr(self, name)
            setattr(self, name, replace(one, pulse=replace(one.pulse, beats=one.pulse.beats + 1)))

    def step(self, longest_step_s: float = 1.0) -> None:
        pulse = replace(self.worker.pulse, steps=self.worker.pulse.steps + 1, longest_step_s=longest_step_s)
        self.worker = replace(self.worker, pulse=pulse)

    def wait(self, seconds: float) -> None:
        """The worker waits for a processor."""
        self.worker = replace(self.worker, waited_s=self.worker.waited_s + seconds)

    def look(self, *, is_running: bool = False, passed_s: float = 1.0) -> str:
        return self.detector.check(passed_s, [self.core, self.worker], is_running=is_running)

    def seconds_until_hang(self, *beating: str, is_running: bool = False, at_most: int = 10_000) -> int | None:
        for second in range(at_most):
            self.beat(*beating)
            if self.look(is_running=is_running):
                return second
        return None


@pytest.mark.parametrize(("alive", "silent"), [("core", "worker"), ("worker", "core")])
def test_a_process_without_beats_and_processor_time_hangs(alive: str, silent: str) -> None:
    engine = Engine()
    assert engine.seconds_until_hang(alive) == SILENCE_S
    engine.beat(alive)
    assert engine.look() == f"{silent} has given no sign of life for {SILENCE_S + 1:.0f} s"


def test_an_idle_engine_that_beats_does_not_hang() -> None:
    assert Engine().seconds_until_hang("core", "worker", at_most=1000) is None


def test_a_process_whose_python_lock_is_held_does_not_hang_while_it_computes() -> None:
    engine = Engine()
    for _ in range(100):
        engine.beat("core")
        engine.worker = replace(engine.worker, cpu_s=engine.worker.cpu_s + 0.01)
        assert engine.look() == ""


def test_a_beat_ends_a_silence() -> None:
    engine = Engine()
    for _ in range(20):
        for _ in range(int(SILENCE_S) - 1):
            engine.beat("core")
            assert engine.look() == ""
        engine.beat("core", "worker")
        assert engine.look() == ""


def test_time_in_which_the_watch_was_stopped_itself_is_not_counted() -> None:
    engine = Engine()
    engine.look()
    assert engine.look(passed_s=0.0) == ""
    assert engine.look(passed_s=2.0) == ""


def test_an_engine_that_completes_no_step_while_requests_run_hangs() -> None:
    engine = Engine()
    engine.look(is_running=True)
    assert engine.seconds_until_hang("core", "worker", is_running=True) == SHORTEST_STEP_TIMEOUT_S - 1
    assert engine.look(is_running=True) == "no step has completed for 61 s while requests run"


def looks_until_hang(engine: Engine, waits_s: float) -> int:
    """Looks, one per second, until the engine hangs, while its worker waits for so long in each second."""
    for number in itertools.count(1):
        engine.beat("core", "worker")
        engine.wait(waits_s)
        if engine.look(is_running=True):
            return number
    raise AssertionError


@pytest.mark.parametrize(("waits_s", "looks"), [(0.0, 8), (0.5, 16), (0.75, 32), (1.0, 80)])
def test_time_in_which_a_process_waits_for_a_processor_is_no_time_without_a_step(waits_s: float, looks: int) -> None:
    engine = Engine(step_timeout_s=8.0)
    engine.wait(1000.0)  # before the requests
    engine.look(is_running=True)
    assert looks_until_hang(engine, waits_s) == looks


def test_what_a_process_waited_before_the_last_step_does_not_count() -> None:
    engine = Engine(step_timeout_s=8.0)
    engine.look(is_running=True)
    for _ in range(7):
        engine.wait(1.0)
        engine.beat("core", "worker")
        assert engine.look(is_running=True) == ""
    engine.step()
    engine.look(is_running=True)
    assert looks_until_hang(engine, 0.0) == 8


def test_an_engine_without_requests_needs_no_steps() -> None:
    assert Engine().seconds_until_hang("core", "worker", is_running=False, at_most=1000) is None


def test_the_wait_for_a_step_begins_with_the_requests() -> None:
    engine = Engine(step_timeout_s=5.0)
    engine.seconds_until_hang("core", "worker", at_most=100)
    for _ in range(4):
        engine.beat("core", "worker")
        assert engine.look(is_running=True) == ""
    engine.step()
    for _ in range(5):
        engine.beat("core", "worker")
        assert engine.look(is_running=True) == ""
    assert engine.look(is_running=True) != ""


def test_the_default_timeout_is_ten_times_the_longest_step() -> None:
    engine = Engine()
    engine.step(longest_step_s=20.0)
    engine.look(is_running=True)
    assert engine.seconds_until_hang("core", "worker", is_running=True) == 199


def test_a_given_timeout_holds_however_long_steps_are() -> None:
    engine = Engine(step_timeout_s=5.0)
    engine.step(longest_step_s=20.0)
    engine.look(is_running=True)
    assert engine.seconds_until_hang("core", "worker", is_running=True) == 4


def test_workers_that_cannot_be_read_are_not_missed() -> None:
    detector = HangDetector(0.0)
    assert all(detector.check(1.0, [], is_running=True) == "" for _ in range(1000))
