"""The engine: a Backend on vLLM's AsyncLLM, with steering and capture per request.

An engine belongs to the event loop in which `start` was awaited.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.collective_rpc`, which runs between two steps and in the order of calls.
tests/engine/test_seams.py notices a change.
"""

import asyncio
import sys
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Self

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.backend import ModelInfo
from steer_service.core.checks import check_priority
from steer_service.core.errors import InvalidRequest, closed_error
from steer_service.core.events import Event
from steer_service.core.json_fields import JsonObject
from steer_service.core.prompt_tokens import DetokenizeRequest, PromptTokens, RenderRequest
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import SteeringSpec
from steer_service.core.start_proof import StartProof
from steer_service.core.usage import BackendUsage
from steer_service.engine.config import (
    SteeringConfig,
    engine_args_for,
    segment_pool,
    sends_labels,
)
from steer_service.engine.constraints import ConstraintChecks, vocabulary_of
from steer_service.engine.engine_request import EngineRequest, EngineServices, vllm_interval
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.generation_config import ARGUMENT as GENERATION_CONFIG
from steer_service.engine.generation_config import sampling_defaults
from steer_service.engine.handshake import shake_hands
from steer_service.engine.hang_watch import end_when_hung
from steer_service.engine.lora import adapters_from, load_adapters, slots_for
from steer_service.engine.mark_memory import MarkMemory, mark_memory_bytes
from steer_service.engine.prefix_cache import ProgramEpochs
from steer_service.engine.processes import EngineProcesses
from steer_service.engine.region_pool import RegionPool
from steer_service.engine.slots import ProgramLease, ProgramLoad, SlotAllocator
from steer_service.engine.start import model_info, names_of, shut_down, start_llm
from steer_service.engine.vllm_errors import vllm_errors
from steer_service.engine.worker_faults import unless_dead, watch_for_end
from steer_service.ops.program import Program, compile_program
from steer_service.runtime.calls import SteeringCalls
from steer_service.runtime.chat_defaults import NO_DEFAULTS, ChatDefaults
from steer_service.runtime.merge import after_first, merge, started_early
from steer_service.runtime.output_events import completed, started
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompt_reader import PromptReader
from steer_service.runtime.prompt_renderer import PromptRenderer
from steer_service.runtime.spaced_deltas import spaced
from steer_service.runtime.token_texts import TokenizerTexts
from steer_service.runtime.worker_threads import WorkerThreads
from steer_service.shm.limits import raise_open_files_limit
from steer_service.shm.pool import SegmentPool


class VLLMEngine(SteeringCalls):
    """Serves requests on vLLM in this process's event loop; see `core.backend.Backend`."""

    def __init__(
        self,
        llm: AsyncLLM,
        processes: EngineProcesses,
        config: SteeringConfig,
        adapters: Mapping[str, LoRARequest],
        segments: SegmentPool | None = None,
        aliases: tuple[str, ...] = (),
        generation_config: str | None = None,
        chats: ChatDefaults = NO_DEFAULTS,
        max_model_len: int | None = None,
    ) -> None:
        """`segments`: see `start`. `aliases`: further names of the model. `generation_config`: as it was given.

        `max_model_len`: the limit of tokens that the user asked for.
        """
        parallel = llm.vllm_config.parallel_config
        workers = parallel.world_size * parallel.data_parallel_size
        tokenizer = llm.renderer.get_tokenizer()
        info = model_info(llm, config, tuple(adapters), aliases, max_model_len)
        info = replace(info, has_chat_template=chats.has_chats(tokenizer))
        self._defaults = sampling_defaults(llm.model_config, generation_config, info)
        self._owns_segments = segments is None
        self._processes = processes
        self._hang_watch: asyncio.Task[None] | None = None
        marks = mark_memory_bytes(
            parallel.pipeline_parallel_size * info.max_model_len,
            llm.vllm_config.scheduler_config.max_num_seqs * parallel.data_parallel_size,
            config.segments.total_bytes(),
        )
        self._workers = workers
        counters = FailureCounters.create(config.segments, workers, config.slots)
        self._services = EngineServices(
            llm=llm,
            info=info,
            adapters=adapters,
            texts=TokenizerTexts(tokenizer),
            slots=SlotAllocator(config.bank_size(info.hidden_size), self._load_programs),
            regions=RegionPool(
                segments or segment_pool(config.segments),
                MarkMemory(config.segments.create(marks), self._fence),
                info,
                parallel.pipeline_parallel_size,
            ),
            counters=counters,
            epochs=ProgramEpochs(counters),
            fence=self._fence,
            sends_labels=sends_labels(),
            summaries=WorkerThreads("summaries", threads=1, max_waiting=sys.maxsize),
        )
        self._prompts = PromptRenderer(tokenizer, info, chats)
        self._reader = PromptReader(tokenizer, info, chats)
        self._constraints = ConstraintChecks(
            partial(vocabulary_of, llm.vllm_config, tokenizer),
            cpu_s=config.constraint_seconds,
            any_whitespace=not llm.vllm_config.structured_outputs_config.disable_any_whitespace,
        )
        self._start_proof: StartProof | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # see `start`

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        lora_modules: Mapping[str, str] | None = None,
        segments: SegmentPool | None = None,
        chat_template: str | None = None,
        default_chat_template_kwargs: JsonObject | None = None,
        **engine_arguments: Any,
    ) -> Self:
        """Loads `model` without blocking the event loop; takes 20-50 s.

        `engine_arguments`: vLLM's, and this project's (`steer_…`).
        `lora_modules`: name -> folder of each LoRA adapter, which a request chooses as its `model`. The process's limit
        of open files is raised as far as the system allows, since each mapped segment may keep a file open.
        `segments`: memory for captures that stays when the engine is closed. Default: its own, which `close` releases.
        `chat_template`: name of a file or a template's text, in place of the tokenizer's own template;
        `default_chat_template_kwargs`: its arguments where a chat does not give them.

        Raises InvalidRequest for an unknown argument; Unsupported for an argument that cannot be honoured, or a model
        whose layers are not known; EngineFailed if vLLM does not start.
        """
        raise_open_files_limit()
        chats = ChatDefaults.of(chat_template, default_chat_template_kwargs)
        arguments = engine_args_for(model, engine_arguments)
        names = names_of(arguments.served_model_name or model)
        adapters = adapters_from(lora_modules or {}, names, is_enabled=bool(arguments.enable_lora))
        arguments.max_loras = slots_for(adapters, arguments.max_loras)
        llm, processes = await start_llm(arguments)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(shut_down, llm, processes)
            engine = cls(
                llm,
                processes,
                SteeringConfig.from_vllm(llm.vllm_config),
                adapters,
                segments,
                names[1:],
                engine_arguments.get(GENERATION_CONFIG),
                chats,
                arguments.max_model_len,
            )
            undo.callback(engine._unmap)
            pool = engine._services.regions.segments
            pool.kept_free = partial(processes.unwritten_bytes, pool.directory.path)
            services = engine._services
            marks = services.regions.marks.segment
            workers = await unless_dead(llm, shake_hands(llm, services.counters, marks, engine._workers, services.info))
            services.regions.remote, services.regions.lags = workers.remote, workers.lags
            engine._start_proof = workers.proof
            await unless_dead(llm, load_adapters(llm, adapters))
            engine._ending = asyncio.ensure_future(watch_for_end(llm, services.counters, processes))
            undo.pop_all()
            return engine

    @property
    def info(self) -> ModelInfo:
        """Facts about the model."""
        return self._services.info

    @property
    def is_alive(self) -> bool:
        """False once one of vLLM's processes has died or a worker is out of order; a new engine is then needed."""
        return not (self._services.llm.errored or self._services.counters.has_faults or self._ending.done())

    @property
    def requests_at_once(self) -> int:
        """Sequences in one step of vLLM, of all data-parallel replicas together."""
        config = self._services.llm.vllm_config
        return config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size

    @property
    def has_priority(self) -> bool:
        """True if the engine was started with the scheduling policy `priority`."""
        return bool(self._services.llm.vllm_config.scheduler_config.policy == "priority")

    @property
    def start_proof(self) -> StartProof | None:
        """What its workers proved about themselves when they started."""
        return self._start_proof

    @property
    def usage(self) -> BackendUsage:
        """How much of its limits it uses now; may be read in any thread."""
        regions = self._services.regions
        return BackendUsage(
            bank=self._services.slots.usage(),
            memory={"captures": regions.segments.usage(), "marks": regions.marks.usage()},
            segments=regions.segments.segment_count,
        )

    @property
    def has_structured_outputs(self) -> bool:
        """True: vLLM has them."""
        return True

    def watch(self, step_timeout_s: float = 0.0) -> None:
        """Kills vLLM's processes as soon as they hang: `is_alive` is then False. For servers.

        `step_timeout_s`: see `hang_detector.HangDetector`.
        """
        watching = end_when_hung(self._services.llm, self._processes, step_timeout_s)
        self._hang_watch = asyncio.ensure_future(watching)

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Runs one request and yields its events; see `core.backend.Backend.submit`."""
        if self._closing is not None:
            raise closed_error("the engine")
        self._services.counters.check_faults()
        check_priority(request, has_priority=self.has_priority)
        prepared = await prepare(request, self.info, self._prompts.render, self._defaults)
        self._prompts.bad_words(prepared.options)
        await self._check_constraint(prepared)
        self._services.regions.check(prepared)
        request_id = request.request_id or uuid.uuid4().hex
        async with AsyncExitStack() as stack:
            if prepared.options.structured_outputs is not None:
                stack.enter_context(self._constraints.kept(prepared.options.structured_outputs))
            # The slot comes first: a request that waits for one holds no memory, and no memory is waited for.
            async with AsyncExitStack() as waiting:
                lease = await self._lease(prepared, waiting)
                outputs = await self._reserve(prepared, request_id, lease, stack)
            sources = [output.events() for output in outputs]
            if prepared.options.prompt_logprobs is not None:
                sources = after_first(sources)  # the first output has the log-probabilities of the prompt
            wanted = request.stream_interval
            interval = None if wanted == vllm_interval(prepared) else wanted  # vLLM does it alone, or we do
            merged = spaced(sources[0] if len(sources) == 1 else merge(sources), interval)
            events = await stack.enter_async_context(started_early(merged))  # vLLM begins before `Started` is read
            yield started(prepared, request_id)
            with self._slow_constraint_refused(prepared):
                async for event in events:
                    yield event
        yield completed(prepared, [one.output for one in outputs], cached_tokens=outputs[0].rows.cached_tokens)

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        """The tokens of a prompt; see `core.backend.Backend.tokens_of`."""
        return await self._reader.tokens_of(request)

    async def text_of(self, request: DetokenizeRequest) -> str:
        """The text of tokens; see `core.backend.Backend.text_of`."""
        return await self._reader.text_of(request)

    async def close(self) -> None:
        """Stops vLLM and its processes; requests in flight fail with EngineFailed."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._ending.cancel()
        self._constraints.close()
        if self._services.counters.has_faults:  # a worker that waits for the one with the fault cannot end in order
            self._processes.kill()
        if self._hang_watch is not None:
            self._hang_watch.cancel()
        await shut_down(self._services.llm, self._processes)
        self._unmap()
        if self._owns_segments:
            self._services.regions.segments.close()

    def _unmap(self) -> None:
        """Unmaps the memory that the workers shared, which would stay until the garbage collector runs."""
        self._services.regions.marks.close()
        self._services.counters.close()

    async def _check_constraint(self, prepared: PreparedRequest) -> None:
        """Raises for structured outputs that vLLM may not have, unless the time budget ends before that is known."""
        if prepared.options.structured_outputs is not None:
            with suppress(TimeoutError):  # nothing runs then
                async with prepared.budget.timeout():
                    await self._constraints.check(prepared.options.structured_outputs, prepared.request.client_id)

    @contextmanager
    def _slow_constraint_refused(self, prepared: PreparedRequest) -> Iterator[None]:
        """Within the block, the error of a constraint that became slow refuses the next request that has it."""
        try:
            yield
        except InvalidRequest as error:
            if error.reason == "CONSTRAINT_TOO_COMPLEX" and prepared.options.structured_outputs is not None:
                self._constraints.refuse(prepared.options.structured_outputs)
            raise

    async def _lease(self, prepared: PreparedRequest, stack: AsyncExitStack) -> ProgramLease | None:
        """The slot of the request's program; None without a program, or if the time budget ends before there is one."""
        if prepared.steering is None:
            return None
        try:
            async with prepared.budget.timeout():
                lease = self._services.slots.lease(self._program(prepared.steering))
                return await stack.enter_async_context(lease)
        except TimeoutError:
            return None

    async def _reserve(
        self, prepared: PreparedRequest, request_id: str, lease: ProgramLease | None, stack: AsyncExitStack
    ) -> list[EngineRequest]:
        """Reserves a region for each output of a request and shares the lease with it; `stack` frees them."""
        # Without a lease, as the time budget ended first, no row runs; the receipt still names the program's layers.
        program = self._program(prepared.steering) if prepared.steering is not None else None
        return [
            EngineRequest(
                self._services,
                prepared,
                index,
                name=f"{request_id}/{index}",
                lease=lease,
                hold=stack.enter_context(lease.share() if lease is not None else ExitStack()),
                rows=await stack.enter_async_context(self._services.regions.reserve(prepared, program)),
            )
            for index in prepared.outputs
        ]

    def _program(self, steering: SteeringSpec) -> Program:
        return self._services.slots.find(steering.program_digest()) or compile_program(steering)

    async def _fence(self) -> None:
        await self._call_workers("fence")

    async def _load_programs(self, loads: Sequence[ProgramLoad]) -> None:
        try:
            changes = [(load.slot, load.digest, load.data) for load in loads]
            for worker, failures in filter(None, await self._call_workers("load_programs", changes)):
                self._services.counters.counts_RS[worker] = failures
        finally:
            self._services.epochs.record(loads)

    async def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every worker; returns the replies of the first replica.

        Raises EngineFailed as soon as the engine cannot go on.
        """
        calling = asyncio.ensure_future(self._services.llm.collective_rpc(method, args=args))
        try:
            await asyncio.wait({calling, self._ending}, return_when=asyncio.FIRST_COMPLETED)
            with vllm_errors(self._services.counters):
                if not calling.done():
                    raise EngineDeadError
                return await calling
        finally:
            calling.cancel()
