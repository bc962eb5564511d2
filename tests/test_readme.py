"""Every Python example of the README runs, against a real server; only the address changes."""

import ast
import asyncio
import re
from dataclasses import replace
from inspect import CO_COROUTINE
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest

from steer_client import AsyncSteerClient, SteeringSpec
from steer_client.channel import DEFAULT_ADDRESS
from steer_service.shm.segments import SegmentDirectory
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from tests.arena import Arena
from tests.client.conftest import Serve, serve  # noqa: F401  (a fixture)

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
IN_PROCESS = [block for block in BLOCKS if "steer_service.engine" in block]
OF_TRAINING = [block for block in BLOCKS if "steer_service.hf" in block]
OF_THE_CLIENT = [block for block in BLOCKS if block not in (*IN_PROCESS, *OF_TRAINING)]
DEEP_MODEL = replace(FAKE_MODEL, layer_count=30)


def test_the_readme_has_the_examples_it_promises() -> None:
    assert len(OF_THE_CLIENT) == 10
    assert len(IN_PROCESS) == len(OF_TRAINING) == 1


@pytest.mark.parametrize("block", OF_THE_CLIENT, ids=range(len(OF_THE_CLIENT)))
def test_an_example_of_the_client_runs(block: str, serve: Serve) -> None:  # noqa: F811
    if "import torch" in block:
        pytest.importorskip("torch")
    backend = FakeBackend(DEEP_MODEL, place=Arena(SegmentDirectory().path))
    address = serve(backend).address
    _run(block.replace(DEFAULT_ADDRESS, address), _names_that_fragments_use(address))
    asked = "model." in block
    assert (backend.finished > 0) == asked


@pytest.mark.engine
@pytest.mark.slow
def test_the_example_of_the_engine_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    from steer_service.hf.bundled_model import ensure_bundled_model

    block = IN_PROCESS[0].replace("Qwen/Qwen3-0.6B", str(ensure_bundled_model()))
    block = block.replace("max_model_len=", "enforce_eager=True, max_model_len=")  # compiling takes minutes
    assert "enforce_eager" in block
    _run(block, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_example_of_training_runs(serve: Serve) -> None:  # noqa: F811
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from steer_service.hf.bundled_model import ensure_bundled_model

    tokens = torch.arange(300, 316).reshape(2, 8)
    backend = FakeBackend(replace(DEEP_MODEL, hidden_size=576))
    names = {
        "dataloader": [{"input_ids": tokens, "labels": tokens}] * 2,
        "compute_loss": lambda outputs: outputs.loss,
        "client": AsyncSteerClient(serve(backend).address),
        "prompts": ["One prompt"],
    }
    _run(OF_TRAINING[0].replace("Qwen/Qwen3-0.6B", str(ensure_bundled_model())), names)
    assert backend.requests[0].steering == names["model"].to_spec()
    assert list(backend.requests[0].steering.layers) == [5]
    names["model"].close_sync()


def _run(source: str, names: dict[str, Any]) -> None:
    code: CodeType = compile(source, str(README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & CO_COROUTINE:
        asyncio.run(eval(code, names))
    else:
        exec(code, names)


def _names_that_fragments_use(address: str) -> dict[str, Any]:
    v, steering_direction, cap_direction, ablate_direction = np.random.default_rng(0).normal(size=(4, 8))
    return {
        "model": AsyncSteerClient(address),
        "prompts": ["One prompt", "And another"],
        "steering": SteeringSpec.simple_add(5, v),
        "v": v,
        "steering_direction": steering_direction,
        "cap_direction": cap_direction,
        "ablate_direction": ablate_direction,
    }
