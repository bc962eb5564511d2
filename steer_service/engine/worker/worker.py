"""vLLM's worker of this platform, with steering and capture of the rows of each step.

One engine step in a worker:

    execute_model(scheduler_output)                            worker.py
      update_requests   requests that begin and end            requests.py
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

Relies on (vLLM 0.24 to 0.33): `EngineArgs.worker_cls`; `Worker.load_model` before profiling; `Worker.execute_model`
once per step with a SchedulerOutput that has `scheduled_new_reqs[i].req_id`, `.sampling_params.extra_args`,
`finished_req_ids` and `preempted_req_ids`, before the blocks of these go to others; in it the runner's
`execute_model`, before the residual stream goes to the next pipeline stage. tests/engine/test_seams.py notices
a change.
"""

from collections.abc import Sequence
from typing import Any

from vllm.platforms import current_platform

from steer_service.core.errors import SteerError, Unsupported
from steer_service.engine.config import SteeringConfig
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport
from steer_service.engine.refusals import check_finished_config
from steer_service.engine.slots import ProgramLoad
from steer_service.engine.vllm_patches.cpu_generator_fix import without_discarded_generators
from steer_service.engine.worker.facts import worker_number
from steer_service.engine.worker.hooks import HookContext, Hooks
from steer_service.engine.worker.hooks_cpu import CpuHooks
from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.engine.worker.self_test import run_self_test
from steer_service.engine.worker.worker_state import WorkerState

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker  # type: ignore[assignment]


def hooks_for(context: HookContext) -> Hooks:
    """The hooks of the device on which the model runs."""
    return CudaHooks(context) if context.device.type == "cuda" else CpuHooks(context)


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
                run_self_test(self.steering.hooked_model)
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
        """The RegionSnapshot of a region that is kept here, as plain data; see `TrackedRequests.snapshot`."""
        assert self.steering is not None
        snapshot = self.steering.snapshot(segment, rows)
        return None if snapshot is None else snapshot.to_rpc()

    def free_region(self, segment: str) -> None:
        """Forgets a region that is kept here."""
        assert self.steering is not None
        self.steering.requests.free_region(segment)
