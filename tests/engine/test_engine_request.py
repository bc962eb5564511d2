"""One output on vLLM, whose responses a test scripts: what is checked and waited for before something is yielded."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.events import CaptureHeld, OutputFinished, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine.engine_request import EngineRequest, EngineServices, vllm_interval
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.mark_memory import MarkMemory
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.prefix_cache import ProgramEpochs
from steer_service.engine.region import CAPTURED, COMPUTED, NON_FINITE, REUSED, STEERED
from steer_service.engine.region_pool import RegionPool
from steer_service.engine.slots import ProgramLease, ProgramLoad
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.runtime.worker_threads import WorkerThreads
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory, private_segment
from steer_service.testing.fake_backend import FakeTexts
from tests.engine.test_region_pool import INFO, PROGRAM, STEERING

LEASE = ProgramLease(0, PROGRAM, ExitStack)
PROMPT = (1, 2)
GOOD = COMPUTED | STEERED
POOLED = CaptureSpec(layers=(0,), pooling="mean")


class ScriptedLLM:
    """Yields one token after each of its steps, which are functions that do what workers do."""

    def __init__(self, *steps: Callable[[], object], ends_with: str = "length", merged: bool = False) -> None:
        """`ends_with`: the finish reason. `merged`: all tokens come at once, as for a reader that is slow."""
        self._steps = steps
        self._ends_with = ends_with
        self._merged = merged
        self.prompts: list[dict[str, Any]] = []

    async def generate(self, prompt: dict[str, Any], *_: Any, **__: Any) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(prompt)
        for number, step in enumerate(self._steps):
            step()
            reason = self._ends_with if number + 1 == len(self._steps) else None
            if self._merged and reason is None:
                continue
            token_ids = [*range(number + 1)] if self._merged else [number]
            completion = CompletionOutput(0, "", token_ids, None, None, finish_reason=reason)
            yield RequestOutput("", None, None, None, [completion], reason is not None)


class Summaries(WorkerThreads):
    """Notes when it gets work."""

    def __init__(self, happened: list[Any]) -> None:
        super().__init__("summaries", threads=1, max_waiting=1)
        self._happened = happened

    async def run(self, function: Callable[[], Any]) -> Any:
        self._happened.append("summary")
        return await super().run(function)


class Output:
    """A steered output with its parts, and what its worker does."""

    def __init__(self, folder: Path = Path("/dev/shm")) -> None:
        """`folder`: of captured rows."""
        self.counters = FailureCounters.private(workers=2, slots=1)
        self.happened: list[Any] = []
        """Tokens and "held" as they are yielded, "fence", "the slot is free", and "summary" for work in a thread."""
        marks = MarkMemory(private_segment(1 << 16), self._fence)
        self._regions = RegionPool(SegmentPool(1 << 20, SegmentDirectory(path=folder)), marks, INFO, stages=1)
        self._epochs = ProgramEpochs(self.counters)
        self._epochs.record([ProgramLoad(slot=0, digest=PROGRAM.digest, data=b"")])
        self._rows: RegionRows | None = None
        self._summaries = Summaries(self.happened)
        self._late: list[Callable[[], object]] = []

    def mark(self, first: int, bits: Sequence[int]) -> None:
        assert self._rows is not None
        assert self._rows.region is not None
        self._rows.region.mark(0, first, np.array(bits, np.uint8))

    async def run(self, llm: ScriptedLLM, **fields: Any) -> None:
        """Reads the output to its end."""
        request = await prepared(**fields)
        services = EngineServices(
            llm=llm,  # type: ignore[arg-type]
            info=INFO,
            adapters={},
            texts=FakeTexts(),
            slots=None,  # type: ignore[arg-type]
            regions=self._regions,
            counters=self.counters,
            epochs=self._epochs,
            fence=self._fence,
            sends_labels=False,
            summaries=self._summaries,
        )
        hold = ExitStack()
        hold.callback(self.happened.append, "the slot is free")
        async with self._regions.reserve(request, PROGRAM) as self._rows:
            output = EngineRequest(services, request, 0, name="a/0", lease=LEASE, hold=hold, rows=self._rows)
            async with aclosing(output.events()) as events:
                async for event in events:
                    match event:
                        case TokenDelta():
                            self.happened.extend(event.token_ids)
                        case CaptureHeld():
                            self.happened.append("held")
                            await event.held.release()
                        case OutputFinished():
                            self.happened.append(event.reason.value)

    def lag(self, *late: Callable[[], object]) -> None:
        """Lets an earlier pipeline stage do this only when a fence waits for it."""
        self._regions.lags = True
        self._late = list(late)

    async def _fence(self) -> None:
        self.happened.append("fence")
        while self._late:
            self._late.pop(0)()


async def prepared(stop: str = "", constraint: object = None, **fields: Any) -> PreparedRequest:
    async def render(_: GenerateRequest) -> RenderedPrompt:
        return RenderedPrompt(token_ids=PROMPT)

    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=PROMPT),
        sampling=SamplingOptions(max_tokens=3, stop=(stop,) if stop else (), structured_outputs=constraint),
        **{"steering": STEERING, **fields},
    )
    return await prepare(request, INFO, render)


@pytest.fixture
def output() -> Output:
    return Output()


async def test_every_token_is_yielded_while_the_workers_are_well(output: Output) -> None:
    llm = ScriptedLLM(lambda: output.mark(0, [GOOD, GOOD]), lambda: output.mark(2, [GOOD]))

    await output.run(llm)

    assert output.happened == [0, 1, "the slot is free", "length"]
    assert f"steer:{PROGRAM.digest}:" in llm.prompts[0]["cache_salt"]


async def test_rows_that_an_earlier_stage_marks_late_are_waited_for_at_the_end(output: Output) -> None:
    output.lag(lambda: output.mark(1, [GOOD]), lambda: output.mark(2, [GOOD]))

    await output.run(ScriptedLLM(lambda: output.mark(0, [GOOD]), lambda: None))

    assert output.happened == [0, 1, "fence", "the slot is free", "length"]


async def test_a_row_that_an_earlier_stage_finds_bad_late_fails_the_request(output: Output) -> None:
    output.lag(lambda: output.mark(2, [NON_FINITE]))

    with pytest.raises(
        InvalidRequest, match=r"at position 2, under steering after layers? \d+.*; lower the scale"
    ) as raised:
        await output.run(ScriptedLLM(lambda: output.mark(0, [GOOD, GOOD]), lambda: None))

    assert raised.value.reason == "STEERING_NONFINITE"
    assert output.happened == [0, 1, "fence", "the slot is free"]


@pytest.mark.parametrize("merged", [False, True])
async def test_all_tokens_are_yielded_but_the_one_that_a_constraint_refuses(output: Output, merged: bool) -> None:
    steps = [lambda: output.mark(0, [GOOD, GOOD]), *(partial(output.mark, row, [GOOD]) for row in (2, 3))]
    llm = ScriptedLLM(*steps, ends_with="error", merged=merged)

    with pytest.raises(InvalidRequest) as raised:
        await output.run(llm, constraint={"regex": "a"})

    assert raised.value.reason == "BAD_CONSTRAINT"
    assert output.happened == [0, 1, "the slot is free"]


async def test_no_token_is_yielded_once_a_worker_has_a_fault(output: Output) -> None:
    """The output of the other worker says nothing of it."""
    llm = ScriptedLLM(
        lambda: output.mark(0, [GOOD, GOOD]), lambda: output.counters.report_fault(1, "ZeroDivisionError")
    )

    with pytest.raises(EngineFailed, match=r"worker 1 .* \(ZeroDivisionError\)") as raised:
        await output.run(llm)

    assert raised.value.reason == "ENGINE_DIED"
    assert output.happened == [0, "the slot is free"]


@pytest.mark.parametrize("bad", range(len(PROMPT)))
async def test_no_token_is_yielded_after_a_row_that_is_not_finite(output: Output, bad: int) -> None:
    llm = ScriptedLLM(lambda: output.mark(0, [NON_FINITE if row == bad else GOOD for row in range(len(PROMPT))]))

    with pytest.raises(InvalidRequest, match=f"at position {bad}, under steering after layer") as raised:
        await output.run(llm)

    assert raised.value.reason == "STEERING_NONFINITE"
    assert output.happened == ["the slot is free"]


@pytest.mark.parametrize("first", [REUSED, GOOD])
async def test_no_token_is_yielded_after_a_reused_row_of_a_program_that_failed_meanwhile(
    output: Output, first: int
) -> None:
    """The other request with this program may have failed in a block that this one reuses."""

    def step() -> None:
        output.mark(0, [first, GOOD])
        output.counters.counts_RS[1, 0] += 1

    if first == GOOD:  # it has reused nothing
        await output.run(ScriptedLLM(step))
        assert output.happened == [0, "the slot is free", "length"]
        return
    with pytest.raises(InvalidRequest, match="prefix shared with another request") as raised:
        await output.run(ScriptedLLM(step))
    assert raised.value.reason == "STEERING_NONFINITE"
    assert output.happened == ["the slot is free"]


@pytest.mark.parametrize("fields", [{"steering": replace(STEERING, report_change=True)}, {"capture": POOLED}])
async def test_what_goes_over_all_rows_at_the_end_runs_in_a_thread(shm_folder: Path, fields: dict[str, Any]) -> None:
    """The event loop serves other requests meanwhile."""
    output = Output(shm_folder)

    await output.run(ScriptedLLM(lambda: output.mark(0, [GOOD | CAPTURED * ("capture" in fields)] * 2)), **fields)

    assert output.happened == [0, "the slot is free", "summary", "length"]


async def test_the_slot_of_an_output_that_ends_at_a_stop_string_is_kept_for_its_last_step(output: Output) -> None:
    """vLLM does not know the stop string: a step may be in flight when the output ends."""
    llm = ScriptedLLM(lambda: output.mark(0, [GOOD, GOOD]), lambda: pytest.fail("the output has ended"))

    await output.run(llm, stop="t0")

    assert [one for one in output.happened if isinstance(one, str)] == ["fence", "the slot is free", "stop"]


async def test_rows_in_shared_memory_are_handed_out_when_no_worker_writes_them_any_more(shm_folder: Path) -> None:
    """A client may shorten the segment, and a worker that writes beyond its end dies."""
    output = Output(shm_folder)
    capture = CaptureSpec(layers=(0,), delivery=CaptureDelivery.SHARED_MEMORY_REQUIRED)

    await output.run(ScriptedLLM(lambda: output.mark(0, [GOOD | CAPTURED] * 2)), capture=capture)

    assert output.happened == [0, "the slot is free", "fence", "held", "length"]


@pytest.mark.parametrize(
    ("options", "capture", "interval", "handed_out"),
    [
        (SamplingOptions(), None, None, 1),
        (SamplingOptions(), None, 8, 8),
        (SamplingOptions(), None, 0, 64),
        (SamplingOptions(), None, 2**31 - 1, 64),
        (SamplingOptions(), CaptureSpec(layers=(0,)), 8, 8),
        (SamplingOptions(), CaptureSpec(layers=(0,), is_live=True), 8, 1),
        (SamplingOptions(stop=("end",)), None, 8, 1),
        (SamplingOptions(stop=("end",)), None, 0, 1),
    ],
    ids=[
        "no interval",
        "an interval",
        "the end",
        "a long interval",
        "captures",
        "live captures",
        "a stop string",
        "one, and the end",
    ],
)
async def test_vllm_keeps_tokens_back_unless_each_is_needed_at_once(
    options: SamplingOptions, capture: CaptureSpec | None, interval: int | None, handed_out: int
) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=PROMPT), sampling=options, capture=capture, stream_interval=interval
    )

    async def render(_: GenerateRequest) -> RenderedPrompt:
        return RenderedPrompt(token_ids=PROMPT)

    assert vllm_interval(await prepare(request, INFO, render)) == handed_out
