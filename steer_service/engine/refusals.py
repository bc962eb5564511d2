"""Engine arguments of vLLM that are refused, with the reason.

Relies on (vLLM 0.24 to 0.33): the names and defaults of vLLM's arguments. tests/engine/test_config.py notices a change.
"""

from dataclasses import dataclass, replace
from typing import Any

from vllm.config.structured_outputs import StructuredOutputsConfig

from steer_service.core.errors import Unsupported

WORKER_CLS = "steer_service.engine.worker.worker.SteeringWorker"
SCHEDULER_CLS = "steer_service.engine.vllm_patches.scheduler.steering_scheduler"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One engine argument that would make steering or capture wrong, or is not proven."""

    allowed: tuple[Any, ...]
    """Values that keep steering and capture right."""
    reason: str
    """Why other values are refused."""


NOT_PROVEN = "steering and capture are not proven under it yet"
OTHER_HOST = "workers on another host do not share the server's memory"
ONE_API_SERVER = "one API server process owns the programs and captures of all replicas"
OFFLOADED = "an offloaded layer loses its hook"


REFUSALS = {
    "worker_cls": Refusal(("auto", WORKER_CLS), "the worker is this project's own"),
    "speculative_config": Refusal((None,), NOT_PROVEN),
    "spec_method": Refusal((None,), NOT_PROVEN),
    "spec_model": Refusal((None,), NOT_PROVEN),
    "spec_tokens": Refusal((None,), NOT_PROVEN),
    "prefill_context_parallel_size": Refusal((1,), "it splits the rows of a request over ranks"),
    "decode_context_parallel_size": Refusal((1,), NOT_PROVEN),
    "nnodes": Refusal((1,), OTHER_HOST),
    "data_parallel_backend": Refusal(("mp",), OTHER_HOST),
    "data_parallel_rank": Refusal((None,), ONE_API_SERVER),
    "data_parallel_start_rank": Refusal((None,), ONE_API_SERVER),
    "data_parallel_size_local": Refusal((None,), ONE_API_SERVER),
    "data_parallel_hybrid_lb": Refusal((False,), ONE_API_SERVER),
    "data_parallel_external_lb": Refusal((False,), ONE_API_SERVER),
    "data_parallel_multi_port_external_lb": Refusal((False,), ONE_API_SERVER),
    "enable_hc_sp": Refusal((False,), "it splits the rows of a step over ranks"),
    "offload_backend": Refusal(("auto",), OFFLOADED),
    "cpu_offload_gb": Refusal((0, 0.0), OFFLOADED),
    "offload_group_size": Refusal((0,), OFFLOADED),
    "worker_extension_cls": Refusal(("",), "the worker is this project's own"),
    "enable_fault_tolerance": Refusal((False,), "a restarted worker has no programs"),
    "enable_dbo": Refusal((False,), "micro-batches split the rows of a step"),
    "ubatch_size": Refusal((0,), "micro-batches split the rows of a step"),
    "kv_sharing_fast_prefill": Refusal((False,), "the hooks would not receive every row"),
    "kv_transfer_config": Refusal((None,), "keys and values from outside have no steering digest"),
    "kv_offloading_size": Refusal((None,), "keys and values from outside have no steering digest"),
    "ec_transfer_config": Refusal((None,), NOT_PROVEN),
    "diffusion_config": Refusal((None,), NOT_PROVEN),
    "scheduler_cls": Refusal((None, SCHEDULER_CLS), "the scheduler is this project's own"),
    "logprobs_mode": Refusal(
        ("raw_logprobs",), "responses hold log-probabilities, before penalties and temperature, as on every backend"
    ),
    "override_generation_config": Refusal(({}, None), "the sampling defaults are this project's own"),
    "runner": Refusal(("auto", "generate"), "only generation is served"),
    "convert": Refusal(("auto", "none"), "only generation is served"),
    "skip_tokenizer_init": Refusal((False,), "prompts and responses are text"),
    "tokens_only": Refusal((False,), "prompts and responses are text"),
    "enable_elastic_ep": Refusal((False,), NOT_PROVEN),
    "enable_sleep_mode": Refusal((False,), "a sleeping worker loses its programs"),
    "distributed_executor_backend": Refusal((None, "mp", "uni"), OTHER_HOST),
}
"""Engine argument -> its allowed values, and why others are refused."""


def check_honoured(arguments: dict[str, Any]) -> None:
    """Raises Unsupported for an argument with a value that REFUSALS does not allow, or that does not fit another."""
    for name, refusal in REFUSALS.items():
        if name in arguments and arguments[name] not in refusal.allowed:
            raise Unsupported(
                f"{arguments[name]!r} is refused: {refusal.reason}", reason="ARGUMENT_REFUSED", field=name
            )
    if arguments.get("otlp_traces_endpoint") and arguments.get("disable_log_stats"):
        raise Unsupported(
            "True is refused: vLLM's spans are made of its statistics, and the first one would end the engine",
            reason="ARGUMENT_REFUSED",
            field="disable_log_stats",
        )


def with_one_backend(given: StructuredOutputsConfig | dict[str, Any]) -> StructuredOutputsConfig:
    """vLLM's settings of structured outputs, with the only backend whose constraints are checked.

    With vLLM's default, "auto", a constraint that the backend refuses would go to another one, unchecked.
    """
    config = StructuredOutputsConfig(**{"backend": "xgrammar", **given}) if isinstance(given, dict) else given
    if config.backend not in ("auto", "xgrammar"):
        raise Unsupported(
            f"the backend {config.backend!r} is refused: constraints are checked with xgrammar before they are used",
            reason="ARGUMENT_REFUSED",
            field="structured_outputs_config",
        )
    return replace(config, backend="xgrammar")


def check_finished_config(vllm_config: Any, *, is_cpu: bool) -> None:
    """Raises Unsupported for settings that only vLLM's complete configuration shows, with its defaults applied."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if getattr(compilation.pass_config, "enable_sp", False):
        raise Unsupported(
            "sequence parallelism (pass_config.enable_sp) is refused: it splits the rows of a step over ranks",
            reason="ARGUMENT_REFUSED",
            field="compilation_config",
        )
    if (
        parallel.data_parallel_size > 1 and vllm_config.model_config.is_moe
    ):  # for other models, a worker's copy has size 1
        raise Unsupported(
            f"replicas of a mixture-of-experts model are refused: {NOT_PROVEN}",
            reason="ARGUMENT_REFUSED",
            field="data_parallel_size",
        )
    if is_cpu and parallel.pipeline_parallel_size > 1 and not compilation.mode:
        raise Unsupported(
            "a pipeline without compilation is refused: vLLM cannot run it on a CPU",
            reason="ARGUMENT_REFUSED",
            field="pipeline_parallel_size",
        )
