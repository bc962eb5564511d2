"""One output on vLLM, whose responses a test scripts: what is checked before a token is yielded."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

import numpy as np
import pytest
from vllm.outputs import CompletionOutput, RequestOutput

from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.core.events import TokenDelta
from steer_service.engine.engine_request import EngineRequest, EngineServices
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.mark_memory import MarkMemory
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.prefix_cache import ProgramEpochs
from steer_service.engine.region import COMPUTED, NON_FINITE, STEERED
from steer_service.engine.region_pool import RegionPool
from steer_service.engine.slots import ProgramLease, ProgramLoad
from steer_service.shm.pool import SegmentPool
from steer_service.shm.segments import SegmentDirectory, private_segment
from steer_service.testing.fake_backend import FakeTexts
from tests.engine.test_region_pool import INFO, PROGRAM, no_fence, prepared

LEASE = ProgramLease(0, PROGRAM, ExitStack)
PROMPT_ROWS = 2


class ScriptedLLM:
    """Yields one token after each of its steps, which are functions that do what workers do."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = steps
        self.prompts: list[dict[str, Any]] = []

    async def generate(self, prompt: dict[str, Any], *_: Any, **__: Any) -> AsyncGenerator[RequestOutput, None]:
        self.prompts.append(prompt)
        for number, step in enumerate(self._steps):
            step()
            reason = "length" if number + 1 == len(self._steps) else None
            completion = CompletionOutput(0, "", [number], None, None, finish_reason=reason)
            yield RequestOutput("", None, None, None, [completion], reason is not None)


class Output:
    """A steered output with its parts, and what its worker does."""

    def __init__(self) -> None:
        self.counters = FailureCounters.private(workers=2, slots=1)
        marks = MarkMemory(private_segment(1 << 16), no_fence)
        self._regions = RegionPool(SegmentPool(0, SegmentDirectory()), marks, INFO, stages=1)
        self._epochs = ProgramEpochs(self.counters)
        self._epochs.record([ProgramLoad(slot=0, digest=PROGRAM.digest, data=b"")])
        self._rows: RegionRows | None = None

    def mark(self, first: int, bits: Sequence[int]) -> None:
        assert self._rows is not None
        assert self._rows.region is not None
        self._rows.region.mark(0, first, np.array(bits, np.uint8))

    async def tokens(self, llm: ScriptedLLM, then: Callable[[TokenDelta], None]) -> None:
        """Reads the output to its end; calls `then` with each token."""
        request = await prepared("alice", rows=PROMPT_ROWS + 2)
        services = EngineServices(
            llm=llm,  # type: ignore[arg-type]
            info=INFO,
            adapters={},
            texts=FakeTexts(),
            slots=None,  # type: ignore[arg-type]
            regions=self._regions,
            counters=self.counters,
            epochs=self._epochs,
            fence=no_fence,
            sends_labels=False,
        )
        async with self._regions.reserve(request, PROGRAM) as self._rows:
            output = EngineRequest(services, request, 0, name="a/0", lease=LEASE, hold=ExitStack(), rows=self._rows)
            async with aclosing(output.events()) as events:
                async for event in events:
                    if isinstance(event, TokenDelta):
                        then(event)


GOOD = COMPUTED | STEERED


@pytest.fixture
def output() -> Output:
    return Output()


async def test_every_token_is_yielded_while_the_workers_are_well(output: Output) -> None:
    tokens: list[TokenDelta] = []
    llm = ScriptedLLM(lambda: output.mark(0, [GOOD] * PROMPT_ROWS), lambda: output.mark(2, [GOOD]))

    await output.tokens(llm, tokens.append)

    assert [one.token_ids for one in tokens] == [(0,), (1,)]
    assert f"steer:{PROGRAM.digest}:" in llm.prompts[0]["cache_salt"]


async def test_no_token_is_yielded_once_a_worker_has_a_fault(output: Output) -> None:
    """The output of the other worker says nothing of it."""
    tokens: list[TokenDelta] = []
    llm = ScriptedLLM(
        lambda: output.mark(0, [GOOD] * PROMPT_ROWS), lambda: output.counters.report_fault(1, "ZeroDivisionError")
    )

    with pytest.raises(EngineFailed, match=r"worker 1 .* \(ZeroDivisionError\)") as raised:
        await output.tokens(llm, tokens.append)

    assert raised.value.reason == "ENGINE_DIED"
    assert [one.token_ids for one in tokens] == [(0,)]


@pytest.mark.parametrize("bad", range(PROMPT_ROWS))
async def test_no_token_is_yielded_after_a_row_that_is_not_finite(output: Output, bad: int) -> None:
    tokens: list[TokenDelta] = []
    llm = ScriptedLLM(lambda: output.mark(0, [NON_FINITE if row == bad else GOOD for row in range(PROMPT_ROWS)]))

    with pytest.raises(InvalidRequest, match=f"at position {bad}$") as raised:
        await output.tokens(llm, tokens.append)

    assert raised.value.reason == "STEERING_NONFINITE"
    assert tokens == []
