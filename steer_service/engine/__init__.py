"""vLLM: the engine in the API server's process; `worker/` runs in vLLM's workers, `vllm_patches/` in its engine core.

engine            VLLMEngine: one request from `submit` to its last event
model             VLLMSteeringModel: the engine for scripts and notebooks
config            engine arguments: vLLM's own and ours
refusals          engine arguments that are refused, with the reason
slots             which program stands in which slot of the bank
region            shared memory of one output: marks and captured rows
messages          what travels between this process and the workers
remote_workers    regions of workers that do not see this process's memory
failure_counters  how often each slot's program left rows that were not finite
lora              LoRA adapters
sampling          our sampling options as vLLM's
start_log         why a start failed
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.engine.model import VLLMSteeringModel

__all__ = ["VLLMSteeringModel"]


def __getattr__(name: str) -> Any:
    """`VLLMSteeringModel`, imported on first use: the workers import this folder too and do not need it."""
    if name == "VLLMSteeringModel":
        from steer_service.engine.model import VLLMSteeringModel

        return VLLMSteeringModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
