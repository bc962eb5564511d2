"""vLLM, in the API server process; `worker/` runs in its workers, `vllm_patches/` mostly in its engine core.

engine            VLLMEngine: a request from `submit` to its last event
engine_request    one output of a request: its slot, its vLLM request, its events
output_rows       an output's rows as the workers marked and captured them
region_pool       reserves and frees regions
mark_memory       shared memory of outputs that are steered and not captured
region            shared memory of one output: marks and captured rows
slots             which program is in which slot of the bank
prefix_cache      the salt of a request's prefix-cache blocks
messages          what the API server process and the workers send each other
constraints       checks the constraints of structured outputs before vLLM has them
constraint_child  the process that does so
sampling          sampling options converted to vLLM's, and vLLM's tokens to TokenDeltas
lora              LoRA adapters
model             VLLMSteeringModel: the engine for scripts and notebooks
config            engine arguments: vLLM's and this project's
steering_config   this project's arguments, without vLLM
refusals          engine arguments that are refused, with the reason
start             loads a model with vLLM
processes         vLLM's processes, and what is left when they are killed
heart             signs of life of each process, in memory that the API server process reads
hang_detector     decides from them whether the engine hangs
hang_watch        kills the processes of an engine that hangs, for servers
socket_folder     the folder of the files that vLLM's processes leave behind
start_method      how vLLM starts its processes, without vLLM
start_log         finds the exception that made a start fail
handshake         the first exchange with the workers
remote_workers    regions of workers that do not share the API server process's memory
failure_counters  cells in shared memory: failures of programs, faults of workers
worker_faults     notices that the engine cannot go on
vllm_logs         the level and the form of the lines that vLLM logs
vllm_errors       converts vLLM's errors to this project's
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steer_service.engine.model import VLLMSteeringModel

__all__ = ["VLLMSteeringModel"]


def __getattr__(name: str) -> Any:
    """Imports `VLLMSteeringModel` on first use, because the workers import this folder and do not need it."""
    if name == "VLLMSteeringModel":
        from steer_service.engine.model import VLLMSteeringModel

        return VLLMSteeringModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
