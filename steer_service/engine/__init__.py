"""vLLM: the engine in the API server's process; `worker/` runs in vLLM's workers, `vllm_patches/` in its engine core.

engine            VLLMEngine: a request from `submit` to its last event
engine_request    one output of a request: its slot, its vLLM request, its events
output_rows       an output's rows as the workers marked and captured them
region_pool       reserves and frees regions
region            shared memory of one output: marks and captured rows
slots             which program stands in which slot of the bank
prefix_cache      the salt of a request's prefix-cache blocks
messages          what travels between this process and the workers
sampling          our sampling options as vLLM's, vLLM's tokens as TokenDeltas
prompt_rendering  renders prompts without blocking the event loop
lora              LoRA adapters
model             VLLMSteeringModel: the engine for scripts and notebooks
config            engine arguments: vLLM's own and ours
refusals          engine arguments that are refused, with the reason
start             loads a model with vLLM
start_log         why a start failed
handshake         the first exchange with the workers
remote_workers    regions of workers that do not see this process's memory
failure_counters  how often each slot's program left rows that were not finite
vllm_errors       vLLM's errors as this project's
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
