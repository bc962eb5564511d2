"""The engine: vLLM's AsyncLLM behind the Backend protocol, with steering and capture per request.

One event loop owns it: the loop in which `start` was awaited.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.generate`, which aborts the request when its generator is closed;
`AsyncLLM.collective_rpc`, which runs between two steps and in the order of calls; `AsyncLLM.output_handler`, the task
that reads outputs; `cache_salt` of a prompt and `SamplingParams.skip_reading_prefix_cache`. tests/engine/test_seams.py
notices a change.
"""

import asyncio
import itertools
import multiprocessing
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureDelivery, RowLabels
from steer_service.core.errors import EngineFailed, InvalidRequest, Overloaded, SteerError, Unsupported
from steer_service.core.events import (
    CaptureBlock,
    CaptureHeld,
    CaptureLabels,
    Completed,
    Event,
    FinishReason,
    OutputFinished,
    Receipt,
    Started,
    TokenDelta,
    TokenLogprob,
    Usage,
)
from steer_service.core.positions import Spans, between, clipped, count_rows, positions_of
from steer_service.core.prompt import ChatPrompt, Prompt, TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.core.stored_capture import CaptureMetadata
from steer_service.engine.config import (
    SteeringConfig,
    client_memory_budget,
    engine_args_for,
    sends_labels,
    shared_memory_budget,
)
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.lora import LORA_MODULES, adapters_from, slots_for
from steer_service.engine.messages import WorkerReport, WorkerRequest
from steer_service.engine.region import CAPTURED, COMPUTED, REUSED, STEERED, Region, RegionLayout
from steer_service.engine.remote_workers import RegionSnapshot, apply_snapshot
from steer_service.engine.sampling import vllm_params
from steer_service.engine.slots import ProgramLease, ProgramLoad, SlotAllocator
from steer_service.engine.start_log import StartLog
from steer_service.engine.vllm_patches.compat import OVERLOADED, REFUSED
from steer_service.ops.plan import NO_SLOT
from steer_service.ops.program import Program, compile_program
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.local_capture import LocalCapture
from steer_service.runtime.merge import merge, started_early
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt, render_prompt
from steer_service.shm.limits import raise_open_files_limit
from steer_service.shm.pool import RETRY_AFTER_S, SegmentPool
from steer_service.shm.segments import Segment

LONG_TEXT = 20_000
"""Characters above which tokenisation leaves the event loop."""

LONG_CHAT = 16
"""Messages above which rendering leaves the event loop."""

LARGE_SEGMENT = 16 << 20
"""Bytes above which making a segment leaves the event loop: the system fills it with zeros at some GB/s."""

CANCEL_POLL_S = 0.1
"""How often a cancelled start looks for processes to end."""

SHUTDOWN_TIMEOUT_S = 30.0
"""How long vLLM's processes may take to end; after its own 5 s they are killed and leave segments behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job(PreparedRequest):
    """One prepared request: what its outputs share."""

    request_id: str
    program: Program | None
    """What its steered positions go through."""


@dataclass(slots=True, kw_only=True)
class OutputState:
    """What one output has come to so far."""

    token_ids: list[int] = field(default_factory=list)
    """Generated so far."""
    cached: int = 0
    checked: int = 0
    finish: CompletionOutput | None = field(default=None)
    sent: int = 0
    """Rows whose captures have been sent while the output was under way."""
    is_held: bool = False
    """Its region belongs to whoever took its CaptureHeld."""


class VLLMEngine(SteeringCalls):
    """Serves requests on vLLM in this process's event loop; see `core.backend.Backend`."""

    def __init__(self, llm: AsyncLLM, config: SteeringConfig, adapters: Mapping[str, LoRARequest]) -> None:
        self._llm = llm
        self._adapters = adapters
        self._pool = SegmentPool(shared_memory_budget(), config.segments, client_memory_budget())
        self._info = _model_info(llm, config, tuple(adapters))
        self._tokenizer = llm.renderer.get_tokenizer()
        self._slots = SlotAllocator(config.bank_size(self._info.hidden_size), self._load_programs)
        parallel = llm.vllm_config.parallel_config
        self._stages = parallel.pipeline_parallel_size
        self._workers = parallel.world_size * parallel.data_parallel_size
        self._failure_counters = FailureCounters.create(config.segments, self._workers, config.slots)
        self._workers_are_remote = False
        self._freeing: set[asyncio.Task[None]] = set()
        self._sends_labels = sends_labels()
        self._closed = False

    @classmethod
    async def start(cls, model: str, *, lora_modules: Mapping[str, str] | None = None, **engine_arguments: Any) -> Self:
        """Loads `model` with vLLM's engine arguments and ours (`steer_…`), without blocking the loop; 20-50 s.

        `lora_modules`: name -> folder of each LoRA adapter, which a request chooses as its `model`. The limit of open
        files of this process becomes what the system allows, for what it and its workers map may keep as many open.

        Raises InvalidRequest for an unknown argument, Unsupported for one that cannot be honoured or a model whose
        layers are not known, EngineFailed if vLLM does not come up.
        """
        raise_open_files_limit()
        arguments = engine_args_for(model, engine_arguments)
        served = arguments.served_model_name or model
        base = served if isinstance(served, str) else served[0]
        adapters = adapters_from(lora_modules or {}, base, is_enabled=bool(arguments.enable_lora))
        arguments.max_loras = slots_for(adapters, arguments.max_loras)
        llm = await _start_llm(arguments)
        try:
            engine = cls(llm, SteeringConfig.from_vllm(llm.vllm_config), adapters)
            await engine._handshake()
            await engine._load_adapters()
            return engine
        except BaseException:
            await asyncio.to_thread(llm.shutdown, SHUTDOWN_TIMEOUT_S)
            raise

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._info

    @property
    def is_alive(self) -> bool:
        """False once one of vLLM's processes has died."""
        return not self._llm.errored

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answers one request with events; see `core.backend.Backend.submit`."""
        job = await self._admit(request)
        indices = range(job.options.n or 1)
        states = [OutputState() for _ in indices]
        async with AsyncExitStack() as stack:
            regions = [await stack.enter_async_context(self._region(job, state)) for state in states]
            outputs = [self._output(job, i, regions[i], states[i]) for i in indices]
            events = await stack.enter_async_context(started_early(outputs[0] if len(outputs) == 1 else merge(outputs)))
            yield Started(
                request_id=job.request_id,
                prompt_token_ids=job.prompt.token_ids,
                sampling=job.options,
                message_boundaries=job.prompt.message_boundaries,
                capture_delivery=job.delivery,
            )
            async for event in events:
                yield event
        yield Completed(
            usage=Usage(
                prompt_tokens=len(job.prompt.token_ids),
                completion_tokens=sum(len(state.token_ids) for state in states),
                cached_tokens=states[0].cached,
            )
        )

    async def close(self) -> None:
        """Stops vLLM and its processes; requests still running fail with EngineFailed."""
        if not self._closed:
            self._closed = True
            # An idle reader of outputs would log the end of the engine core, which is wanted now, as a failure.
            if self._llm.output_handler is not None and not self._llm.output_processor.has_unfinished_requests():
                self._llm.output_handler.cancel()
            await asyncio.to_thread(self._llm.shutdown, SHUTDOWN_TIMEOUT_S)
            self._pool.close()

    async def _admit(self, request: GenerateRequest) -> _Job:
        if self._closed:
            raise EngineFailed("the engine is closed", reason="CLOSED")
        prepared = await prepare(request, self._info, self._render)
        return _Job(
            request=request,
            request_id=request.request_id or uuid.uuid4().hex,
            prompt=prepared.prompt,
            options=prepared.options,
            program=self._program(prepared.steering) if prepared.steering is not None else None,
            steered=prepared.steered,
            captured=prepared.captured,
        )

    def _program(self, steering: SteeringSpec) -> Program:
        return self._slots.find(steering.program_digest()) or compile_program(steering)

    async def _render(self, request: GenerateRequest) -> RenderedPrompt:
        render = partial(render_prompt, request.prompt, self._tokenizer, with_boundaries=request.capture is not None)
        return await asyncio.to_thread(render) if _is_long(request.prompt) else render()

    @asynccontextmanager
    async def _region(self, job: _Job, state: OutputState) -> AsyncIterator[Region | None]:
        """Shared memory for one output; None if there is nothing to mark or capture."""
        if job.program is None and job.capture is None:
            yield None
            return
        capture = job.capture
        layout = RegionLayout(
            stages=self._stages,
            rows=job.row_limit,
            sites=capture.site.parts if capture is not None else (),
            layers=capture.layers if capture is not None else (),
            captured=job.captured,
            hidden_size=self._info.hidden_size,
            dtype=(capture.dtype if capture is not None else None) or self._info.dtype,
        )
        segment = await self._acquire_segment(layout.size, job.request.client_id)
        try:
            yield Region(layout, segment)
        finally:
            if not state.is_held:
                self._pool.release(segment)
            if self._workers_are_remote:
                freeing = asyncio.ensure_future(self._free_region(segment.name))
                self._freeing.add(freeing)  # the loop itself holds tasks only weakly
                freeing.add_done_callback(self._freeing.discard)

    async def _acquire_segment(self, size: int, client_id: str) -> Segment:
        """A segment from the pool; a large one takes its time, but not the event loop's."""
        if size < LARGE_SEGMENT:
            return self._pool.acquire(size, client_id)
        creating = asyncio.ensure_future(asyncio.to_thread(self._pool.acquire, size, client_id))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            creating.add_done_callback(self._release_unwanted)
            raise

    def _release_unwanted(self, creating: "asyncio.Future[Segment]") -> None:
        if not creating.cancelled() and creating.exception() is None:
            self._pool.release(creating.result())

    @asynccontextmanager
    async def _lease(self, job: _Job, state: OutputState) -> AsyncIterator[ProgramLease | None]:
        if job.program is None:
            yield None
            return
        async with self._slots.lease(job.program) as lease:
            yield lease
            # A stop string is found here and not in vLLM's core, which may run the request for another step: its slot
            # must not change before the core has heard.
            if state.finish is not None and isinstance(state.finish.stop_reason, str):
                await self._fence()

    async def _fence(self) -> None:
        """Returns when the workers have heard everything that was sent before, and have ended the step they were in."""
        with _vllm_errors():
            await self._llm.collective_rpc("fence")

    async def _output(
        self, job: _Job, index: int, region: Region | None, state: OutputState
    ) -> AsyncGenerator[Event, None]:
        async with self._lease(job, state) as lease, aclosing(self._tokens(job, index, region, lease, state)) as tokens:
            async for delta in tokens:
                yield delta
                if job.capture is not None and job.capture.is_live:
                    for capture in self._live_captures(job, index, region, state):
                        yield capture
        if job.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED:
            await self._fence()  # a worker that still writes to a segment would die with a client that truncates it
        for event in self._finish(job, index, region, state):  # a slow reader of captures holds no slot
            yield event

    async def _tokens(
        self, job: _Job, index: int, region: Region | None, lease: ProgramLease | None, state: OutputState
    ) -> AsyncGenerator[Event, None]:
        """Runs one output on vLLM; raises InvalidRequest as soon as a row of it is not finite."""
        failures = self._failure_counters.of_slot(lease.slot) if lease is not None else 0
        prompt = {"prompt_token_ids": list(job.prompt.token_ids), "cache_salt": self._salt(job, lease)}
        with _vllm_errors():
            params = vllm_params(
                job.options,
                index,
                extra_args=_worker_request(job, index, region, lease).to_extra_args() if region is not None else None,
                skip_cached=_reusable_rows(job) == 0,
            )
            adapter = self._adapters.get(job.request.model)
            generating = self._llm.generate(prompt, params, uuid.uuid4().hex, lora_request=adapter)  # type: ignore[arg-type]
            async with aclosing(generating) as answers:
                async for answer in answers:
                    completion = answer.outputs[0]
                    state.token_ids.extend(completion.token_ids)
                    state.cached = answer.num_cached_tokens or 0
                    state.finish = completion if completion.finish_reason is not None else None
                    if self._workers_are_remote and region is not None:
                        await self._fetch_region(job, region, state)
                    if lease is not None:
                        self._check_finite(job, region, lease, failures, state)
                    if completion.token_ids or completion.text:
                        yield _token_delta(index, completion, job.options.logprobs)

    async def _fetch_region(self, job: _Job, region: Region, state: OutputState) -> None:
        """Fetches what workers that do not see the region have of it: marks, and rows as soon as they are sent."""
        is_wanted = job.capture is not None and (job.capture.is_live or state.finish is not None)
        rows = len(job.prompt.token_ids) + len(state.token_ids) - 1 if is_wanted else 0
        for snapshot in await self._llm.collective_rpc("fetch_region", args=(region.name, rows)):
            if snapshot is not None:
                apply_snapshot(RegionSnapshot.from_rpc(snapshot), region, self._failure_counters)

    async def _free_region(self, segment: str) -> None:
        with suppress(Exception):  # what is lost with an engine that died need not be dropped
            await self._llm.collective_rpc("free_region", args=(segment,))

    def _salt(self, job: _Job, lease: ProgramLease | None) -> str | None:
        """Keys and values computed under steering are reused under the same steering only, and never if it failed."""
        parts = []
        if lease is not None:
            where = ",".join(f"{first}-{end}" for first, end in job.steered)
            parts.append(f"steer:{lease.digest}:{where}:{self._failure_counters.total()}")
        parts += [f"user:{job.request.cache_salt}"] if job.request.cache_salt else []
        return "/".join(parts) or None

    def _check_finite(
        self, job: _Job, region: Region | None, lease: ProgramLease, failures: int, state: OutputState
    ) -> None:
        """`failures`: what the failure counters said of the slot before this output's salt was made."""
        assert region is not None
        done = len(job.prompt.token_ids) + len(state.token_ids) - 1
        position = region.first_non_finite(state.checked, done)
        state.checked = done
        if position is not None:
            raise _non_finite(f"the stream was not finite under steering at position {position}")
        if self._failure_counters.of_slot(lease.slot) != failures and region.count(REUSED, done):
            raise _non_finite("a prefix shared with another request under the same steering was not finite")

    def _finish(self, job: _Job, index: int, region: Region | None, state: OutputState) -> Iterator[Event]:
        if state.finish is None or state.finish.finish_reason not in ("stop", "length"):
            raise EngineFailed("the engine ended the request before it was complete", reason="ABORTED")
        receipt = _receipt(job, region, state)
        if job.capture is not None:
            assert region is not None
            if job.delivery is CaptureDelivery.INLINE:
                yield from self._captures(job, index, region, state, receipt.rows_total)
            else:
                yield from self._held(job, index, region, state, receipt)
        yield OutputFinished(
            output_index=index,
            reason=FinishReason(state.finish.finish_reason),
            stop=state.finish.stop_reason,
            receipt=receipt,
        )

    def _live_captures(
        self, job: _Job, index: int, region: Region | None, state: OutputState
    ) -> Iterator[CaptureLabels | CaptureBlock]:
        """The captured rows that were computed since the last call; raises EngineFailed if one was not captured."""
        assert region is not None
        rows = len(job.prompt.token_ids) + len(state.token_ids) - 1
        spans = between(job.captured, state.sent, rows)
        if spans:
            if not region.has(CAPTURED)[positions_of(spans)].all():
                raise EngineFailed("a row was not captured by the time its token came", reason="CAPTURE_INCOMPLETE")
            yield from self._captures(job, index, region, state, rows)

    def _captures(
        self, job: _Job, index: int, region: Region, state: OutputState, rows: int
    ) -> Iterator[CaptureLabels | CaptureBlock]:
        """What was captured of the first `rows` rows and not sent; blocks without rows if there was never anything."""
        sent, state.sent = state.sent, rows
        spans = between(job.captured, sent, rows)
        if sent and not spans:
            return
        if self._sends_labels:
            yield CaptureLabels(output_index=index, labels=_labels(job, region, state, spans))
        first, end = (count_rows(job.captured, position) for position in (sent, rows))
        for layer, site in itertools.product(region.layout.layers, region.layout.sites):
            hidden_TD = region.rows(site, layer)[first:end]
            yield CaptureBlock(output_index=index, layer=layer, site=site, spans=spans, hidden=hidden_TD)

    def _held(
        self, job: _Job, index: int, region: Region, state: OutputState, receipt: Receipt
    ) -> Iterator[CaptureLabels | CaptureHeld]:
        spans = clipped(job.captured, receipt.rows_total)
        if self._sends_labels:
            yield CaptureLabels(output_index=index, labels=_labels(job, region, state, spans))
        held = LocalCapture(
            CaptureMetadata(
                layers=region.layout.layers,
                sites=region.layout.sites,
                spans=spans,
                dtype=region.layout.dtype,
                hidden_size=region.layout.hidden_size,
                prompt_tokens=len(job.prompt.token_ids),
                sequence_rows=receipt.rows_total,
            ),
            region.captured(spans),
            release=partial(self._pool.release, region.segment),
            segment=region.place,
        )
        state.is_held = True
        yield CaptureHeld(output_index=index, held=held)

    async def _load_programs(self, loads: Sequence[ProgramLoad]) -> None:
        with _vllm_errors():
            await self._llm.collective_rpc(
                "load_programs", args=([(load.slot, load.digest, load.data) for load in loads],)
            )

    async def _load_adapters(self) -> None:
        """Loads each adapter once, so that a bad one is refused now and not in a request."""
        for name, adapter in self._adapters.items():
            try:
                await self._llm.add_lora(adapter)
            except EngineDeadError:
                raise EngineFailed("the engine died while it loaded adapters", reason="ENGINE_DIED") from None
            except Exception as error:  # vLLM's RPC raises plain Exception
                raise InvalidRequest(
                    f"vLLM does not load {name!r}: {error}", reason="BAD_ARGUMENT", field=LORA_MODULES
                ) from error

    async def _handshake(self) -> None:
        """Gives the workers the failure counters; checks that every layer has a hook and all agree on the model."""
        try:
            with _vllm_errors():
                replies = await self._llm.collective_rpc(
                    "steering_report", args=(self._failure_counters.name, self._workers)
                )
        finally:
            self._failure_counters.unlink()
        reports = [WorkerReport.from_rpc(reply) for reply in replies]
        for report in reports:
            if report.refusal:
                raise Unsupported(report.refusal, reason=report.refusal_reason)
        hooked = {layer for report in reports for layer in report.layers}
        if hooked != set(range(self._info.layer_count)):
            raise EngineFailed(f"hooks on layers {sorted(hooked)} of {self._info.layer_count}", reason="TAPS_MISSING")
        for report in reports:
            if (report.hidden_size, report.dtype) != (self._info.hidden_size, self._info.dtype):
                raise EngineFailed(
                    f"a worker has a {report.dtype} stream of {report.hidden_size}, expected {self._info.dtype} "
                    f"of {self._info.hidden_size}",
                    reason="WORKER_DIFFERS",
                )
        self._workers_are_remote = not all(report.sees_memory for report in reports)
        if self._workers_are_remote:
            self._check_remote()
            return
        replica = self._failure_counters.differing_replica([report.fingerprint for report in reports])
        if replica is not None:  # only the first one's workers have answered the call
            raise EngineFailed(f"the workers of replica {replica} differ from replica 0's", reason="WORKER_DIFFERS")

    def _check_remote(self) -> None:
        """Raises Unsupported for what is not done where workers do not see this process's memory."""
        if self._llm.vllm_config.parallel_config.data_parallel_size > 1:
            raise Unsupported(
                "replicas are refused where workers do not see the server's memory: an RPC reaches the first only",
                reason="ARGUMENT_REFUSED",
                field="data_parallel_size",
            )


async def _start_llm(arguments: AsyncEngineArgs) -> AsyncLLM:
    """Loads the model in a thread; when cancelled, ends the processes started so far and waits for the thread."""
    before = set(multiprocessing.active_children())
    loading = asyncio.ensure_future(asyncio.to_thread(_load, arguments))
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        while not loading.done():
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()  # vLLM notices that its engine core died and gives up
            await asyncio.wait([loading], timeout=CANCEL_POLL_S)
        if loading.exception() is None:
            await asyncio.to_thread(loading.result().shutdown, SHUTDOWN_TIMEOUT_S)
        raise


def _load(arguments: AsyncEngineArgs) -> AsyncLLM:
    log = StartLog()
    try:
        with log:
            return AsyncLLM.from_engine_args(arguments)
    except SteerError:
        raise
    except Exception as error:  # vLLM raises whatever it meets, and hides what its processes met
        raise EngineFailed(f"vLLM did not start: {log.cause_of(error)}", reason="START_FAILED") from error


def _model_info(llm: AsyncLLM, config: SteeringConfig, adapters: tuple[str, ...]) -> ModelInfo:
    model = llm.model_config
    names = model.served_model_name
    size = config.bank_size(model.get_hidden_size())
    return ModelInfo(
        name=names if isinstance(names, str) else names[0],
        adapters=adapters,
        architecture=model.architecture,
        layer_count=model.get_total_num_hidden_layers(),
        hidden_size=model.get_hidden_size(),
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        dtype=str(model.dtype).removeprefix("torch."),
        max_programs=size.slots,
        max_operations=size.rows,
        max_operations_per_layer=size.operations_per_layer,
    )


def _is_long(prompt: Prompt) -> bool:
    """True if rendering may take longer than the event loop should wait."""
    match prompt:
        case TextPrompt():
            return len(prompt.text) > LONG_TEXT
        case ChatPrompt():
            return len(prompt.messages) > LONG_CHAT or sum(len(m.content) for m in prompt.messages) > LONG_TEXT
    return False


def _reusable_rows(job: _Job) -> int:
    """Rows that may come from the prefix cache: all before the first captured one."""
    return job.captured[0][0] if job.captured else job.row_limit


def _worker_request(job: _Job, index: int, region: Region, lease: ProgramLease | None) -> WorkerRequest:
    layout = region.layout
    return WorkerRequest(
        output=f"{job.request_id}/{index}",
        slot=lease.slot if lease is not None else NO_SLOT,
        digest=lease.digest if lease is not None else "",
        steered=job.steered,
        segment=region.name,
        stages=layout.stages,
        rows=layout.rows,
        sites=layout.sites,
        layers=layout.layers,
        captured=layout.captured,
        dtype=layout.dtype,
        reusable_rows=_reusable_rows(job),
    )


def _labels(job: _Job, region: Region, state: OutputState, spans: Spans) -> RowLabels:
    prompt = job.prompt.token_ids
    return RowLabels.of(spans, [*prompt, *state.token_ids], len(prompt), region.has(STEERED))


def _token_delta(index: int, completion: CompletionOutput, top: int | None) -> TokenDelta:
    logprobs = tuple(
        TokenLogprob(
            token_id=token,
            logprob=entries[token].logprob,
            top=tuple(
                (other, entry.logprob)
                for other, entry in sorted(entries.items(), key=lambda item: item[1].rank or 0)
                if entry.rank is not None and entry.rank <= (top or 0)
            ),
        )
        for token, entries in zip(completion.token_ids, completion.logprobs or (), strict=False)
    )
    return TokenDelta(
        output_index=index, text=completion.text, token_ids=tuple(completion.token_ids), logprobs=logprobs
    )


def _receipt(job: _Job, region: Region | None, state: OutputState) -> Receipt:
    """What the workers marked; raises EngineFailed if it is less than what was asked."""
    rows = len(job.prompt.token_ids) + len(state.token_ids) - 1
    program, capture = job.program, job.capture
    captured = region.count(CAPTURED, rows) if region is not None and capture is not None else 0
    steered = region.count(STEERED, rows) if region is not None and program is not None else 0
    to_capture = count_rows(job.captured, rows)
    if captured != to_capture:
        raise EngineFailed(f"{captured} of {to_capture} rows were captured", reason="CAPTURE_INCOMPLETE")
    reused = state.cached
    if region is not None:
        is_reused = region.has(REUSED) & ~region.has(COMPUTED)
        reused = int(is_reused[:rows].sum())
        accounted = (region.has(STEERED) | is_reused)[positions_of(clipped(job.steered, rows))]
        if not accounted.all():
            raise EngineFailed(
                f"{accounted.sum()} of {len(accounted)} rows were steered or reused", reason="STEERING_INCOMPLETE"
            )
    return Receipt(
        steering_digest=job.steering.digest() if program is not None and job.steering is not None else "",
        steered_layers=tuple(program.layers) if program is not None else (),
        rows_steered=steered,
        captured_layers=capture.layers if capture is not None else (),
        rows_captured=captured,
        rows_from_prefix_cache=reused,
        rows_total=rows,
        bytes_reserved=region.segment.size if region is not None else 0,
        bytes_captured=region.layout.bytes_of(captured) if region is not None else 0,
    )


def _non_finite(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="STEERING_NONFINITE", field="steering")


@contextmanager
def _vllm_errors() -> Iterator[None]:
    """vLLM's errors as ours."""
    try:
        yield
    except SteerError:
        raise
    except EngineDeadError as error:
        raise EngineFailed("the engine died; what it was doing is lost", reason="ENGINE_DIED") from error
    except REFUSED as error:
        raise InvalidRequest(str(error), reason="REFUSED_BY_ENGINE") from error
    except OVERLOADED as error:
        raise Overloaded(str(error), retry_after_s=RETRY_AFTER_S) from error
    except Exception as error:  # vLLM's RPC raises plain Exception; texts may hold a prompt
        raise EngineFailed("the engine failed on this request") from error
