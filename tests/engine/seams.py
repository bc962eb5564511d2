"""What this project relies on in vLLM, as checks on vLLM's source: any version can be asked, with or without a device.

Nothing of vLLM is imported. A check returns a few words on what it found, where versions differ, or raises Moved with a
plain sentence. test_seams.py asks the installed version, check_vllm_version.py any unpacked one.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "steer_service" / "engine"

VERSIONS = ("0.24.0", "0.32.0", "0.33.0")
"""Versions for which a check was run: both ends of the supported range, and the one that the tests run on."""


class Moved(Exception):
    """A seam is not where it was."""


@dataclass(frozen=True)
class Source:
    """The source of one version of vLLM."""

    folder: Path
    """The folder of the package `vllm`."""

    @property
    def version(self) -> str:
        """As its `_version.py` says, or the name of the folder above."""
        path = self.folder / "_version.py"
        found = re.search(r"^__version__\b.*?['\"]([0-9][^'\"]*)", path.read_text(), re.M) if path.exists() else None
        return found[1] if found else self.folder.parent.name

    @cache  # noqa: B019 - a handful of sources live as long as the process
    def tree(self, path: str) -> ast.Module:
        """One file's syntax tree."""
        file = self.folder / path
        if not file.exists():
            raise Moved(f"there is no file {path}")
        return ast.parse(file.read_text())

    def find(self, path: str, name: str) -> ast.AST:
        """A class, function or method, by its dotted name."""
        node: ast.AST = self.tree(path)
        for part in name.split("."):
            node = _child(node, part) or _moved(f"{path} has no {name}")
        return node

    def has(self, path: str, name: str) -> bool:
        """True if `find` would find it."""
        try:
            self.find(path, name)
        except Moved:
            return False
        return True

    def parameters(self, path: str, name: str) -> list[str]:
        """Names of a function's parameters, positional ones first."""
        node = self.find(path, name)
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]

    def fields(self, path: str, name: str) -> set[str]:
        """Annotated fields of a class's own body."""
        node = self.find(path, name)
        assert isinstance(node, ast.ClassDef)
        return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and _is_name(part.target)}

    def bases(self, path: str, name: str) -> set[str]:
        """Names of a class's bases."""
        node = self.find(path, name)
        assert isinstance(node, ast.ClassDef)
        return {ast.unparse(base) for base in node.bases}

    def code(self, path: str, name: str) -> str:
        """The code without comments and layout: strings in single quotes, one statement a line."""
        return ast.unparse(self.find(path, name))


@dataclass(frozen=True)
class Seam:
    """One thing relied on."""

    name: str
    """What moves if it moves."""
    used_by: str
    """File of steer_service that relies on it."""
    check: Callable[[Source], str | None] = field(repr=False)
    """Raises Moved, or returns what is worth knowing of this version."""
    verified: tuple[str, ...] = VERSIONS
    """Versions in which it was found as it is used."""


SEAMS: list[Seam] = []


def seam(name: str, used_by: str, verified: tuple[str, ...] = VERSIONS) -> Callable:
    """Registers a check under the name of what it looks at."""

    def register(check: Callable[[Source], str | None]) -> Callable[[Source], str | None]:
        SEAMS.append(Seam(name, used_by, check, verified))
        return check

    return register


def _child(node: ast.AST, name: str) -> ast.AST | None:
    for part in ast.walk(node) if isinstance(node, ast.Module) else getattr(node, "body", ()):
        if isinstance(part, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name:
            return part
    return None


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _moved(sentence: str) -> ast.AST:
    raise Moved(sentence)


def require(condition: object, sentence: str) -> None:
    if not condition:
        raise Moved(sentence)


def require_order(code: str, where: str, *parts: str) -> None:
    """The parts occur, each after the one before."""
    at = -1
    for part in parts:
        found = code.find(part, at + 1)
        require(found >= 0, f"{where} no longer has {' then '.join(parts)}: {part} is not there or comes earlier")
        at = found


def require_fields(source: Source, path: str, name: str, wanted: set[str]) -> None:
    missing = wanted - source.fields(path, name)
    require(not missing, f"{name} has no {', '.join(sorted(missing))}")


def require_parameters(source: Source, path: str, name: str, wanted: list[str]) -> None:
    found = source.parameters(path, name)[: len(wanted)]
    require(found == wanted, f"{name} takes {', '.join(found)} and not {', '.join(wanted)}")


ARGUMENTS = "engine/arg_utils.py"
GPU_WORKER = "v1/worker/gpu_worker.py"
V1_RUNNER = "v1/worker/gpu_model_runner.py"
V2_RUNNER = "v1/worker/gpu/model_runner.py"
CPU_RUNNER = "v1/worker/cpu_model_runner.py"
ASYNC_LLM = "v1/engine/async_llm.py"
KV_MANAGER = "v1/core/kv_cache_manager.py"
KV_COORDINATOR = "v1/core/kv_cache_coordinator.py"
OUTPUT = "v1/core/sched/output.py"


@seam("names imported from vLLM", "engine/**/*.py")
def _(source: Source) -> str | None:
    for path in sorted(ENGINE.rglob("*.py")):
        for module, name in _imports(ast.parse(path.read_text())):
            file = _file_of(source, module)
            require(
                _exports(source, file, name), f"{module} has no {name}, which engine/{path.relative_to(ENGINE)} imports"
            )
    return None


def _imports(node: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of each import from vLLM, without those that are tried and may fail."""
    if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
        return []
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
        return [(node.module or "", alias.name) for alias in node.names]
    return [found for child in ast.iter_child_nodes(node) for found in _imports(child)]


def _file_of(source: Source, module: str) -> str:
    parts = module.split(".")[1:]
    path = "/".join(parts) + ".py"
    return path if parts and (source.folder / path).exists() else "/".join([*parts, "__init__.py"])


def _exports(source: Source, file: str, name: str) -> bool:
    """True if the module defines, imports or lazily exports the name."""
    return re.search(rf"\b{re.escape(name)}\b", ast.unparse(source.tree(file))) is not None


@seam("EngineArgs.worker_cls, additional_config", "engine/config.py")
def _(source: Source) -> None:
    require_fields(source, ARGUMENTS, "EngineArgs", {"worker_cls", "additional_config"})
    require_fields(source, "config/parallel.py", "ParallelConfig", {"worker_cls"})
    require_fields(source, "config/vllm.py", "VllmConfig", {"additional_config"})
    code = source.code("v1/worker/worker_base.py", "WorkerWrapperBase.init_worker")
    require_order(code, "WorkerWrapperBase.init_worker", "resolve_obj_by_qualname(", "worker_cls")
    for platform in ("cpu", "cuda"):
        code = ast.unparse(source.tree(f"platforms/{platform}.py"))
        require("parallel_config.worker_cls == 'auto'" in code, f"platforms/{platform}.py replaces a named worker_cls")


@seam("additional_config is part of the compile cache's key", "engine/config.py")
def _(source: Source) -> None:
    code = source.code("config/vllm.py", "VllmConfig.compute_hash")
    require_order(code, "VllmConfig.compute_hash", "self.additional_config", "json.dumps(additional_config", ".append(")


ADDED_SINCE_0_24 = {"enable_fault_tolerance", "enable_hc_sp"}
"""Arguments that are refused where vLLM has them."""


@seam("engine arguments that are refused", "engine/refusals.py")
def _(source: Source) -> str:
    missing = _keys("refusals.py", "REFUSALS") - source.fields(ARGUMENTS, "EngineArgs")
    gone = missing - ADDED_SINCE_0_24
    require(not gone, f"EngineArgs has no {', '.join(sorted(gone))}")
    return f"without {', '.join(sorted(missing))}" if missing else ""


def _keys(file: str, name: str) -> set[str]:
    """Keys of a dictionary of ours, read without importing it."""
    for node in ast.walk(ast.parse((ENGINE / file).read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(getattr(node, "value", None), ast.Dict) and any(getattr(t, "id", "") == name for t in targets):
            return {key.value for key in node.value.keys if isinstance(key, ast.Constant)}  # type: ignore[attr-defined]
    raise AssertionError(f"engine/{file} has no {name}")


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
    require_parameters(source, V2_RUNNER, "GPUModelRunner._dummy_run", ["self", "num_tokens"])
    code = source.code(V1_RUNNER, "GPUModelRunner._dummy_run")
    require("self._prepare_inputs(" not in code, "the V1 runner's dummy steps now pass _prepare_inputs")


@seam("AsyncLLM.generate aborts what is closed", "engine/engine.py")
def _(source: Source) -> None:
    require_parameters(source, ASYNC_LLM, "AsyncLLM.generate", ["self", "prompt", "sampling_params", "request_id"])
    code = source.code(ASYNC_LLM, "AsyncLLM.generate")
    require_order(
        code, "AsyncLLM.generate", "except (asyncio.CancelledError, GeneratorExit)", "await self.abort(", "raise"
    )


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


def results(source: Source) -> list[tuple[Seam, bool, str]]:
    """Every seam with whether it is in place, and what there is to say."""
    answers = []
    for one in SEAMS:
        try:
            answers.append((one, True, one.check(source) or ""))
        except Moved as moved:
            answers.append((one, False, str(moved)))
    return answers
