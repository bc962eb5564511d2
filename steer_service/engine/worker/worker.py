"""vLLM's worker of this platform, with steering and capture of the rows of each step.

One engine step in a worker:

    execute_model(scheduler_output)                            worker.py
      update_requests   requests that start and finish         requests.py
      vLLM prepares its inputs: the rows of the batch          batch_rows.py
        plan_step       rows -> one StepPlan                   worker_state.py, ops/plan.py
        hooks.begin     fill the tables of the forward pass    hooks_cpu.py or hooks_cuda.py
      vLLM runs the forward pass; after each decoder layer
        the hook        captures, steers and checks rows       hooks.py, ops/*_kernel.py
      finish_step       did every wanted layer run?            worker_state.py
        marks           STEERED, CAPTURED, ... for each row    row_marks.py
        KV zeroing      blocks of rows that are not finite     kv_zeroing.py
    sample_tokens       tokens become visible; on a GPU the    in_flight_steps.py
                        step is completed before that

Relies on (vLLM 0.24 to 0.33): `EngineArgs.worker_cls`; `Worker.init_device` before `Worker.load_model`, and that before
profiling; `Worker.execute_model` once per step with a SchedulerOutput that has `scheduled_new_reqs[i].req_id`,
`.sampling_params.extra_args`, `finished_req_ids` and `preempted_req_ids`, before other requests get the blocks of
these; in it the runner's `execute_model`, before the residual stream is sent to the next pipeline stage; worker
processes that the engine core starts, unless it is the worker. tests/engine/test_seams.py notices a change.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.platforms import current_platform

from steer_service.core.errors import SteerError
from steer_service.engine.config import SteeringConfig
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.heart import start_heart
from steer_service.engine.messages import WorkerReport
from steer_service.engine.refusals import check_finished_config
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.socket_folder import meeting_point
from steer_service.engine.vllm_patches.cpu_generator_fix import without_discarded_generators
from steer_service.engine.vllm_patches.quick_end import skip_teardown
from steer_service.engine.vllm_patches.response_ring import bound_response_ring
from steer_service.engine.worker.devices import check_device, hooks_for
from steer_service.engine.worker.facts import worker_number
from steer_service.engine.worker.model_checks import check_model
from steer_service.engine.worker.self_test import run_self_test
from steer_service.engine.worker.worker_state import WorkerState
from steer_service.shm.segments import Segment

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # type: ignore[assignment]

logger = logging.getLogger(__name__)


class SteeringWorker(PlatformWorker):
    """vLLM's worker of this platform, with a hook after each decoder layer of its model."""

    make_hooks = staticmethod(hooks_for)
    """Makes the hooks; tests replace it."""

    def init_device(self) -> None:
        """Meets the other workers through a file in this project's folder, see socket_folder.py."""
        bound_response_ring()
        is_core = self.parallel_config.distributed_executor_backend == "uni"  # else the engine core started this worker
        core = os.getpid() if is_core else os.getppid()
        url: str = self.distributed_init_method  # type: ignore[has-type]
        self.distributed_init_method = meeting_point(url, core)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model and installs the hooks, before vLLM profiles and compiles it.

        A model that cannot be steered is loaded too, because the API server process does not receive errors raised
        here. It reads the refusal from `steering_report` and raises it.
        """
        super().load_model(*args, **kwargs)
        self.heart = start_heart()
        self.is_warm = False
        self.steering: WorkerState | None = None
        self.refusal: SteerError | None = None
        try:
            check_device(current_platform.device_type)
            check_finished_config(self.vllm_config, is_cpu=current_platform.is_cpu())
            check_model(self.model_runner.get_model(), self.vllm_config.model_config)
            self.steering = WorkerState(self, self.make_hooks)
        except SteerError as error:
            self.refusal = error

    def compile_or_warm_up_model(self) -> Any:
        """Runs vLLM's warm-up, then the self-test. A model that fails is refused like one that cannot be steered."""
        times = super().compile_or_warm_up_model()
        self.is_warm = True
        if self.steering is not None:
            try:
                self.steering.check_kv_caches()
                self.steering.limit_graphs()
                self.steering.proof = run_self_test(self.steering.hooked_model)
            except SteerError as error:
                self.steering, self.refusal = None, error
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """Runs one step: updates the requests, then runs vLLM's own step, in which `WorkerState` checks the result."""
        if self.steering is None:
            assert not self.is_warm, "a refused model runs vLLM's warm-up only"
            return super().execute_model(scheduler_output)
        began = time.monotonic_ns()
        with self._reported_faults(self.steering):
            self.steering.update_requests(scheduler_output)
            try:
                output = super().execute_model(scheduler_output)
            except BaseException:
                self.steering.discard_step()
                raise
        if self.is_warm:  # the warm-up compiles, which may take minutes
            self.heart.count_step(time.monotonic_ns() - began)
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """Samples as vLLM does; see vllm_patches/cpu_generator_fix.py and in_flight_steps.py."""
        if not self.is_warm:  # the warm-up of vLLM's V2 runner
            return super().sample_tokens(*args, **kwargs)
        assert self.steering is not None
        with self._reported_faults(self.steering), without_discarded_generators(self.model_runner):
            return self.steering.hand_over(super().sample_tokens(*args, **kwargs))

    @contextmanager
    def _reported_faults(self, steering: WorkerState) -> Iterator[None]:
        """Reports an error of the block to the API server process.

        vLLM ends the engine for an error of the worker whose output it reads. An error of another worker is only
        logged, and the others would wait for that worker: it ends, which vLLM notices, and the engine ends with it.
        """
        try:
            yield
        except Exception as error:
            steering.report_fault(error)
            if steering.facts.replies:
                raise
            logger.exception("worker %d ends, because its step failed", steering.facts.number)
            raise SystemExit(1) from error

    def fence(self) -> None:
        """Its reply means that the worker has processed every earlier message and completed every step before it."""
        assert self.steering is not None
        self.steering.complete_steps()

    def steering_report(self, counters_name: str, workers: int, marks: tuple[str, int]) -> dict[str, Any]:
        """Opens the failure counters of all `workers` and the mark memory; returns a WorkerReport, as plain data.

        `marks`: name and bytes of the mark memory.
        """
        config = SteeringConfig.from_vllm(self.vllm_config)
        mark_memory: Segment | None
        try:
            counters = FailureCounters.open(config.segments, counters_name, workers, config.slots)
            mark_memory = config.segments.open(*marks)
        except OSError:  # on another host, or in another container
            counters, mark_memory = FailureCounters.private(workers, config.slots), None
        if self.steering is None:
            assert self.refusal is not None
            report = WorkerReport(refusal=self.refusal.message, refusal_reason=self.refusal.reason)
        else:
            self.steering.use_memory(counters, mark_memory)
            report = self.steering.report()
        counters.fingerprints_R[worker_number(self)] = report.fingerprint
        return report.to_rpc()

    def load_programs(self, loads: Sequence[tuple[int, str, bytes]]) -> tuple[int, list[int]] | None:
        """Changes the bank, between two steps. `loads`: (slot, digest, bytes) of each change, in order.

        Before, it completes every step: failures of programs that leave their slots are counted then. Returns them,
        with the worker's number, if the worker does not share the server's memory.
        """
        assert self.steering is not None
        self.steering.complete_steps()
        for slot, digest, data in loads:
            self.steering.load(ProgramLoad(slot=slot, digest=digest, data=data))
        return self.steering.remote_failures()

    def fetch_region(self, name: str, rows: int) -> dict[str, Any] | None:
        """The RegionSnapshot of a region that this worker keeps, as plain data; see `TrackedRequests.snapshot`."""
        assert self.steering is not None
        self.steering.complete_steps()  # the last rows of this stage may not be marked yet
        snapshot = self.steering.snapshot(name, rows)
        return None if snapshot is None else snapshot.to_rpc()

    def shutdown(self) -> None:
        """Ends as vLLM's worker does; its process then ends quickly."""
        skip_teardown()
        super().shutdown()

    def free_region(self, name: str) -> None:
        """Frees a region that this worker keeps."""
        assert self.steering is not None
        self.steering.requests.free_region(name)
