"""AsyncLLM in the API server process, and the processes and the scheduler of the engine core."""

import ast
import re

from tests.engine.seams.source import (
    ARGUMENTS,
    ASYNC_LLM,
    KV_COORDINATOR,
    KV_MANAGER,
    V1_RUNNER,
    Source,
    require,
    require_fields,
    require_order,
    require_parameters,
    seam,
)


@seam("AsyncLLM.generate aborts what is closed", "engine/engine.py")
def _(source: Source) -> None:
    require_parameters(source, ASYNC_LLM, "AsyncLLM.generate", ["self", "prompt", "sampling_params", "request_id"])
    code = source.code(ASYNC_LLM, "AsyncLLM.generate")
    require_order(
        code, "AsyncLLM.generate", "except (asyncio.CancelledError, GeneratorExit)", "await self.abort(", "raise"
    )


@seam("AsyncLLM.abort ends generate with an output", "engine/engine_request.py")
def _(source: Source) -> None:
    require_parameters(source, ASYNC_LLM, "AsyncLLM.abort", ["self", "request_id"])
    code = source.code(ASYNC_LLM, "AsyncLLM.abort")
    order = "self.output_processor.abort_requests(", "await self.engine_core.abort_requests_async("
    require_order(code, "AsyncLLM.abort", *order)
    code = source.code("v1/engine/output_processor.py", "OutputProcessor.abort_requests")
    order = "self.external_req_ids.pop(request_id", "finish_reason=FinishReason.ABORT", "req_state.queue.put("
    require_order(code, "OutputProcessor.abort_requests", *order)


@seam("AsyncLLM.collective_rpc", "engine/engine.py")
def _(source: Source) -> None:
    wanted = ["self", "method", "timeout", "args", "kwargs"]
    require_parameters(source, ASYNC_LLM, "AsyncLLM.collective_rpc", wanted)


@seam("AsyncLLM: shutdown, errored, renderer, configuration", "engine/engine.py")
def _(source: Source) -> None:
    require("timeout" in source.parameters(ASYNC_LLM, "AsyncLLM.shutdown"), "AsyncLLM.shutdown takes no timeout")
    require(source.has(ASYNC_LLM, "AsyncLLM.errored"), "AsyncLLM has no errored")
    code = source.code(ASYNC_LLM, "AsyncLLM.__init__")
    for name in ("vllm_config", "model_config", "renderer"):
        require(f"self.{name} = " in code, f"AsyncLLM has no {name}")
    for name in ("architecture", "get_total_num_hidden_layers", "get_hidden_size", "get_vocab_size"):
        require(source.has("config/model.py", f"ModelConfig.{name}"), f"ModelConfig has no {name}")
    require(source.has("renderers/base.py", "BaseRenderer.get_tokenizer"), "the renderer has no get_tokenizer")


@seam("AsyncLLM.output_handler and OutputProcessor.propagate_error", "engine/start.py")
def _(source: Source) -> None:
    code = source.code(ASYNC_LLM, "AsyncLLM._run_output_handler")
    require("self.output_handler = asyncio.create_task(" in code, "the task that reads outputs is kept elsewhere")
    require("propagate_error(e)" in code, "a dead engine core is reported in another way")
    code = source.code("v1/engine/output_processor.py", "OutputProcessor.propagate_error")
    require("state.queue.put(e)" in code, "propagate_error does not reach the requests' queues")


@seam("OutputProcessor.process_outputs, one output at a time", "engine/vllm_patches/contained_outputs.py")
def _(source: Source) -> None:
    code = source.code(ASYNC_LLM, "AsyncLLM._run_output_handler")
    require("output_processor.process_outputs(" in code, "the task that reads outputs processes them otherwise")
    file = "v1/engine/output_processor.py"
    code = source.code(file, "OutputProcessor.process_outputs")
    require("for engine_core_output in engine_core_outputs:" in code, "outputs are not processed one by one")
    require("self.request_states.get(req_id)" in code, "the states of requests are kept elsewhere")
    code = source.code(file, "RequestOutputCollector.put")
    require("isinstance(output, Exception)" in code, "a request's queue does not take an exception")
    require(source.has(file, "OutputProcessorOutput"), "there is no OutputProcessorOutput")


@seam("end-of-sequence tokens", "engine/vllm_patches/end_tokens.py")
def _(source: Source) -> None:
    require(source.has("renderers/base.py", "BaseRenderer.get_eos_token_id"), "the renderer has no get_eos_token_id")
    code = source.code("v1/engine/input_processor.py", "InputProcessor")
    require("self.renderer.get_eos_token_id()" in code, "the end token is found otherwise")
    require("self.generation_config_fields = " in code, "other end tokens are kept elsewhere")


@seam("errors of AsyncLLM.generate", "engine/engine.py")
def _(source: Source) -> str:
    require(source.has("v1/engine/exceptions.py", "EngineDeadError"), "there is no EngineDeadError")
    code = source.code(ASYNC_LLM, "AsyncLLM.generate")
    if source.has("exceptions.py", "VLLMClientError") and source.has("exceptions.py", "GracefulHTTPError"):
        require("VLLMClientError" in code, "AsyncLLM.generate does not let VLLMClientError through")
        return "VLLMClientError, GracefulHTTPError"
    require("except ValueError" in code, "AsyncLLM.generate neither knows VLLMClientError nor lets ValueError through")
    return "a refused request is a ValueError; no overload error"


@seam("cache_salt of a prompt", "engine/engine.py")
def _(source: Source) -> None:
    require_fields(source, "inputs/llm.py", "_PromptOptions", {"cache_salt"})
    require("_PromptOptions" in source.bases("inputs/llm.py", "TokensPrompt"), "TokensPrompt has no cache_salt")
    code = source.code("v1/core/kv_cache_utils.py", "generate_block_hash_extra_keys")
    require("request.cache_salt" in code, "cache_salt is no longer part of a block's hash")


@seam("SamplingParams.detokenize", "engine/sampling.py")
def _(source: Source) -> None:
    require_fields(source, "sampling_params.py", "SamplingParams", {"detokenize"})
    name = "RequestState.from_new_request"
    wanted = (
        "if not sampling_params.detokenize:",
        "tokenizer = None",
        "LogprobsProcessor.from_new_request(",
        "IncrementalDetokenizer.from_new_request(",
    )
    require_order(source.code("v1/engine/output_processor.py", name), name, *wanted)
    code = source.code("v1/engine/detokenizer.py", "IncrementalDetokenizer.from_new_request")
    require("if tokenizer is None:" in code, "a request without a tokenizer is detokenized")
    code = source.code("v1/engine/logprobs.py", "LogprobsProcessor")
    require("if self.tokenizer is None" in code, "log-probabilities of a request without a tokenizer are detokenized")


@seam("AsyncLLM.generate takes a priority and trace headers", "engine/engine_request.py")
def _(source: Source) -> None:
    for name in ("priority", "trace_headers"):
        require(name in source.parameters(ASYNC_LLM, "AsyncLLM.generate"), f"AsyncLLM.generate takes no {name}")
    require_fields(source, "config/scheduler.py", "SchedulerConfig", {"policy"})
    require_fields(source, ARGUMENTS, "EngineArgs", {"scheduling_policy"})


@seam("ModelConfig.get_diff_sampling_param", "engine/generation_config.py")
def _(source: Source) -> None:
    name = "ModelConfig.get_diff_sampling_param"
    code = source.code("config/model.py", name)
    require_order(code, name, "self.try_get_generation_config()", "'max_tokens'")
    for option in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        require(f"'{option}'" in code, f"{name} has no {option}")


@seam("RequestOutput.prompt_logprobs", "engine/sampling.py")
def _(source: Source) -> None:
    require_fields(source, "sampling_params.py", "SamplingParams", {"prompt_logprobs"})
    code = source.code("v1/engine/output_processor.py", "RequestState._new_request_output")
    require("self.logprobs_processor.pop_prompt_logprobs()" in code, "log-probabilities of a prompt come otherwise")
    code = source.code(V1_RUNNER, "GPUModelRunner._get_prompt_logprobs_dict")
    require(
        "request.in_progress_prompt_logprobs_cpu = logprobs_tensors" in code, "those of a step do not wait for others"
    )
    require("num_remaining_tokens" in code, "the last step of a prompt is found otherwise")


@seam("constraints of structured outputs", "engine/constraints.py")
def _(source: Source) -> None:
    fields = {"json", "regex", "choice", "grammar", "_backend"}
    require_fields(source, "sampling_params.py", "StructuredOutputsParams", fields)
    require_fields(source, ARGUMENTS, "EngineArgs", {"structured_outputs_config"})
    wanted = {"backend", "disable_any_whitespace"}
    require_fields(source, "config/structured_outputs.py", "StructuredOutputsConfig", wanted)
    name = "SamplingParams._validate_structured_outputs"
    code = source.code("sampling_params.py", name)
    require_order(code, name, "backend.startswith('xgrammar')", "validate_xgrammar_grammar(self)")
    file = "v1/structured_output/backend_xgrammar.py"
    code = source.code(file, "validate_xgrammar_grammar")
    require("so_params.grammar = choice_grammar" in code, "choices become no grammar")
    code = source.code(file, "XgrammarBackend.__post_init__")
    require("self.compiler" in code, "the backend keeps its compiler elsewhere")
    name = "XgrammarBackend.compile_grammar"
    code = source.code(file, name)
    for call in ("compile_json_schema(", "any_whitespace=not self.disable_any_whitespace", "compile_grammar("):
        require(call in code, f"{name} does not call {call}")
    require("self.compiler.compile_regex" in code, f"{name} compiles regular expressions otherwise")


@seam("grammars of requests, and what their refusal does", "engine/vllm_patches/constraint_budget.py")
def _(source: Source) -> None:
    file, scheduler = "v1/structured_output/__init__.py", "v1/core/sched/scheduler.py"
    code = source.code(file, "StructuredOutputManager.grammar_init")
    require("self.executor.submit(self._create_grammar, request)" in code, "grammars are made elsewhere")
    code = source.code(file, "StructuredOutputManager._create_grammar")
    require("return self.backend.compile_grammar(" in code, "_create_grammar returns something else")
    require("grammar.fill_bitmask(" in source.code(file, "StructuredOutputManager"), "masks are made otherwise")
    code = source.code(scheduler, "Scheduler.get_grammar_bitmask")
    require("self.structured_output_manager.grammar_bitmask(" in code, "the masks of a step are made elsewhere")
    code = source.code(file, "StructuredOutputManager.__init__")
    require("self.executor_for_fillmask = ThreadPoolExecutor(" in code, "many masks are made in other threads")
    code = source.code("v1/structured_output/backend_xgrammar.py", "XgrammarGrammar.fill_bitmask")
    require("fill_next_token_bitmask(bitmask, idx)" in code, "a row of a mask is written otherwise")
    code = source.code(scheduler, "Scheduler.update_from_output")
    accepted = ".accept_tokens(", "request.status = RequestStatus.FINISHED_ERROR", "stop_reason=request.stop_reason"
    require_order(code, "Scheduler.update_from_output", *accepted)
    code = source.code(scheduler, "Scheduler.__init__")
    require("self.structured_output_manager = structured_output_manager" in code, "the manager is kept elsewhere")


@seam("SamplingParams.extra_args, skip_reading_prefix_cache", "engine/sampling.py")
def _(source: Source) -> None:
    require_fields(source, "sampling_params.py", "SamplingParams", {"extra_args", "skip_reading_prefix_cache"})
    code = source.code(KV_MANAGER, "KVCacheManager")
    require("request.skip_reading_prefix_cache" in code, "KVCacheManager ignores skip_reading_prefix_cache")


@seam("SchedulerConfig.scheduler_cls", "engine/vllm_patches/scheduler.py")
def _(source: Source) -> None:
    require_fields(source, ARGUMENTS, "EngineArgs", {"scheduler_cls"})
    code = source.code("config/scheduler.py", "SchedulerConfig.get_scheduler_cls")
    require("return resolve_obj_by_qualname(self.scheduler_cls)" in code, "scheduler_cls is not resolved by its name")
    require("AsyncScheduler" in code and "self.async_scheduling" in code, "the default scheduler is chosen otherwise")
    code = source.code("v1/engine/core.py", "EngineCore.__init__")
    call = re.search(r"self\.scheduler: SchedulerInterface = Scheduler\(([^()]*)", code)
    require(call, "EngineCore makes its scheduler otherwise")
    arguments = [part.strip() for part in call[1].split(",")]  # type: ignore[index]
    require(all("=" in part for part in arguments if part), "EngineCore passes its scheduler arguments without names")


@seam("EngineCore ends on SIGTERM, workers with their core", "engine/vllm_patches/parent_watchdog.py")
def _(source: Source) -> None:
    core, executor = "v1/engine/core.py", "v1/executor/multiproc_executor.py"
    name = "EngineCoreProc.run_engine_core"
    handled = "def signal_handler(", "signal.signal(signal.SIGTERM, signal_handler)", "engine_core.run_busy_loop()"
    require_order(source.code(core, name), name, *handled)
    name = "EngineCore.__init__"
    require_order(source.code(core, name), name, "self.model_executor = executor_class(", "self.scheduler: ")
    code = source.code(executor, "WorkerProc.monitor_death_pipe")
    require("death_pipe.recv()" in code, "a worker does not watch whether its core lives")


@seam("titles of vLLM's processes", "engine/vllm_patches/parent_watchdog.py")
def _(source: Source) -> None:
    code = ast.unparse(source.find("utils/system_utils.py", "set_process_title"))
    require("prefix: str=envs.VLLM_PROCESS_NAME_PREFIX" in code, "titles begin with something else")
    require("setproctitle.setproctitle(f'{prefix}::{name}')" in code, "titles are put together otherwise")
    require("'VLLM_PROCESS_NAME_PREFIX'" in ast.unparse(source.tree("envs.py")), "envs has no VLLM_PROCESS_NAME_PREFIX")
    code = ast.unparse(source.tree("v1/engine/coordinator.py"))
    require("set_process_title('DPCoordinator')" in code, "the process that balances replicas has no title")


@seam("KVCacheManager.get_computed_blocks", "engine/vllm_patches/scheduler.py")
def _(source: Source) -> str:
    name = "KVCacheManager.get_computed_blocks"
    require_parameters(source, KV_MANAGER, name, ["self", "request"])
    require_order(
        source.code(KV_MANAGER, name),
        name,
        "self.coordinator.find_longest_cache_hit(request.block_hashes, max_cache_hit_length)",
    )
    node = source.find(KV_MANAGER, name)
    parameters = ", ".join(source.parameters(KV_MANAGER, name)[1:])
    return f"takes {parameters}; returns {ast.unparse(node.returns)}"  # type: ignore[attr-defined]


@seam("coordinator.find_longest_cache_hit", "engine/vllm_patches/scheduler.py")
def _(source: Source) -> str:
    tree = source.tree(KV_COORDINATOR)
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    holders = [name for name in classes if source.has(KV_COORDINATOR, f"{name}.find_longest_cache_hit")]
    require(len(holders) >= 3, f"find_longest_cache_hit is in {', '.join(holders) or 'no class'} only")
    for name in holders:
        wanted = ["self", "block_hashes", "max_cache_hit_length"]
        require_parameters(source, KV_COORDINATOR, f"{name}.find_longest_cache_hit", wanted)
    node = source.find(KV_COORDINATOR, f"{holders[0]}.find_longest_cache_hit")
    return f"returns {ast.unparse(node.returns)}"  # type: ignore[attr-defined]


@seam("processes of an engine, found from the API server process", "engine/processes.py")
def _(source: Source) -> None:
    code = source.code("v1/engine/utils.py", "CoreEngineProcManager.__init__")
    require("self.processes: list[BaseProcess] = []" in code, "the engine cores are kept elsewhere")
    code = source.code("v1/engine/coordinator.py", "DPCoordinator.__init__")
    require("self.proc: multiprocessing.Process = " in code, "the coordinator's process is kept elsewhere")
    wanted = {"engine_manager", "coordinator", "engine_dead"}
    require_fields(source, "v1/engine/core_client.py", "BackgroundResources", wanted)
    code = source.code("v1/engine/core_client.py", "MPClient.start_engine_core_monitor")
    require("_self.resources.engine_dead = True" in code, "a core that has ended is not noted as dead")
    code = source.code("distributed/device_communicators/shm_broadcast.py", "ShmRingBuffer.__init__")
    require("shared_memory.SharedMemory(create=True" in code, "vLLM's shared memory is not Python's")


@seam("OutputProcessor.has_unfinished_requests", "engine/hang_watch.py")
def _(source: Source) -> None:
    name = "OutputProcessor.has_unfinished_requests"
    require(
        "len(self.request_states)" in source.code("v1/engine/output_processor.py", name), f"{name} counts otherwise"
    )


@seam("VLLM_RPC_BASE_PATH is the folder of all sockets", "engine/socket_folder.py")
def _(source: Source) -> None:
    code = ast.unparse(source.tree("envs.py"))
    require("os.getenv('VLLM_RPC_BASE_PATH', tempfile.gettempdir())" in code, "envs has another VLLM_RPC_BASE_PATH")
    code = source.code("utils/network_utils.py", "get_open_zmq_ipc_path")
    require("envs.VLLM_RPC_BASE_PATH" in code, "sockets are put elsewhere")
    require("{base_rpc_path}/{uuid4()}" in code, "sockets have other names")
