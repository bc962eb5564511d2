"""One output of a request on vLLM: its slot, its vLLM request, and its events from the first token to the receipt.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.generate`, which aborts the request when its generator is closed;
`AsyncLLM.abort`, after which the generator ends with an output that has what was kept back and the reason "abort";
`cache_salt` of a prompt, `SamplingParams.skip_reading_prefix_cache`, `priority` and `trace_headers`.
tests/engine/test_seams.py notices a change.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

from vllm.logprobs import Logprob
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery
from steer_service.core.checks import check_allowed
from steer_service.core.errors import EngineFailed
from steer_service.core.events import Event, FinishReason, PromptLogprobs
from steer_service.engine.constraints import error_of_vllm
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import worker_request
from steer_service.engine.output_rows import RegionRows
from steer_service.engine.prefix_cache import ProgramEpochs, cache_salt
from steer_service.engine.region_pool import RegionPool
from steer_service.engine.remote_workers import RemoteRegions
from steer_service.engine.sampling import prompt_logprobs, token_delta, vllm_params
from steer_service.engine.slots import ProgramLease, SlotAllocator
from steer_service.engine.vllm_errors import vllm_errors
from steer_service.engine.vllm_patches.compat import HAS_STREAM_INTERVAL
from steer_service.runtime.output_events import OutputEvents
from steer_service.runtime.output_text import NewText, OutputText
from steer_service.runtime.prepare import PreparedRequest
from steer_service.runtime.token_texts import TokenTexts
from steer_service.runtime.worker_threads import WorkerThreads

ABORT_AGAIN_S = 0.05
"""Seconds between two attempts to abort a request: vLLM ignores an abort before it knows the request."""


MOST_KEPT_BACK = 64
"""Tokens after which rows that are not finite are noticed at the latest, however long the pieces of a response are."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineServices:
    """The parts of the engine that the outputs of all requests share."""

    llm: AsyncLLM
    info: ModelInfo
    adapters: Mapping[str, LoRARequest]
    texts: TokenTexts
    slots: SlotAllocator
    regions: RegionPool
    counters: FailureCounters
    epochs: ProgramEpochs
    fence: Callable[[], Awaitable[None]]
    """Returns when the workers have processed every earlier message and completed their steps."""
    sends_labels: bool
    summaries: WorkerThreads
    """The one thread that pools captured rows and sums up changes: the event loop serves other requests meanwhile."""


class EngineRequest:
    """One output of a request."""

    def __init__(
        self,
        services: EngineServices,
        prepared: PreparedRequest,
        index: int,
        *,
        name: str,
        lease: ProgramLease | None,
        hold: ExitStack,
        rows: RegionRows,
    ) -> None:
        """`name`: name of the output in traces. `lease`: of the program for its steered rows, if there are any.

        `hold`: closed when the output needs its lease no longer. `rows`: with their region.
        """
        self.rows = rows
        self.output = OutputEvents(prepared, index, services.info, rows, sends_labels=services.sends_labels)
        self._services = services
        self._prepared = prepared
        self._index = index
        self._name = name
        self._lease = lease
        self._hold = hold
        self._last: CompletionOutput | None = None
        self._text = OutputText(services.texts, prepared.prompt.token_ids, prepared.options)
        allowed = prepared.options.allowed_token_ids
        self._allowed = frozenset(allowed) if allowed is not None else None
        self._failures = 0  # of the slot, before the cache salt was made
        self._is_over_budget = False

    async def events(self) -> AsyncGenerator[Event, None]:
        """Runs the output on vLLM. Closing the iterator aborts it.

        Raises InvalidRequest with the next tokens after a row that is not finite, EngineFailed if rows were not steered
        or captured.
        """
        with self._hold:
            self._is_over_budget = self._prepared.budget.is_over
            if not self._is_over_budget:
                async with self._responses() as responses:
                    async for response in responses:
                        completion = response.outputs[0]
                        new = self._accept(completion)
                        self.rows.cached_tokens = response.num_cached_tokens or 0
                        if self._services.regions.remote is not None:
                            await self._fetch_rows(self._services.regions.remote)
                        self._check_rows()
                        entries = response.prompt_logprobs
                        if entries is not None and len(entries) > 1:  # an aborted request has the first token's alone
                            yield await self._logprobs_of_prompt(entries)
                        if new.token_count or new.text:
                            top = self._prepared.options.logprobs
                            yield token_delta(self._index, completion, new, top, self._services.texts)
                        if self.output.is_live:
                            await self._catch_up()
                            for event in self.output.after_tokens():
                                yield event
                        if self._text.stop is not None:
                            break
            await self._catch_up()
            # Stop strings are found here, and the engine core may run the request for another step.
            # Keep the slot until the engine core has processed the abort.
            if self._lease is not None and (self._text.stop is not None or self._is_over_budget):
                await self._services.fence()
        if self._prepared.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED:
            await self._services.fence()  # if a client truncates a segment, a worker that still writes to it dies
        end = self._end()
        if self.output.has_summaries:
            await self._services.summaries.run(self.output.summarize)
        for final in self.output.finish(*end):
            yield final  # outside the lease: a client that reads captures slowly holds no slot

    async def _catch_up(self) -> None:
        """Waits for pipeline stages that may not have marked their rows yet, and checks these rows."""
        if self._services.regions.lags and self.rows.region is not None and self.output.row_count:
            await self._services.fence()
            self._check_rows(again=True)

    def _end(self) -> tuple[FinishReason, str | int | None]:
        """Why the output ended, and the stop string or token that ended it; raises EngineFailed if it is incomplete."""
        if self._text.stop is not None:
            return FinishReason.STOP, self._text.stop
        last = self._last
        if last is not None and last.finish_reason in ("stop", "length"):
            return FinishReason(last.finish_reason), last.stop_reason
        if self._is_over_budget:
            return FinishReason.TIME_BUDGET, None
        if last is not None and last.finish_reason == "error" and self._prepared.options.structured_outputs:
            raise error_of_vllm(last.stop_reason, self._prepared.options)
        raise EngineFailed("the engine ended the request before it was complete", reason="ABORTED")

    @asynccontextmanager
    async def _responses(self) -> AsyncIterator[AsyncGenerator[RequestOutput, None]]:
        """vLLM's outputs, which end with the time budget; errors of vLLM become those of this project."""
        assert (self._lease is None) == (self._prepared.steering is None), "nothing runs without its steering"
        if self._lease is not None:
            self._failures = self._services.counters.of_slot(self._lease.slot)
        name = uuid.uuid4().hex
        with vllm_errors(self._services.counters):
            async with self._ended_by_budget(name), aclosing(self._generate(name)) as responses:
                yield responses

    def _accept(self, completion: CompletionOutput) -> NewText:
        """Adds vLLM's new tokens to the output; returns their text and how many of them belong to it."""
        chosen, reason = completion.token_ids, completion.finish_reason
        if reason == "error" and self._prepared.options.structured_outputs is not None:
            chosen = chosen[:-1]  # the last one is not one that the constraint allows
        if self._prepared.options.is_rows_only:
            new = NewText("", 0)
            self.output.has_prompt_rows = bool(chosen)  # vLLM always generates one
        else:
            new = self._text.add(chosen, is_over=reason is not None, ends_with_stop=reason == "stop")
            check_allowed(chosen[: new.token_count], self._allowed)
        self.output.token_ids.extend(chosen[: new.token_count])
        self._last = completion if reason is not None or self._text.stop is not None else None
        return new

    async def _logprobs_of_prompt(self, entries: Sequence[Mapping[int, Logprob] | None]) -> PromptLogprobs:
        token_ids, top = self._prepared.prompt.token_ids, self._prepared.options.prompt_logprobs
        return await prompt_logprobs(token_ids, entries, top, self._services.texts)

    @asynccontextmanager
    async def _ended_by_budget(self, name: str) -> AsyncIterator[None]:
        """Aborts the vLLM request when the time budget is over; vLLM then yields its last output."""
        if not self._prepared.budget.is_limited:
            yield
            return
        aborting = asyncio.ensure_future(self._abort_when_over(name))
        try:
            yield
        finally:
            aborting.cancel()
            await asyncio.gather(aborting, return_exceptions=True)

    async def _abort_when_over(self, name: str) -> None:
        while True:
            await asyncio.sleep(self._prepared.budget.left_s or ABORT_AGAIN_S)
            self._is_over_budget = True
            await self._services.llm.abort(name)

    def _generate(self, name: str) -> AsyncGenerator[RequestOutput, None]:
        prepared, region = self._prepared, self.rows.region
        prompt = {
            "prompt_token_ids": list(prepared.prompt.token_ids),
            "cache_salt": cache_salt(prepared, self._lease, self._services.epochs),
        }
        request = worker_request(prepared, self._name, region, self._lease) if region is not None else None
        params = vllm_params(
            prepared.options,
            self._index,
            extra_args=request.to_extra_args() if request is not None else None,
            skip_cached=prepared.rows.reusable == 0,
            stream_interval=vllm_interval(prepared),
        )
        adapter = self._services.adapters.get(prepared.request.model)
        priority = prepared.request.priority or 0
        return self._services.llm.generate(
            prompt,  # type: ignore[arg-type]
            params,
            name,
            lora_request=adapter,
            priority=priority,
            trace_headers=dict(prepared.request.trace_headers) or None,
        )

    async def _fetch_rows(self, remote: RemoteRegions) -> None:
        """Fetches a region that is in a worker's own memory, as far as it is needed now."""
        if self.rows.region is not None:
            is_wanted = self._last is not None or self.output.is_live
            await remote.fetch(self.rows.region, self.output.row_count if is_wanted else 0)

    def _check_rows(self, *, again: bool = False) -> None:
        """Checks that no worker has a fault and that the output's rows are finite; see `RegionRows.check_finite`."""
        self._services.counters.check_faults()
        if self._lease is not None:
            prefix_failed = self._services.counters.of_slot(self._lease.slot) != self._failures
            self.rows.check_finite(self.output.row_count, prefix_failed=prefix_failed, again=again)


def vllm_interval(prepared: PreparedRequest) -> int:
    """Tokens that vLLM may keep back until they are handed out together, at most MOST_KEPT_BACK.

    Each token is needed at once where a stop string may end the output, or where rows are sent as they are captured.
    """
    interval, capture = prepared.request.stream_interval, prepared.capture
    needs_each = prepared.options.stop or (capture is not None and capture.is_live)
    if interval is None or needs_each or not HAS_STREAM_INTERVAL:
        return 1
    return min(interval or MOST_KEPT_BACK, MOST_KEPT_BACK)
