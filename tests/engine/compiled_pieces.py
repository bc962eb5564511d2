"""A toy model with our hooks, compiled by vLLM's own backend as on a GPU; prints what came of it. Run by
test_compiled_pieces.py.

On a CPU vLLM uses another backend: no pieces, no passes of its own after the gradients', nothing saved. Here its
backend runs on a CPU all the same. Some of its passes name ops that only a GPU's build has.
"""

import argparse
import json
from typing import Any

import torch
from torch import nn

from steer_service.engine.config import SteeringConfig
from steer_service.engine.worker.hooks import install_hooks, use_step
from steer_service.engine.worker.layer_outputs import LayerOutput

WIDTH, ROWS = 32, 8

library = torch.library.Library("toy", "DEF")
library.define("attention(Tensor query, Tensor(a!) output) -> ()")


def _attention(query: torch.Tensor, output: torch.Tensor) -> None:
    output.copy_(torch.tanh(query))


library.impl("attention", _attention, "CPU")
library.impl("attention", lambda query, output: None, "Meta")


class Layer(nn.Module):
    """Hands on a change and the stream before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        stream_TD = hidden_TD if residual_TD is None else hidden_TD + residual_TD
        query_TD = self.first(stream_TD)
        output_TD = torch.empty_like(query_TD)
        torch.ops.toy.attention(query_TD, output_TD)  # the graph is split here
        return self.second(output_TD), stream_TD


class Step:
    """Stands for a forward pass with a plan: what it makes of the stream depends on the order of the layers."""

    def __init__(self, layers: int) -> None:
        self.wanted_L = [True] * layers
        self.visited: list[int] = []

    def visit(self, hidden_TD: torch.Tensor, residual_TD: torch.Tensor | None, layer: int) -> None:
        assert residual_TD is not None
        self.visited.append(layer)
        residual_TD.mul_(0.5)
        hidden_TD.add_(layer)


class GpuOnly:
    """Stands for an op, and its overloads, that this build does not have: no node of a graph calls it."""

    def __getattr__(self, name: str) -> "GpuOnly":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def stand_in_for_missing_ops() -> None:
    """Lets vLLM's passes name ops of a GPU's build."""
    known = torch._ops._OpNamespace.__getattr__

    def found(self: Any, name: str) -> Any:
        try:
            return known(self, name)
        except AttributeError:
            if self.name != "_C" or name.startswith("__"):
                raise
            return GpuOnly()

    torch._ops._OpNamespace.__getattr__ = found  # type: ignore[method-assign]


def watch_graphs() -> list[str]:
    """Ops of all graphs once inductor has decided which arguments it copies; grows with each compilation."""
    from torch._inductor.fx_passes import post_grad

    seen: list[str] = []
    decompose = post_grad.decompose_auto_functionalized

    def watched(graph: torch.fx.Graph) -> Any:
        result = decompose(graph)
        seen.extend(str(node.target) for node in graph.nodes if node.op == "call_function")
        return result

    post_grad.decompose_auto_functionalized = watched
    return seen


def vllm_config(slots: int) -> Any:
    """A configuration as on a GPU: pieces between the attention, inductor, no passes that need a GPU."""
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig
    from vllm.config.compilation import CUDAGraphMode

    config = VllmConfig(
        compilation_config=CompilationConfig(cudagraph_mode=CUDAGraphMode.NONE, custom_ops=["none"]),
        additional_config=SteeringConfig(slots=slots).to_additional_config(),
    )
    compilation = config.compilation_config  # a CPU's choices, made in the constructor, are taken back
    compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
    compilation.splitting_ops, compilation.compile_sizes = ["toy::attention"], []
    for name, value in vars(compilation.pass_config).items():
        if isinstance(value, bool):
            setattr(compilation.pass_config, name, False)
    return config


def main() -> None:
    """Runs the model compiled and not, and prints the facts as JSON."""
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--slots", type=int, default=8)
    chosen = parser.parse_args()
    stand_in_for_missing_ops()
    ops = watch_graphs()

    class Inner(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(chosen.layers))

        def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
            residual_TD = None
            for layer in self.layers:
                hidden_TD, residual_TD = layer(hidden_TD, residual_TD)
            return hidden_TD + residual_TD

    config = vllm_config(chosen.slots)
    torch.manual_seed(0)
    with set_current_vllm_config(config), torch.inference_mode():
        outer = nn.Module()
        outer.model = support_torch_compile(dynamic_arg_dims={"hidden_TD": 0})(Inner)(vllm_config=config)
        install_hooks(outer, unverified=LayerOutput.HIDDEN_AND_RESIDUAL)
        hidden_TD = torch.randn(ROWS, WIDTH)
        answers, visited = [], []
        for run in (outer.model, outer.model, Inner.forward.__get__(outer.model)):
            step = Step(chosen.layers)
            use_step(step)
            with set_forward_context({}, config, num_tokens=ROWS):
                answers.append(run(hidden_TD.clone()))
            visited.append(step.visited)
    print(
        json.dumps(
            {
                "pieces": compilation_counter.num_piecewise_capturable_graphs_seen,
                "compiled": compilation_counter.num_inductor_compiles,
                "saved": compilation_counter.num_compiled_artifacts_saved,
                "visited": visited,
                "error": max(float((one - answers[-1]).abs().max()) for one in answers[:-1]),
                "hooks": sum("steerllm.hook" in op for op in ops),
                "copies": [op for op in ops if "clone" in op or "copy" in op],
            }
        )
    )


if __name__ == "__main__":
    main()
