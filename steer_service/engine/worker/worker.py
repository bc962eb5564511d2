"""The worker: vLLM's own, plus what it takes to steer and capture the rows of each step.

Relies on (vLLM 0.24 to 0.33): `EngineArgs.worker_cls`; `Worker.load_model` before profiling; `Worker.execute_model`
once per step with a SchedulerOutput that has `scheduled_new_reqs[i].req_id`, `.sampling_params.extra_args`,
`finished_req_ids` and `preempted_req_ids`, before the blocks of these go to others; in it the runner's
`execute_model`, before the stream goes to the next pipeline stage. tests/engine/test_seams.py notices a change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.platforms import current_platform

from steer_service.core.capture import CaptureSite
from steer_service.core.errors import EngineFailed, SteerError, Unsupported
from steer_service.core.positions import EVERYWHERE, spans_of
from steer_service.engine.config import SteeringConfig
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport, WorkerRequest
from steer_service.engine.refusals import check_finished_config
from steer_service.engine.region import CAPTURED, COMPUTED, NON_FINITE, REUSED, STEERED, Region, RegionLayout
from steer_service.engine.remote_workers import RegionSnapshot, take_snapshot
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.vllm_patches.cpu_generator_fix import without_discarded_generators
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.batch_rows import watch_rows
from steer_service.engine.worker.hooks import HookContext, HookedForward, Hooks, install_hooks
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.engine.worker.in_flight_steps import InFlightStep, InFlightSteps
from steer_service.engine.worker.kv_zeroing import KVBlockZeroer
from steer_service.engine.worker.layer_outputs import decoder_layers, layer_output_of
from steer_service.engine.worker.self_test import HookedModel, run_self_test
from steer_service.engine.worker.trace import TracedRows, TraceFile
from steer_service.ops.plan import NO_SLOT, NOT_CAPTURED, PlannedRequest, Planner, RequestRows, StepPlan
from steer_service.shm.segments import private_segment

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class TrackedRequest:
    """A steered or captured request that this worker runs."""

    request: WorkerRequest
    planned: PlannedRequest
    region: Region | None


class WorkerState:
    """Everything one worker knows about steering: its bank, its requests, and the plan of the current step."""

    def __init__(self, worker: Any, make_hooks: Callable[[HookContext], Hooks]) -> None:
        config = SteeringConfig.from_vllm(worker.vllm_config)
        model_config = worker.model_config
        runner = worker.model_runner
        self.layer_count = model_config.get_total_num_hidden_layers()
        self.hidden_size = model_config.get_hidden_size()
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.attached = install_hooks(runner.model, unverified=config.unverified)
        self.bank = ProgramBank(config.bank_size(self.hidden_size), self.attached, self.layer_count, self.hidden_size)
        self._hooks = make_hooks(self._site(worker.vllm_config, runner.device))
        self.hooked = HookedModel(
            runner=runner,
            layers=self.attached,
            layer_output=layer_output_of(decoder_layers(runner.model)[self.attached[-1]], config.unverified),
            layer_count=self.layer_count,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            bank=self.bank,
            hooks=self._hooks,
        )
        self._segments = config.segments
        self._stage = get_pp_group().rank_in_group
        self._writes = get_tp_group().rank_in_group == 0  # the stream is the same on every tensor-parallel rank
        self._number = worker_number(worker)
        self._trace = TraceFile(config.trace, self._number) if config.trace else None
        self._failure_counters: FailureCounters | None = None
        self._kept_regions: dict[str, Region] | None = (
            None  # segment's name -> region kept here; None: the server's is seen
        )
        self._requests: dict[str, TrackedRequest] = {}
        self._ends: dict[str, int] = {}  # request -> position after the last row that was computed
        self._planner = Planner(check_layer=self.attached[-1])
        self._step: HookedForward | None = None
        self._batch: Sequence[RequestRows] = ()
        self._kv_zeroer = KVBlockZeroer(runner)
        self._in_flight = InFlightSteps(self._complete_later)
        # An earlier stage hands its stream to a later one, whose token might be seen first: it waits for its passes.
        self._completes_later = self._hooks.completes_later and get_pp_group().is_last_rank
        self._rows_to_zero: list[RequestRows] = []  # of steps that were completed late
        watch_rows(runner, self._plan_step)
        self._finish_each_step(runner)

    def _finish_each_step(self, runner: Any) -> None:
        """Marks rows before the worker passes the stream on: a later pipeline stage may be quicker than this one."""
        execute_model = runner.execute_model

        def executed(*args: Any, **kwargs: Any) -> Any:
            output = execute_model(*args, **kwargs)
            self._finish()
            return output

        runner.execute_model = executed  # on the instance, as in watch_rows

    def _site(self, vllm_config: Any, device: torch.device) -> HookContext:
        scheduling, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
        return HookContext(
            bank=self.bank,
            layers=self.attached,
            layer_count=self.layer_count,
            hidden_size=self.hidden_size,
            dtype=self.dtype,
            device=device,
            rows=scheduling.max_num_batched_tokens,
            requests=scheduling.max_num_seqs,
            recorded_rows=max(compilation.cudagraph_capture_sizes or (), default=0),
        )

    def load(self, load: ProgramLoad) -> None:
        """Changes one slot of the bank, between two steps."""
        self.bank.load(load)
        self._hooks.sync_slot(load.slot)

    def update_requests(self, scheduler_output: Any) -> None:
        """Forgets requests that finished and learns new ones from the step's schedule."""
        if self._completes_later:
            self._finish_in_flight(scheduler_output)
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
            self._ends.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            request = WorkerRequest.from_extra_args(params.extra_args if params is not None else None)
            if request is not None and not self._is_tracked(new.req_id, request):  # V2's come anew when they resume
                self._requests[new.req_id] = self._accept(request)

    def _is_tracked(self, request_id: str, request: WorkerRequest) -> bool:
        tracked = self._requests.get(request_id)
        return tracked is not None and tracked.request == request

    def _finish_in_flight(self, scheduler_output: Any) -> None:
        """Before vLLM gives the blocks of requests that go to others: completes their steps and zeroes their rows."""
        self._in_flight.release([*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())])
        while self._rows_to_zero:
            self._kv_zeroer.zero([self._rows_to_zero.pop()])

    def hand_over(self, output: Any) -> Any:
        """vLLM's output of a step, whose tokens are seen only when everything is known of the step."""
        return self._in_flight.hand_over(output) if self._completes_later else output

    def use_failure_counters(self, counters: FailureCounters, *, sees_memory: bool) -> None:
        """Notes failures there from now on, and keeps regions here unless the server's memory is seen."""
        self._failure_counters = counters
        self._kept_regions = None if sees_memory else {}

    def report(self) -> WorkerReport:
        """What this worker found in the model and around it."""
        return WorkerReport(
            layers=self.attached, hidden_size=self.hidden_size, dtype=self.dtype, sees_memory=self._kept_regions is None
        )

    def snapshot(self, segment: str, rows: int) -> RegionSnapshot | None:
        """What is kept here of a region, with its captured rows among the first `rows`; None if there is nothing."""
        region = (self._kept_regions or {}).get(segment)
        if region is None:
            return None
        assert self._failure_counters is not None
        layers = self.attached if self._writes and rows else ()
        return take_snapshot(region, self._failure_counters, self._number, self._stage, layers, rows)

    def free_region(self, segment: str) -> None:
        """Forgets a region that is kept here, if there is one."""
        if self._kept_regions is not None:
            self._kept_regions.pop(segment, None)

    def _accept(self, request: WorkerRequest) -> "TrackedRequest":
        layout = RegionLayout(
            stages=request.stages,
            rows=request.rows,
            sites=request.sites,
            layers=request.layers,
            captured=request.captured,
            hidden_size=self.hidden_size,
            dtype=request.dtype,
        )
        region = self._map_region(request, layout)
        steers_L = np.zeros(self.layer_count, bool)
        if request.slot != NO_SLOT:
            steers_L = self.bank.op_counts_LS[:, request.slot] > 0
        planned = PlannedRequest(
            slot=request.slot,
            steers_L=steers_L,
            before_L=self._addresses(region, CaptureSite.BEFORE),
            after_L=self._addresses(region, CaptureSite.AFTER),
            steered=None if request.steered == EVERYWHERE else request.steered,
            captured=None if request.captured == EVERYWHERE else request.captured,
            row_limit=request.rows,
            captures_float32=request.dtype != self.dtype,
        )
        return TrackedRequest(request, planned, region)

    def _addresses(self, region: Region | None, site: CaptureSite) -> npt.NDArray[np.int64]:
        held = frozenset(self.attached) if self._writes else frozenset()
        if region is None:
            return np.zeros(self.layer_count, np.int64)
        return region.addresses(site, self.layer_count, held)

    def _map_region(self, request: WorkerRequest, layout: RegionLayout) -> Region | None:
        """The request's region; None if it cannot be mapped, as after a cancel between its step's schedule and now.

        It is steered all the same, as other requests may reuse its keys and values; without marks it fails alone.
        """
        if self._kept_regions is not None:
            region = self._kept_regions[request.segment] = Region(layout, private_segment(layout.size))
            return region
        try:
            return Region(layout, self._segments.open(request.segment, layout.size))
        except OSError:
            return None

    def _plan_step(self, rows: Sequence[RequestRows]) -> None:
        """Called by the runner between the schedule and the forward pass, with the rows in batch order."""
        chosen = [part for part in rows if part.request_id in self._requests]
        if self._trace is not None and not chosen:
            self._in_flight.complete()  # lines are in order
            self._trace.write(rows, ())
        if chosen:
            requests = [self._planned(self._requests[part.request_id]) for part in chosen]
            plan = self._planner.plan(chosen, requests)
            self._step = self._hooks.begin(plan)
            self._batch = rows

    def _planned(self, tracked: "TrackedRequest") -> PlannedRequest:
        """What to do for a request: not steered if its slot holds something else, which it and its prefix then fail."""
        request = tracked.request
        if request.slot == NO_SLOT or self.bank.holds(request.slot, request.digest):
            return tracked.planned
        self._note_failure(request.slot)
        return replace(tracked.planned, slot=NO_SLOT, steers_L=np.zeros_like(tracked.planned.steers_L))

    def _note_failure(self, slot: int) -> None:
        assert self._failure_counters is not None
        self._failure_counters.counts_RS[self._number, slot] += 1

    def _finish(self) -> None:
        """After the forward pass: completes the step, or leaves it to whoever hands over its tokens."""
        hooked, self._step = self._step, None
        if hooked is None:
            return
        hooked.end()
        step = InFlightStep(hooked, self._batch)
        if self._completes_later:
            self._in_flight.add(step)
        else:
            self._kv_zeroer.zero(self._complete(step))

    def _complete_later(self, step: InFlightStep) -> None:
        """Perhaps in another thread, which must not touch the cache."""
        self._rows_to_zero.extend(self._complete(step))

    def _complete(self, step: InFlightStep) -> list[RequestRows]:
        """Proves that every wanted layer ran, and marks what was done; returns rows whose request went bad."""
        step.hooked.collect()
        plan = step.hooked.plan
        missed = plan.unvisited(self.attached)
        if missed:
            raise EngineFailed(f"the forward pass did not reach the hooks of layers {missed}", reason="TAP_MISSED")
        bad = self._note_bad_rows(plan)
        if self._writes:
            self._mark(plan)
        if self._trace is not None:
            self._trace.write(step.batch, [self._traced(plan, index) for index in range(len(plan.rows))])
        return bad

    def discard_step(self) -> None:
        """Ends a step whose forward pass raised, if there is one: its plan is void."""
        hooked, self._step = self._step, None
        if hooked is not None:
            hooked.discard()

    def _note_bad_rows(self, plan: StepPlan) -> list[RequestRows]:
        bad = set(plan.requests_N[plan.bad_N != 0].tolist())
        for slot in {int(plan.slots_R[index]) for index in bad}:
            self._note_failure(slot)
        return [plan.rows[index] for index in bad]

    def _mark(self, plan: StepPlan) -> None:
        bits_N = marks_of(plan)
        start = 0
        for part in plan.rows:
            end = start + part.row_count
            region = self._requests[part.request_id].region
            if region is not None:
                self._mark_reused(part, region)
                bits = bits_N[start:end]
                region.mark(
                    self._stage, part.first_position, bits if region.layout.layers else bits & ~np.uint8(CAPTURED)
                )
            start = end

    def _mark_reused(self, part: RequestRows, region: Region) -> None:
        """Marks rows that were passed over: a request may find a prefix when it starts, and more when it resumes."""
        end = self._ends.get(part.request_id, 0)
        if part.first_position > end:
            region.mark(self._stage, end, np.full(part.first_position - end, REUSED, np.uint8))
        self._ends[part.request_id] = max(end, part.first_position + part.row_count)

    def _traced(self, plan: StepPlan, index: int) -> TracedRows:
        part, slot = plan.rows[index], int(plan.slots_R[index])
        is_mine_N = plan.requests_N == index

        def positions(is_chosen_N: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
            return (np.flatnonzero(is_chosen_N[is_mine_N]) + part.first_position).astype(np.int32)

        return TracedRows(
            output=self._requests[part.request_id].request.output,
            first_position=part.first_position,
            row_count=part.row_count,
            digest=self.bank.digest_of(slot) if slot != NO_SLOT else "",
            steered=spans_of(positions(plan.slots_N != NO_SLOT)),
            captured=spans_of(positions(plan.capture_rows_N != NOT_CAPTURED)),
            steered_layers=tuple(
                layer for layer in sorted(plan.visited) if slot != NO_SLOT and self.bank.op_counts_LS[layer, slot]
            ),
            captured_layers=tuple(
                layer for layer in sorted(plan.visited) if plan.before_LR[layer, index] or plan.after_LR[layer, index]
            ),
            bad_positions=tuple(positions(plan.bad_N != 0).tolist()),
        )


def marks_of(plan: StepPlan) -> npt.NDArray[np.uint8]:
    """What was done with each row of the plan, shape [rows of the plan]; CAPTURED where a capture would have it."""
    is_steered_N, is_captured_N = plan.slots_N != NO_SLOT, plan.capture_rows_N != NOT_CAPTURED
    done_N = COMPUTED | is_steered_N * STEERED | is_captured_N * CAPTURED
    return np.where(plan.bad_N, NON_FINITE, done_N).astype(np.uint8)


def worker_number(worker: Any) -> int:
    """Which of them this one is; a replica's own `rank` begins at 0 in each of them."""
    return int(worker.parallel_config.data_parallel_index * worker.parallel_config.world_size + worker.rank)


def hooks_for(site: HookContext) -> Hooks:
    """The hooks of the device on which the model runs."""
    return CudaHooks(site) if site.device.type == "cuda" else CpuHooks(site)


def check_device(is_cpu: bool, config: SteeringConfig) -> None:
    """Raises Unsupported for a device on which steering has never run, unless the user takes what is not verified."""
    if not is_cpu and not config.allow_unverified:
        raise Unsupported(
            "steering on a GPU has never run on one, only in Triton's interpreter on a CPU; "
            "--steer-allow-unverified starts it all the same, if the self-test passes",
            reason="DEVICE_NOT_VERIFIED",
        )


class SteeringWorker(PlatformWorker):
    """vLLM's worker of this platform, with hooks behind the decoder layers of its model."""

    make_hooks = staticmethod(hooks_for)
    """What does the hooks' work; another one in tests only."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and attaches the hooks, before vLLM profiles and compiles it.

        A model that cannot be steered is loaded all the same: the front end, which hears nothing of errors raised
        here, asks for the report and refuses it with the reason.
        """
        super().load_model(*args, **kwargs)
        self.is_warm = False
        self.steering: WorkerState | None = None
        self.refusal: SteerError | None = None
        try:
            check_device(current_platform.is_cpu(), SteeringConfig.from_vllm(self.vllm_config))
            check_finished_config(self.vllm_config, is_cpu=current_platform.is_cpu())
            self.steering = WorkerState(self, self.make_hooks)
        except SteerError as error:
            self.refusal = error

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's own, then the self-test: a model that fails it is refused like one that cannot be steered."""
        times = super().compile_or_warm_up_model()
        self.is_warm = True
        if self.steering is not None:
            try:
                run_self_test(self.steering.hooked)
            except SteerError as error:
                self.steering, self.refusal = None, error
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step: vLLM's own, after learning what it must do; `WorkerState` proves within it that it was done."""
        if self.steering is None:
            assert not self.is_warm, "a model that was refused runs vLLM's warm-up only"
            return super().execute_model(scheduler_output)
        self.steering.update_requests(scheduler_output)
        try:
            return super().execute_model(scheduler_output)
        except BaseException:
            self.steering.discard_step()
            raise

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own; see vllm_patches/cpu_generator_fix.py and in_flight_steps.py."""
        if not self.is_warm:  # the warm-up of vLLM's V2 runner
            return super().sample_tokens(*args, **kwargs)
        assert self.steering is not None
        with without_discarded_generators(self.model_runner):
            output = super().sample_tokens(*args, **kwargs)
        return self.steering.hand_over(output)

    def fence(self) -> None:
        """Does nothing: an answer means that everything sent before has been heard."""

    def steering_report(self, counters_name: str, workers: int) -> dict[str, Any]:
        """Opens the failure counters of all `workers` and returns a WorkerReport, as plain data."""
        config = SteeringConfig.from_vllm(self.vllm_config)
        try:
            counters, sees_memory = FailureCounters.open(config.segments, counters_name, workers, config.slots), True
        except OSError:  # on another host, or in another container
            counters, sees_memory = FailureCounters.private(workers, config.slots), False
        if self.steering is None:
            assert self.refusal is not None
            report = WorkerReport(refusal=self.refusal.message, refusal_reason=self.refusal.reason)
        else:
            self.steering.use_failure_counters(counters, sees_memory=sees_memory)
            report = self.steering.report()
        counters.fingerprints_R[worker_number(self)] = report.fingerprint
        return report.to_rpc()

    def load_programs(self, loads: Sequence[tuple[int, str, bytes]]) -> None:
        """Changes the bank between two steps: (slot, digest, bytes) for each change, in order."""
        assert self.steering is not None
        for slot, digest, data in loads:
            self.steering.load(ProgramLoad(slot=slot, digest=digest, data=data))

    def fetch_region(self, segment: str, rows: int) -> dict[str, Any] | None:
        """The RegionSnapshot of a region that is kept here, as plain data; see `WorkerState.snapshot`."""
        assert self.steering is not None
        snapshot = self.steering.snapshot(segment, rows)
        return None if snapshot is None else snapshot.to_rpc()

    def free_region(self, segment: str) -> None:
        """Forgets a region that is kept here."""
        assert self.steering is not None
        self.steering.free_region(segment)
