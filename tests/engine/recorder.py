"""A stand-in for CUDA graphs on a CPU: records the operations of a forward pass, and replays them on the same memory.

As on a GPU, a replay calls no Python of the model and none of the hooks: it repeats the operations that torch's
dispatcher saw, and the kernel's launches, with the tensors that they had when they were recorded. What the launches do
depends on what the tables hold by then.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from steer_service.engine.worker.batch_rows import is_v2
from steer_service.engine.worker.hooks import HookContext
from steer_service.engine.worker.hooks_cuda import CudaHooks
from steer_service.ops.copy_stream import CpuCopies

SIZES = [1, 2, 4, 8, 16]
"""Rows of the recorded graphs."""


class Graph:
    """What one recording holds; `torch.cuda.CUDAGraph` of the stand-in."""

    recording: "Graph | None" = None
    """The graph that is being recorded, if any."""

    def __init__(self) -> None:
        self.rows = 0
        """Rows of the launches that it holds."""
        self.steps: list[Callable[[], None]] = []
        self.launches: dict[int, int] = {}
        """Layer -> place of its kernel's launch among the steps."""
        self.replays = 0

    def replay(self) -> None:
        """Repeats every operation on the memory of the recording."""
        self.replays += 1
        for step in self.steps:
            step()


class _Recorder(TorchDispatchMode):
    """Adds every operation to a graph while it runs."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        outputs = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        fresh = [_memory(one) not in inputs for one in outputs]
        self._graph.steps.append(lambda: _repeat(func, args, kwargs, outputs, fresh))
        return result


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _repeat(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor], fresh: list[bool]) -> None:
    with torch.inference_mode():
        again = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, torch.Tensor)]
        for old, new, is_fresh in zip(outputs, again, fresh, strict=True):
            if is_fresh:
                old.copy_(new)


@contextmanager
def recording(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph` of the stand-in."""
    Graph.recording = graph
    try:
        with _Recorder(graph):
            yield
    finally:
        Graph.recording = None


class RecordingCopies(CpuCopies):
    """The copies of a CPU, which know when a graph is recorded."""

    @property
    def is_recording(self) -> bool:
        """True while a graph is recorded."""
        return Graph.recording is not None


class RecordedHooks(CudaHooks):
    """The hooks of a GPU, whose launches a recording holds."""

    def __init__(self, context: HookContext) -> None:
        super().__init__(context)
        self.copies = RecordingCopies()

    def launch(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        """Launches the kernel, which is not an operation of torch's dispatcher; a recording holds the launch."""

        def launched() -> None:
            with _disable_current_modes(), torch.inference_mode():
                super(RecordedHooks, self).launch(hidden_TD, residual_TD, layer)

        if Graph.recording is not None:
            Graph.recording.rows = len(hidden_TD)
            Graph.recording.launches[layer] = len(Graph.recording.steps)
            Graph.recording.steps.append(launched)
        launched()


def stand_in_for_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes vLLM's wrappers and managers of CUDA graphs record on the CPU."""
    from vllm.compilation import cuda_graph
    from vllm.v1.worker.gpu import cudagraph_utils

    @contextmanager
    def no_pool(*_: Any, **__: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for module in (cuda_graph, cudagraph_utils):
        monkeypatch.setattr(module, "capture_pool", no_pool)
        monkeypatch.setattr(module, "current_stream", lambda: None)
    monkeypatch.setattr(cudagraph_utils, "graph_capture", no_pool)
    monkeypatch.setattr(cudagraph_utils, "has_compiled_submodule", lambda _: True)
    monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda tensors: tensors)
    monkeypatch.setattr(cuda_graph.current_platform, "get_global_graph_pool", lambda *_: None, raising=False)


def record_graphs(runner: Any) -> None:
    """Records graphs of all SIZES: a whole model for decoding, its layers for all else."""
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled
    from vllm.config import CUDAGraphMode

    config = runner.vllm_config
    compilation = config.compilation_config
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, SIZES[-1]
    layers = runner.model.model
    layers.forward = CUDAGraphWrapper(layers.forward, config, CUDAGraphMode.PIECEWISE)
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    set_cudagraph_capturing_enabled(True)
    _record_v2(runner) if is_v2(runner) else _record_v1(runner)
    set_cudagraph_capturing_enabled(False)


def _record_v1(runner: Any) -> None:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode

    runner.model = CUDAGraphWrapper(runner.model, runner.vllm_config, CUDAGraphMode.FULL)
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    for mode, descriptors in runner.cudagraph_dispatcher.get_capture_descs():
        for one in descriptors:
            for runs_as in (CUDAGraphMode.NONE, mode):
                runner._dummy_run(
                    one.num_tokens,
                    cudagraph_runtime_mode=runs_as,
                    force_attention=True,
                    uniform_decode=one.uniform,
                    is_graph_capturing=True,
                )


def _record_v2(runner: Any) -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    manager = runner.cudagraph_manager = ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.FULL_AND_PIECEWISE, runner.decode_query_len
    )
    manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
    # The attention of a GPU finds its metadata in buffers at the addresses of the recording, that of a CPU in the
    # forward context, which the V2 runner does not set for a graph of the whole model.
    prepare_attn, run_fullgraph, last = runner.model_state.prepare_attn, manager.run_fullgraph, list[Any]()

    def prepared(*args: Any, **kwargs: Any) -> Any:
        metadata = prepare_attn(*args, **kwargs)
        last[:] = [metadata, build_slot_mappings_by_layer(args[3], runner.kv_cache_config)]
        return metadata

    def replayed(descriptor: Any) -> Any:
        with set_forward_context(last[0], runner.vllm_config, num_tokens=descriptor.num_tokens, slot_mapping=last[1]):
            return run_fullgraph(descriptor)

    runner.model_state.prepare_attn, manager.run_fullgraph = prepared, replayed
