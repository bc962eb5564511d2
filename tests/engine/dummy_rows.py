"""What of the self-test's dummy runs vLLM takes for padding."""

from typing import Any

import numpy.typing as npt
import pytest
import torch
from vllm.forward_context import get_forward_context

from steer_service.engine.worker import model_proof
from steer_service.engine.worker.dispatch import DummyShape


def watch_padding(monkeypatch: pytest.MonkeyPatch, module: type[torch.nn.Module]) -> list[tuple[int, list[bool]]]:
    """Rows of each run, and what of the rows is padding where `module` runs; grows with each self-test.

    As routers of experts do on a GPU, `module` makes zeros of what is padding.
    """
    seen: list[tuple[int, list[bool]]] = []
    counts: list[int] = []
    forward, run_dummy = module.forward, model_proof.run_dummy

    def routed(self: Any, hidden_TD: torch.Tensor, *args: Any) -> torch.Tensor:
        output_TD = forward(self, hidden_TD, *args)
        padding_T = get_forward_context().is_padding[: len(output_TD)]
        seen.extend((count, padding_T.tolist()) for count in counts)
        return output_TD.masked_fill(padding_T[:, None], 0.0)

    def run(runner: Any, inputs_N: npt.NDArray[Any], shape: DummyShape) -> Any:
        counts.append(len(inputs_N))
        try:
            return run_dummy(runner, inputs_N, shape)
        finally:
            counts.pop()

    monkeypatch.setattr(module, "forward", routed)
    monkeypatch.setattr(model_proof, "run_dummy", run)
    return seen
