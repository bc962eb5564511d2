"""Engine arguments, and the names that are imported from vLLM."""

import ast
import re

from tests.engine.seams.source import ARGUMENTS, ENGINE, Source, require, require_fields, require_order, seam


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
    """True if the module defines, imports or lazily exports the name, or has a submodule of that name."""
    if file.endswith("__init__.py") and (source.folder / file).with_name(f"{name}.py").exists():
        return True
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


@seam("EngineArgs.create_model_config, ModelConfig.get_and_verify_max_len", "engine/prompt_room.py")
def _(source: Source) -> None:
    code = source.code(ARGUMENTS, "EngineArgs.create_engine_config")
    require(code.count("self.create_model_config()") == 1, "create_engine_config does not call it once")
    names = source.parameters("config/model.py", "ModelConfig.get_and_verify_max_len")
    require(names == ["self", "max_model_len"], "ModelConfig.get_and_verify_max_len has other parameters")
    code = source.code("config/model.py", "_get_and_verify_max_len")
    require_order(
        code, "_get_and_verify_max_len", "if max_model_len is None", "max_model_len = ", "elif max_model_len >"
    )


@seam("the sentence of the check of the KV cache's memory", "engine/prompt_room.py")
def _(source: Source) -> None:
    new, old = "v1/core/kv_cache_planning.py", "v1/core/kv_cache_utils.py"
    path = new if source.has(new, "_check_enough_kv_cache_memory") else old
    code = source.code(path, "_check_enough_kv_cache_memory")
    require("max seq len ({max_model_len})" in code, "_check_enough_kv_cache_memory says something else")


@seam("additional_config is part of the compile cache's key", "engine/config.py")
def _(source: Source) -> None:
    code = source.code("config/vllm.py", "VllmConfig.compute_hash")
    require_order(code, "VllmConfig.compute_hash", "self.additional_config", "json.dumps(additional_config", ".append(")


@seam("AsyncLLM.from_engine_args(usage_context), and the way in which processes start", "engine/start.py")
def _(source: Source) -> None:
    names = source.parameters("v1/engine/async_llm.py", "AsyncLLM.from_engine_args")
    require("usage_context" in names, "AsyncLLM.from_engine_args has no usage_context")
    code = source.code(ARGUMENTS, "EngineArgs.get_batch_defaults")
    require("UsageContext.OPENAI_API_SERVER" in code, "batch sizes do not depend on the usage context")
    code = source.code("utils/system_utils.py", "get_mp_context")
    require("envs.VLLM_WORKER_MULTIPROC_METHOD" in code, "get_mp_context does not read VLLM_WORKER_MULTIPROC_METHOD")


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
