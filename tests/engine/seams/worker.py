"""The worker and its model runners: steps, rows, dummy batches, blocks of the KV cache, decoder layers."""

import ast
import re

from tests.engine.seams.source import (
    CPU_RUNNER,
    GPU_WORKER,
    OUTPUT,
    V1_RUNNER,
    V2_RUNNER,
    Source,
    require,
    require_fields,
    require_order,
    require_parameters,
    seam,
)


@seam("Worker.load_model comes before profiling", "engine/worker/worker.py")
def _(source: Source) -> None:
    require("self.model_runner.load_model(" in source.code(GPU_WORKER, "Worker.load_model"), "Worker.load_model moved")
    require(source.bases("v1/worker/cpu_worker.py", "CPUWorker") == {"Worker"}, "CPUWorker is not a Worker")
    for path, name in (
        ("v1/executor/uniproc_executor.py", "UniProcExecutor._init_executor"),
        ("v1/executor/multiproc_executor.py", "WorkerProc.__init__"),
    ):
        require_order(source.code(path, name), name, ".init_device()", ".load_model()")
    code = source.code("v1/engine/core.py", "EngineCore.__init__")
    require_order(code, "EngineCore.__init__", "self.model_executor = executor_class(", "self._initialize_kv_caches(")
    code = source.code("v1/engine/core.py", "EngineCore._initialize_kv_caches")
    require("determine_available_memory()" in code, "EngineCore profiles elsewhere than in _initialize_kv_caches")


@seam("Worker.distributed_init_method", "engine/socket_folder.py")
def _(source: Source) -> str:
    for path, name in ((GPU_WORKER, "Worker.init_device"), ("v1/worker/cpu_worker.py", "CPUWorker.init_device")):
        require("self.distributed_init_method" in source.code(path, name), f"{name} connects the workers otherwise")
    file, name = "utils/network_utils.py", "get_file_store_init_method"
    if not source.has(file, name):
        return "an address"
    require("/vllm_dist_{uuid4().hex}" in source.code(file, name), "the workers' file has another name")
    return "a file"


@seam("Worker.execute_model", "engine/worker/worker.py")
def _(source: Source) -> None:
    require_parameters(source, GPU_WORKER, "Worker.execute_model", ["self", "scheduler_output"])
    require(
        "self.model_runner.execute_model(" in source.code(GPU_WORKER, "Worker.execute_model"), "Worker has no runner"
    )


@seam("AsyncModelRunnerOutput.get_output, called by each executor", "engine/worker/in_flight_steps.py")
def _(source: Source) -> str:
    node = source.find("v1/outputs.py", "AsyncModelRunnerOutput")
    assert isinstance(node, ast.ClassDef)
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    others = methods - {"get_output"}
    require("get_output" in methods, "AsyncModelRunnerOutput has no get_output")
    require(others <= {"get_kv_connector_output"}, f"AsyncModelRunnerOutput also has {', '.join(sorted(others))}")
    for file, call in (("uniproc", "self.async_output.get_output()"), ("multiproc", "output = output.get_output()")):
        path = f"v1/executor/{file}_executor.py"
        require(call in ast.unparse(source.tree(path)), f"{path} asks asynchronous outputs otherwise")
    return ", ".join(sorted(methods))


@seam("SchedulerOutput and NewRequestData", "engine/worker/worker.py")
def _(source: Source) -> None:
    wanted = {"scheduled_new_reqs", "finished_req_ids", "preempted_req_ids", "num_scheduled_tokens"}
    require_fields(source, OUTPUT, "SchedulerOutput", wanted)
    require_fields(source, OUTPUT, "NewRequestData", {"req_id", "sampling_params"})


@seam("a resumed request is new again (V2) or cached (V1)", "engine/worker/worker.py")
def _(source: Source) -> None:
    code = source.code("v1/core/sched/scheduler.py", "Scheduler.schedule")
    pattern = r"if self\.use_v2_model_runner:\s+scheduled_new_reqs\.extend\(scheduled_resumed_reqs\)"
    require(re.search(pattern, code), "Scheduler.schedule treats resumed requests otherwise")


@seam("V1 _prepare_inputs", "engine/worker/batch_rows.py")
def _(source: Source) -> None:
    name = "GPUModelRunner._prepare_inputs"
    require_parameters(source, V1_RUNNER, name, ["self", "scheduler_output", "num_scheduled_tokens"])
    code = source.code(V1_RUNNER, "GPUModelRunner.execute_model")
    calls = ("self._update_states(", "self.input_batch.req_ids", "self._prepare_inputs(", "self._model_forward(")
    require_order(code, "the V1 runner's execute_model", *calls)
    calls_of_it = ast.unparse(source.tree(V1_RUNNER)).count("self._prepare_inputs(")
    require(calls_of_it == 1, f"the V1 runner calls _prepare_inputs in {calls_of_it} places and not once per step")


@seam("V1 input_batch.req_ids, num_computed_tokens_cpu", "engine/worker/batch_rows.py")
def _(source: Source) -> None:
    path = "v1/worker/gpu_input_batch.py"
    require("return cast(list[str], self._req_ids)" in source.code(path, "InputBatch.req_ids"), "req_ids is not a list")
    require("self.num_computed_tokens_cpu = " in source.code(path, "InputBatch.__init__"), "no num_computed_tokens_cpu")
    require("self.input_batch = InputBatch(" in source.code(V1_RUNNER, "GPUModelRunner.__init__"), "no input_batch")
    code = source.code(V1_RUNNER, "GPUModelRunner._prepare_inputs")
    require_order(code, "positions of the V1 runner", "self.input_batch.num_computed_tokens_cpu[req_indices]")


@seam("V2 prepare_inputs", "engine/worker/batch_rows.py")
def _(source: Source) -> str:
    parameters = source.parameters(V2_RUNNER, "GPUModelRunner.prepare_inputs")
    require(parameters[:2] == ["self", "scheduler_output"], f"prepare_inputs takes {', '.join(parameters)}")
    returns = ast.unparse(source.find(V2_RUNNER, "GPUModelRunner.prepare_inputs").returns)  # type: ignore[attr-defined]
    require(returns == "InputBatch", f"prepare_inputs returns {returns}")
    require("self.req_states" in source.code(V2_RUNNER, "GPUModelRunner.__init__"), "the V2 runner has no req_states")
    return f"takes {', '.join(parameters[1:])}"


@seam("V2 dummy batches do not pass prepare_inputs", "engine/worker/batch_rows.py")
def _(source: Source) -> None:
    tree = source.find(V2_RUNNER, "GPUModelRunner.execute_model")
    inside = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "not dummy_run"
        and any("self.prepare_inputs(" in ast.unparse(part) for part in node.body)
        and any("InputBatch.make_dummy(" in ast.unparse(part) for part in node.orelse)
    ]
    require(len(inside) == 1, "execute_model does not choose between prepare_inputs and make_dummy by dummy_run")
    calls = ast.unparse(source.tree(V2_RUNNER)).count("self.prepare_inputs(")
    require(calls == 1, f"the V2 runner calls prepare_inputs in {calls} places and not once per step")


@seam("V2 InputBatch", "engine/worker/batch_rows.py")
def _(source: Source) -> None:
    wanted = {"req_ids", "query_start_loc_np", "num_scheduled_tokens", "num_computed_tokens_np"}
    require_fields(source, "v1/worker/gpu/input_batch.py", "InputBatch", wanted)
    code = source.code(V2_RUNNER, "GPUModelRunner.prepare_inputs")
    require(
        re.search(r"np\.cumsum\(num_scheduled_tokens\w*, out=query_start_loc_np\[1:num_reqs \+ 1\]\)", code),
        "query_start_loc_np no longer is the running sum of num_scheduled_tokens",
    )
    require_order(code, "V2 prepare_inputs", "query_start_loc_np[num_reqs + 1:] = num_tokens")
    require_order(code, "V2 prepare_inputs", "self.req_states.num_computed_tokens_np[idx_mapping_np]")


@seam("V2 rows that the device alone knows", "engine/worker/batch_rows.py")
def _(source: Source) -> str:
    code = source.code(V2_RUNNER, "GPUModelRunner.prepare_inputs")
    if "adaptive_verification" not in code:
        return "no adaptive verification, no context-parallel prefill"
    require_order(
        code, "V2 prepare_inputs", "num_scheduled_tokens_upper_bound = num_scheduled_tokens_np", "compact_batch("
    )
    require(
        "num_scheduled_tokens=num_scheduled_tokens_upper_bound" in code, "num_scheduled_tokens is not the schedule's"
    )
    name = "self.pcp_manager = pcp.maybe_build_pcp_manager("
    require(name in source.code(V2_RUNNER, "GPUModelRunner"), "the V2 runner has no pcp_manager to tell by")
    early = name in source.code(V2_RUNNER, "GPUModelRunner.__init__")
    return (
        f"both exist and are refused; pcp_manager is made {'with the runner' if early else 'after the model is loaded'}"
    )


@seam("which runner a worker has", "engine/worker/batch_rows.py")
def _(source: Source) -> str:
    code = source.code("v1/worker/cpu_worker.py", "CPUWorker.init_device")
    require("self.use_v2_model_runner" in code, "CPUWorker no longer asks use_v2_model_runner")
    needs = "HAS_TRITON" in source.code("config/vllm.py", "VllmConfig.use_v2_model_runner")
    return "V2 by default where Triton works" if needs else "V2 only for models on a list, or if asked for"


@seam("V2 dummy batches: ids are zeroed, then prepare_dummy_attn, then the model", "engine/worker/dummy_run.py")
def _(source: Source) -> None:
    code = source.code(V2_RUNNER, "GPUModelRunner.execute_model")
    calls = ("InputBatch.make_dummy(", "self.prepare_dummy_attn(input_batch", "run_fullgraph(")
    require_order(code, "V2 execute_model", *calls)
    path = "v1/worker/gpu/input_batch.py"
    ids = "input_ids = input_buffers.input_ids[:num_tokens].zero_()"
    require(ids in source.code(path, "InputBatch.make_dummy"), "make_dummy treats input_ids otherwise")
    require("self.input_ids = " in source.code(path, "InputBuffers.__init__"), "InputBuffers has no input_ids")
    dummy = source.code(V2_RUNNER, "GPUModelRunner._dummy_run")
    require("self.intermediate_tensors[:num_tokens]" in dummy, "a later stage's dummy run has other inputs")
    require_order(dummy, "V2 _dummy_run", "self.execute_model(", "return (None, None)", "return (hidden_states, ")


@seam("_dummy_run", "engine/worker/dummy_run.py")
def _(source: Source) -> None:
    require_parameters(source, V1_RUNNER, "GPUModelRunner._dummy_run", ["self", "num_tokens"])
    taken = source.parameters(V1_RUNNER, "GPUModelRunner._dummy_run")
    for name in ("force_attention", "uniform_decode", "skip_eplb", "num_active_loras", "profile_seq_lens"):
        require(name in taken, f"the V1 runner's dummy runs take no {name}")
    require("uniform_decode" in source.parameters(V2_RUNNER, "GPUModelRunner._dummy_run"), "V2 takes no uniform_decode")
    require_parameters(source, V2_RUNNER, "GPUModelRunner._dummy_run", ["self", "num_tokens"])
    code = source.code(V1_RUNNER, "GPUModelRunner._dummy_run")
    require("self._prepare_inputs(" not in code, "the V1 runner's dummy steps now pass _prepare_inputs")


@seam("classes of steps", "engine/worker/dispatch.py")
def _(source: Source) -> None:
    path, graphs = "v1/cudagraph_dispatcher.py", "v1/worker/gpu/cudagraph_utils.py"
    determine = source.code(V1_RUNNER, "GPUModelRunner._determine_batch_execution_and_padding")
    require_order(determine, "V1 dispatch", "return (cudagraph_mode, batch_descriptor,")
    require("{CUDAGraphMode.NONE} if force_eager else" in determine, "the V1 runner has no force_eager")
    execute = source.code(V1_RUNNER, "GPUModelRunner.execute_model")
    require_order(execute, "V1 step", "self._prepare_inputs(", "self._determine_batch_execution_and_padding(")
    dispatch = source.code(graphs, "CudaGraphManager.dispatch")
    require("if self._graphs_captured and" in dispatch, "V2 finds graphs that are not captured")
    require(
        "self.cudagraph_keys: dict[CUDAGraphMode, set[BatchDescriptor]]" in source.code(path, "CudagraphDispatcher"),
        "no keys",
    )
    require_fields(source, "forward_context.py", "BatchDescriptor", {"num_tokens", "num_active_loras"})
    names = source.parameters(graphs, "CudaGraphManager.dispatch")
    wanted = ["self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"]
    require(names[: len(wanted)] == wanted, "CudaGraphManager.dispatch takes others")
    for attribute in ("self._capture_descs", "self._graphs_captured"):
        require(attribute in source.code(graphs, "CudaGraphManager"), f"no {attribute}")
    wanted_fields = {"cg_mode", "num_tokens", "num_active_loras"}
    require_fields(source, graphs, "BatchExecutionDescriptor", wanted_fields)
    name = "dispatch_cg_and_sync_dp"
    calls = source.code("v1/worker/gpu/dp_utils.py", name)
    require("cudagraph_manager.dispatch(num_reqs, num_tokens," in calls, f"{name} gives dispatch other arguments")


@seam("groups of ranks", "engine/worker/rank_agreement.py")
def _(source: Source) -> None:
    code = source.code("distributed/parallel_state.py", "GroupCoordinator")
    for attribute in ("self.cpu_group", "self.world_size"):
        require(attribute in code, f"no {attribute}")
    for name in ("get_tp_group", "get_pp_group"):
        require(source.has("distributed/parallel_state.py", name), f"no {name}")


@seam("padding of dummy runs", "engine/worker/dummy_run.py")
def _(source: Source) -> str:
    v2 = source.code("v1/worker/gpu/input_batch.py", "InputBatch.make_dummy")
    if not source.has(V1_RUNNER, "GPUModelRunner._prepare_padding_mask"):
        require("is_padding" not in v2, "only the V2 runner marks padding")
        return "no runner marks it"
    names = source.parameters(V1_RUNNER, "GPUModelRunner._prepare_padding_mask")
    require(names == ["self", "num_tokens_unpadded", "num_tokens_padded"], "_prepare_padding_mask takes others")
    require("self._prepare_padding_mask(" in source.code(V1_RUNNER, "GPUModelRunner._dummy_run"), "it is not called")
    require("input_buffers.is_padding[:num_tokens].fill_(" in v2, "make_dummy has another mask")
    return ""


@seam("V1 runner.requests[...].block_ids, kv_cache_config", "engine/worker/kv_zeroing.py")
def _(source: Source) -> str:
    require("self.requests: dict[str, CachedRequestState]" in source.code(V1_RUNNER, "GPUModelRunner"), "no requests")
    require_fields(source, "v1/worker/gpu_input_batch.py", "CachedRequestState", {"block_ids"})
    require("self.kv_cache_config = " in source.code(V1_RUNNER, "GPUModelRunner"), "no kv_cache_config")
    wanted = {"num_blocks", "kv_cache_groups"}
    require_fields(source, "v1/kv_cache_interface.py", "KVCacheConfig", wanted)
    has_requests = "self.requests" in source.code(V2_RUNNER, "GPUModelRunner")
    return "also in the V2 runner" if has_requests else "not in the V2 runner, which keeps block tables"


@seam("V2 block_tables", "engine/worker/kv_zeroing.py")
def _(source: Source) -> str:
    path = "v1/worker/gpu/block_table.py"
    require("self.block_tables = BlockTables(" in source.code(V2_RUNNER, "GPUModelRunner"), "no block_tables")
    require("self.req_id_to_index" in source.code("v1/worker/gpu/states.py", "RequestState.__init__"), "no places")
    code = source.code(path, "BlockTables.append_block_ids")
    require_order(code, "append_block_ids", "self.block_tables[i].stage_write(req_index, start, block_ids)")
    require("self.num_blocks.np[i, req_index] = " in code, "num_blocks counts otherwise")
    require_order(
        source.code(V2_RUNNER, "GPUModelRunner.execute_model"),
        "V2 execute_model",
        "self.block_tables.apply_staged_writes()",
        "self.prepare_inputs(",
    )
    return "of a kernel's smaller blocks" if "blocks_per_kv_block" in code else "of the scheduler's blocks"


@seam("static_forward_context[layer].kv_cache, blocks in dimension 0", "engine/worker/kv_zeroing.py")
def _(source: Source) -> str:
    require_fields(source, "config/compilation.py", "CompilationConfig", {"static_forward_context"})
    code = ast.unparse(source.tree("v1/worker/utils.py"))
    bound = "forward_context[layer_name].kv_cache = kv_cache", "forward_context[layer_name].bind_kv_cache(kv_cache)"
    require(any(way in code for way in bound), "a layer's kv_cache is bound otherwise")
    backend = "v1/attention/backends/cpu_attn.py"
    if source.has(backend, "CPUAttentionBackend.get_kv_cache_shape"):
        code = source.code(backend, "CPUAttentionBackend.get_kv_cache_shape")
        require(re.search(r"return \(num_blocks,", code), "the CPU's cache does not have its blocks in dimension 0")
        return "from get_kv_cache_shape"
    code = source.code(CPU_RUNNER, "CPUModelRunner._zero_block_ids")
    require("kv[block_id].zero_()" in code, "the CPU's cache does not have its blocks in dimension 0")
    return "as the CPU runner's own _zero_block_ids takes it"


@seam("_zero_block_ids", "engine/worker/kv_zeroing.py")
def _(source: Source) -> str:
    name = "CPUModelRunner._zero_block_ids"
    require_parameters(source, V1_RUNNER, "GPUModelRunner._zero_block_ids", ["self", "block_ids"])
    require_parameters(source, CPU_RUNNER, name, ["self", "block_ids"])
    require("self.kv_block_zeroer" in source.code(V2_RUNNER, "GPUModelRunner.__init__"), "V2 has no kv_block_zeroer")
    zeroes = ".zero_()" in source.code(CPU_RUNNER, name)
    return "zeroes on the CPU" if zeroes else "does nothing on the CPU"


@seam("verified layers return hidden and residual", "engine/worker/hooks.py")
def _(source: Source) -> None:
    for file, name in (("llama.py", "LlamaDecoderLayer"), ("qwen3.py", "Qwen3DecoderLayer")):
        code = source.code(f"model_executor/models/{file}", f"{name}.forward")
        require(code.rstrip().endswith("return (hidden_states, residual)"), f"{name}.forward returns something else")


@seam("a worker that exits ends the engine", "engine/worker/worker.py")
def _(source: Source) -> None:
    executor = "v1/executor/multiproc_executor.py"
    code = source.code(executor, "WorkerProc.worker_main")
    require("except SystemExit" in code, "a worker does not end with SystemExit")
    code = source.code(executor, "MultiprocExecutor.start_worker_monitor")
    require_order(code, "start_worker_monitor", "h.proc.sentinel for h in workers", "_self.shutdown()", "callback()")


@seam("WorkerProc._init_message_queues makes a MessageQueue without a size", "engine/vllm_patches/response_ring.py")
def _(source: Source) -> None:
    code = source.code("v1/executor/multiproc_executor.py", "WorkerProc._init_message_queues")
    require("MessageQueue(1, 1)" in code, "WorkerProc gives its ring a size, or makes it elsewhere")
    code = source.code("distributed/device_communicators/shm_broadcast.py", "MessageQueue.__init__")
    require("max_chunk_bytes" in code, "MessageQueue has no max_chunk_bytes")


@seam("Attention.sliding_window, per-layer embeddings of Gemma 4", "engine/worker/model_checks.py")
def _(source: Source) -> None:
    found = [source.folder / path for path in ("model_executor/layers/attention/attention.py", "attention/layer.py")]
    code = next((path.read_text(encoding="utf-8") for path in found if path.exists()), "")
    require("self.sliding_window = sliding_window" in code, "Attention has no sliding_window")
    gemma4 = source.folder / "model_executor/models/gemma4.py"
    if gemma4.exists():
        require("self.per_layer_input_gate" in gemma4.read_text(encoding="utf-8"), "Gemma 4 has no such gate")
