"""The steering state of one worker, and the parts of one step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.start_proof import StartProof
from steer_service.engine.config import SteeringConfig
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport
from steer_service.engine.remote_workers import RegionSnapshot
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.worker.bank import ProgramBank
from steer_service.engine.worker.batch_rows import watch_rows
from steer_service.engine.worker.dispatch import avoid_graphs
from steer_service.engine.worker.facts import WorkerFacts
from steer_service.engine.worker.hooks import HookContext, HookedForward, Hooks, install_hooks
from steer_service.engine.worker.in_flight_steps import InFlightStep, InFlightSteps
from steer_service.engine.worker.kv_zeroing import KVBlockZeroer
from steer_service.engine.worker.layer_outputs import decoder_layers, layer_output_of
from steer_service.engine.worker.model_proof import HookedModel
from steer_service.engine.worker.requests import TrackedRequest, TrackedRequests
from steer_service.engine.worker.row_marks import RowMarks
from steer_service.engine.worker.trace import StepTrace, TraceFile
from steer_service.ops.plan import NO_SLOT, PlannedRequest, Planner, RequestRows, StepPlan
from steer_service.shm.segments import Segment


class WorkerState:
    """One worker's bank, hooks and requests, and the forward pass of its current step."""

    def __init__(self, worker: Any, make_hooks: Callable[[HookContext], Hooks]) -> None:
        config = SteeringConfig.from_vllm(worker.vllm_config)
        runner = worker.model_runner
        layers = install_hooks(runner.model, unverified=config.unverified)
        self.facts = WorkerFacts.of(worker, layers)
        facts = self.facts
        self.bank = ProgramBank(config.bank_size(facts.hidden_size), layers, facts.layer_count, facts.hidden_size)
        self._context = _hook_context(worker.vllm_config, runner.device, facts, self.bank, config.staging_bytes)
        self.hooks = make_hooks(self._context)
        self.requests = TrackedRequests(facts, self.bank, config.segments)
        self._runner = runner
        self._unverified = config.unverified
        self.proof: StartProof | None = None
        """What the self-test has proven, once it has passed."""
        self._counters: FailureCounters | None = None
        self._planner = Planner(check_layer=layers[-1])
        self._forward: HookedForward | None = None
        self._batch: Sequence[RequestRows] = ()
        self._marks = RowMarks(facts.stage, layers)
        self._trace = StepTrace(TraceFile(config.trace, facts.number), self.bank) if config.trace else None
        self._kv_zeroer = KVBlockZeroer(runner)
        self._in_flight = InFlightSteps(self._complete_later)
        self._completes_later = self.hooks.completes_later
        self._is_beyond_graphs = False
        self._rows_to_zero: list[RequestRows] = []  # bad rows of steps that were completed later
        watch_rows(runner, self.plan_step)
        self._finish_each_step(runner)

    @property
    def hooked_model(self) -> HookedModel:
        """The model with its hooks, for the self-test."""
        last_layer = decoder_layers(self._runner.model)[self.facts.layers[-1]]
        return HookedModel(
            runner=self._runner,
            layer_output=layer_output_of(last_layer, self._unverified),
            context=self._context,
            hooks=self.hooks,
        )

    def check_kv_caches(self) -> None:
        """Raises Unsupported for keys and values that could not be zeroed, once vLLM has allocated them."""
        self._kv_zeroer.check()

    def limit_graphs(self) -> None:
        """Lets no graph replay a step that captures more than there is room for, once vLLM has recorded its graphs."""
        if self.hooks.graph_bytes is not None:
            avoid_graphs(self._runner, lambda: self._is_beyond_graphs)

    def use_memory(self, counters: FailureCounters, marks: Segment | None) -> None:
        """Sets the failure counters and the mark memory; None if this worker must keep regions in its own memory."""
        self._counters = counters
        self.requests.marks = marks
        self.requests.keeps_regions = marks is None

    def report(self) -> WorkerReport:
        """What this worker found in the model, and whether it shares the server's memory."""
        facts = self.facts
        return WorkerReport(
            layers=facts.layers,
            hidden_size=facts.hidden_size,
            dtype=facts.dtype,
            sees_memory=not self.requests.keeps_regions,
            proof=self.proof,
            lags=self._completes_later and not facts.is_last_stage,
        )

    def load(self, load: ProgramLoad) -> None:
        """Changes one slot of the bank, between two steps."""
        self.bank.load(load)
        self.hooks.sync_slot(load.slot)

    def remote_failures(self) -> tuple[int, list[int]] | None:
        """This worker's number and failures of each slot, if the API server process does not see them."""
        if not self.requests.keeps_regions:
            return None
        assert self._counters is not None
        return self.facts.number, self._counters.counts_RS[self.facts.number].tolist()

    def report_fault(self, error: Exception) -> None:
        """Tells the API server process that this worker is out of order."""
        if self._counters is not None:  # None before the handshake, when a start that fails has its own error
            reason = error.reason if isinstance(error, SteerError) else type(error).__name__
            self._counters.report_fault(self.facts.number, reason)

    def snapshot(self, name: str, rows: int) -> RegionSnapshot | None:
        """See `TrackedRequests.snapshot`."""
        assert self._counters is not None
        return self.requests.snapshot(name, rows, self._counters)

    def update_requests(self, scheduler_output: Any) -> None:
        """First part of a step: tracks and forgets requests by vLLM's schedule."""
        finished, preempted = scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ()
        if self._completes_later:  # before other requests get the blocks of these
            self._in_flight.release([*finished, *preempted])
            while self._rows_to_zero:
                self._kv_zeroer.zero([self._rows_to_zero.pop()])
        self._marks.forget(finished)
        self.requests.update(scheduler_output)
        self._is_beyond_graphs = self._captures_beyond_graphs(scheduler_output)

    def _captures_beyond_graphs(self, scheduler_output: Any) -> bool:
        """Whether the step may capture more than a graph has room for; all ranks find the same."""
        room, context = self.hooks.graph_bytes, self._context
        rows = scheduler_output.total_num_scheduled_tokens
        if room is None or rows > context.recorded_rows:  # for which no graph is
            return False
        if rows * context.most_row_bytes <= room:
            return False
        return self.requests.staged_bytes(scheduler_output.num_scheduled_tokens, context.stage_layers) > room

    def plan_step(self, batch: Sequence[RequestRows]) -> None:
        """Second part, before the forward pass: plans the step. `batch`: the rows in batch order."""
        chosen = self.requests.rows_of(batch)
        if self._trace is not None and not chosen:
            self._in_flight.complete()  # keeps the lines in order
            self._trace.write_idle(batch)
        if chosen:
            plan = self._planner.plan(chosen, [self._planned(self.requests[part.request_id]) for part in chosen])
            self._forward = self.hooks.begin(plan)
            self._batch = batch

    def finish_step(self) -> None:
        """Third part, after the forward pass: completes the step, or leaves it in flight until `hand_over`."""
        forward, self._forward = self._forward, None
        self._is_beyond_graphs = False
        if forward is None:
            return
        forward.end()
        step = InFlightStep(forward, self._batch)
        if self._completes_later:
            self._in_flight.add(step)
        else:
            self._kv_zeroer.zero(self._complete(step))

    def complete_steps(self) -> None:
        """Returns when every step whose forward pass has returned is complete."""
        self._in_flight.complete()

    def discard_step(self) -> None:
        """Instead of the third part, if the forward pass raised: discards the plan."""
        forward, self._forward = self._forward, None
        self._is_beyond_graphs = False
        if forward is not None:
            forward.discard()

    def hand_over(self, output: Any) -> Any:
        """vLLM's output of a step; its tokens become visible only when the step is complete."""
        return self._in_flight.hand_over(output) if self._completes_later else output

    def _finish_each_step(self, runner: Any) -> None:
        """Calls `finish_step` after each forward pass, before the residual stream is sent to the next pipeline stage.

        Marks are then written before the last stage makes the token visible.
        """
        execute_model = runner.execute_model

        def executed(*args: Any, **kwargs: Any) -> Any:
            output = execute_model(*args, **kwargs)
            self.finish_step()
            return output

        runner.execute_model = executed  # on the instance, as in watch_rows

    def _planned(self, tracked: TrackedRequest) -> PlannedRequest:
        """The plan of a request: unsteered, and a fault of this worker, if its slot holds another program."""
        request = tracked.request
        if request.slot == NO_SLOT or self.bank.holds(request.slot, request.digest):
            return tracked.planned
        self._count_failure(request.slot)
        self.report_fault(EngineFailed("a slot holds another program", reason="WRONG_PROGRAM"))
        return replace(tracked.planned, slot=NO_SLOT, steers_L=np.zeros_like(tracked.planned.steers_L))

    def _complete_later(self, step: InFlightStep) -> None:
        """Completes a step, perhaps in another thread, which must not write to the KV cache."""
        try:
            self._rows_to_zero.extend(self._complete(step))
        except Exception as error:
            self.report_fault(error)
            raise

    def _complete(self, step: InFlightStep) -> list[RequestRows]:
        """Checks that every wanted layer ran, and marks the rows. Returns the rows of requests with a bad row."""
        step.hooked.collect()
        plan = step.hooked.plan
        missed = plan.unvisited(self.facts.layers)
        if missed:
            raise EngineFailed(f"the forward pass did not reach the hooks of layers {missed}", reason="TAP_MISSED")
        bad = self._count_bad_rows(plan)
        if self.facts.writes_rows:
            self._marks.write(plan, self.requests)
        if self._trace is not None:
            self._trace.write(step.batch, plan, self.requests)
        return bad

    def _count_bad_rows(self, plan: StepPlan) -> list[RequestRows]:
        bad = set(plan.requests_N[plan.bad_N != 0].tolist())
        for slot in {int(plan.slots_R[index]) for index in bad}:
            self._count_failure(slot)
        return [plan.rows[index] for index in bad]

    def _count_failure(self, slot: int) -> None:
        assert self._counters is not None
        self._counters.count_failure(self.facts.number, slot)


def _hook_context(
    vllm_config: Any, device: torch.device, facts: WorkerFacts, bank: ProgramBank, staging_bytes: int
) -> HookContext:
    scheduling, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    return HookContext(
        bank=bank,
        layers=facts.layers,
        layer_count=facts.layer_count,
        hidden_size=facts.hidden_size,
        dtype=facts.dtype,
        device=device,
        rows=scheduling.max_num_batched_tokens,
        requests=scheduling.max_num_seqs,
        recorded_rows=max(compilation.cudagraph_capture_sizes or (), default=0),
        stage_layers=facts.stage_layers,
        staging_bytes=staging_bytes,
        writes_rows=facts.writes_rows,
    )
