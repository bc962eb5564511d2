"""The first exchange with the workers: they open the memory of all requests and report what they found in the model.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.collective_rpc`, which reaches every replica and returns the replies of the
first one only. tests/engine/test_seams.py and tests/engine/test_engine_arguments_rows.py notice a change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.engine.async_llm import AsyncLLM

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.core.start_proof import StartProof
from steer_service.engine.failure_counters import FailureCounters
from steer_service.engine.messages import WorkerReport
from steer_service.engine.remote_workers import RemoteRegions
from steer_service.engine.vllm_errors import vllm_errors
from steer_service.shm.segments import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What the workers said."""

    remote: RemoteRegions | None
    """Set if a worker does not share this process's memory."""
    proof: StartProof | None
    """What they have proven."""
    lags: bool
    """True if a token may be visible before an earlier pipeline stage has marked its row; see WorkerReport."""


async def shake_hands(
    llm: AsyncLLM, counters: FailureCounters, marks: Segment, workers: int, info: ModelInfo
) -> Handshake:
    """Gives the workers the failure counters and the mark memory, and checks that all workers agree.

    Raises Unsupported for a model that a worker refuses, and for replicas with remote workers; EngineFailed if the
    workers differ or a layer has no hook.
    """
    try:
        with vllm_errors():
            replies = await llm.collective_rpc(
                "steering_report", args=(counters.name, workers, (marks.name, marks.size))
            )
    finally:
        counters.unlink()
        marks.unlink()
    reports = [WorkerReport.from_rpc(reply) for reply in replies]
    _check_reports(reports, info)
    proof = StartProof.of_all([report.proof for report in reports if report.proof is not None])
    lags = any(report.lags for report in reports)
    if not all(report.sees_memory for report in reports):
        return Handshake(remote=_remote_regions(llm, counters), proof=proof, lags=lags)
    replica = counters.differing_replica([report.fingerprint for report in reports])
    if replica is not None:  # an RPC returns the replies of the first replica only
        raise EngineFailed(f"the workers of replica {replica} differ from replica 0's", reason="WORKER_DIFFERS")
    return Handshake(remote=None, proof=proof, lags=lags)


def _check_reports(reports: Sequence[WorkerReport], info: ModelInfo) -> None:
    for report in reports:
        if report.refusal:
            raise Unsupported(report.refusal, reason=report.refusal_reason)
    hooked = {layer for report in reports for layer in report.layers}
    if hooked != set(range(info.layer_count)):
        raise EngineFailed(
            f"layers {sorted(hooked)} have a hook, expected all {info.layer_count}", reason="TAPS_MISSING"
        )
    for report in reports:
        if (report.hidden_size, report.dtype) != (info.hidden_size, info.dtype):
            raise EngineFailed(
                f"a worker has a residual stream of dtype {report.dtype} and hidden size {report.hidden_size}, "
                f"expected {info.dtype} and {info.hidden_size}",
                reason="WORKER_DIFFERS",
            )


def _remote_regions(llm: AsyncLLM, counters: FailureCounters) -> RemoteRegions:
    if llm.vllm_config.parallel_config.data_parallel_size > 1:
        raise Unsupported(
            "replicas are refused if workers do not share the server's memory: an RPC reaches the first replica only",
            reason="ARGUMENT_REFUSED",
            field="data_parallel_size",
        )
    return RemoteRegions(llm, counters)
