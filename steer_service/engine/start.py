"""Loads a model with vLLM, without blocking the event loop.

Relies on (vLLM 0.24 to 0.33): `AsyncLLM.from_engine_args`, which chooses batch sizes by its `usage_context`;
`AsyncLLM.output_handler`, the task that reads outputs, and `OutputProcessor.propagate_error`, which fails all requests.
tests/engine/test_seams.py and test_server_defaults.py notice a change.
"""

import asyncio
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.envs import enable_envs_cache
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_service.core.backend import ModelInfo
from steer_service.core.errors import EngineFailed, SteerError
from steer_service.core.number_limits import MAX_LOGPROBS
from steer_service.engine.processes import MEMORY, EngineProcesses
from steer_service.engine.prompt_room import gives_up_room, most_prompt_tokens, users_limit
from steer_service.engine.socket_folder import remove_dead_files, use_own_socket_folder
from steer_service.engine.start_log import StartLog
from steer_service.engine.start_method import check_start_method
from steer_service.engine.steering_config import ADDITIONAL_CONFIG_KEY, SteeringConfig
from steer_service.engine.vllm_patches.contained_outputs import contain_failures
from steer_service.engine.vllm_patches.end_tokens import drop_unknown_end_tokens
from steer_service.runtime.cache_folders import use_cache_folders
from steer_service.runtime.token_texts import special_token_ids
from steer_service.shm.message_rings import VARIABLE as RINGS
from steer_service.shm.message_rings import fitting_rings, free_bytes_of, why_too_small

logger = logging.getLogger(__name__)

CANCEL_POLL_S = 0.1
"""Interval at which a cancelled start looks for processes to end, in seconds."""

SERVER = UsageContext.OPENAI_API_SERVER
"""What vLLM's own server says that it is: sequences and tokens of a step are then a server's, not a library's."""

VLLM_MAX_TEMPERATURE = 2.0
"""vLLM refuses higher ones."""

REGEX_TIMEOUT = "VLLM_REGEX_COMPILATION_TIMEOUT_S"
"""vLLM's limit of the time that a regular expression takes, by the clock; 0 is none.

`constraints` has compiled each of them before, in processor time. On a busy host vLLM's limit would fail requests whose
expression is good, and in vLLM 0.24 the whole engine."""

SHUTDOWN_TIMEOUT_S = 30.0
"""Time that vLLM's processes get to end, in seconds. After vLLM's own 5 s they are killed and leave shared memory."""


async def start_llm(arguments: AsyncEngineArgs) -> tuple[AsyncLLM, EngineProcesses]:
    """Loads the model in a thread. If cancelled, ends the processes started so far and waits for the thread.

    Raises EngineFailed if `/dev/shm` or the directory of captures is too small, or if vLLM does not start; the message
    then has the exception of the process that failed.
    """
    check_start_method(os.environ)
    for warning in use_cache_folders():
        logger.warning(warning)
    choose_rings(arguments, arguments.additional_config[ADDITIONAL_CONFIG_KEY].config.segments.path)
    use_own_socket_folder()
    os.environ.setdefault(REGEX_TIMEOUT, "0")
    before = set(multiprocessing.active_children())
    loading = asyncio.ensure_future(asyncio.to_thread(_load, arguments))
    try:
        return await asyncio.shield(loading)
    except asyncio.CancelledError:
        while not loading.done():
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()  # vLLM notices that its engine core died and gives up
            await asyncio.wait([loading], timeout=CANCEL_POLL_S)
        if loading.exception() is None:
            await shut_down(*loading.result())
        raise


def choose_rings(arguments: AsyncEngineArgs, captures: Path) -> None:
    """Makes the rings between vLLM's processes small enough for `/dev/shm`; raises EngineFailed if nothing fits."""
    memory = Path(MEMORY)
    rings = fitting_rings(_workers_with_rings(arguments), _free_bytes(memory), os.environ)
    problem = why_too_small(rings, memory, captures)
    if problem:
        raise EngineFailed(problem, reason="SHM_TOO_SMALL")
    if rings.workers and rings.largest_mib is not None and RINGS not in os.environ:
        os.environ[RINGS] = str(rings.largest_mib)
        logger.info("%s is small: messages above %d MiB go through sockets (%s)", memory, rings.largest_mib, RINGS)


def _free_bytes(memory: Path) -> int | None:
    return free_bytes_of(memory) if memory.is_dir() else 0


def _workers_with_rings(arguments: AsyncEngineArgs) -> int:
    """Workers on this host that are processes beside an engine core."""
    workers = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    is_alone = workers == 1 and arguments.distributed_executor_backend != "mp" and not current_platform.is_cpu()
    return 0 if is_alone else workers * (arguments.data_parallel_size_local or arguments.data_parallel_size)


def keep_settings() -> None:
    """Makes vLLM read its environment variables no more: it looks one up for each token.

    For servers: what the variables say later has no effect in this process.
    """
    enable_envs_cache()


async def shut_down(llm: AsyncLLM, processes: EngineProcesses) -> None:
    """Ends vLLM's processes and removes what they leave behind; requests in flight fail.

    If one of the processes has died, the others are killed.
    """
    if llm.errored:
        processes.kill()
    # The task that reads outputs would do the same, but log the end of the engine core as a failure.
    if llm.output_handler is not None:
        llm.output_handler.cancel()
        llm.output_processor.propagate_error(EngineDeadError())
    await asyncio.to_thread(llm.shutdown, SHUTDOWN_TIMEOUT_S)
    await processes.remove()
    remove_dead_files(use_own_socket_folder())


def model_info(
    llm: AsyncLLM,
    config: SteeringConfig,
    adapters: tuple[str, ...],
    aliases: tuple[str, ...],
    max_model_len: int | None,
) -> ModelInfo:
    """Facts about the loaded model. `aliases`: its names but the first, which vLLM's configuration does not keep.

    `max_model_len`: the limit that the user asked for.
    """
    model = llm.model_config
    names = model.served_model_name
    size, vocab_size = config.bank_size(model.get_hidden_size()), model.get_vocab_size()
    return ModelInfo(
        name=names if isinstance(names, str) else names[0],
        adapters=adapters,
        aliases=aliases,
        architecture=model.architecture,
        layer_count=model.get_total_num_hidden_layers(),
        hidden_size=model.get_hidden_size(),
        vocab_size=vocab_size,
        max_model_len=users_limit(max_model_len, model.max_model_len),
        max_prompt_tokens=most_prompt_tokens(model.max_model_len),
        dtype=str(model.dtype).removeprefix("torch."),
        max_programs=size.slots,
        max_operations=size.rows,
        max_operations_per_layer=size.operations_per_layer,
        max_logprobs=min(MAX_LOGPROBS, vocab_size if model.max_logprobs < 0 else model.max_logprobs, vocab_size),
        max_temperature=VLLM_MAX_TEMPERATURE,
        special_token_ids=special_token_ids(llm.renderer.get_tokenizer(), model.get_vocab_size()),
    )


def names_of(served: str | Sequence[str]) -> tuple[str, ...]:
    """The names under which the model is served, each once: vLLM's `served_model_name` is one or several."""
    return tuple(dict.fromkeys([served] if isinstance(served, str) else served))


def _load(arguments: AsyncEngineArgs) -> tuple[AsyncLLM, EngineProcesses]:
    try:
        return _load_once(arguments)
    except EngineFailed as error:
        if not gives_up_room(arguments, error.message):
            raise
    logger.warning(
        "the KV cache has memory for %s tokens and no more: starting again, for prompts of one token less",
        arguments.max_model_len,
    )
    return _load_once(arguments)


def _load_once(arguments: AsyncEngineArgs) -> tuple[AsyncLLM, EngineProcesses]:
    log = StartLog()
    try:
        with log:
            llm = AsyncLLM.from_engine_args(arguments, usage_context=SERVER)
            processes = EngineProcesses.of(llm)
    except SteerError:
        raise
    except Exception as error:  # vLLM raises any type, and hides the errors of its processes
        raise EngineFailed(f"vLLM did not start: {log.cause_of(error)}", reason="START_FAILED") from error
    contain_failures(llm.output_processor)
    drop_unknown_end_tokens(llm)
    return llm, processes
