"""What vLLM is told before it starts: that it is a server, with the batch sizes of `vllm serve`, and never to fork."""

import os
from typing import Any

import pytest
from vllm.engine import arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from steer_service.core.errors import EngineFailed, Unsupported
from steer_service.engine import start
from steer_service.engine.config import engine_args_for
from steer_service.engine.start_method import START_METHOD
from tests.tiny_models import ModelFolder


class Device:
    """This machine's platform, as large as another device where vLLM chooses batch sizes."""

    def __init__(self, name: str, gib: int) -> None:
        self._name, self._bytes = name, gib << 30

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)

    def is_cpu(self) -> bool:
        return False

    def get_device_name(self, *_: Any) -> str:
        return self._name

    def get_device_total_memory(self, *_: Any) -> int:
        return self._bytes


@pytest.fixture
def usage_context(monkeypatch: pytest.MonkeyPatch) -> list[UsageContext]:
    """What starts say that the engine is for; none goes further."""
    said = []

    def from_engine_args(_: Any, *, usage_context: UsageContext) -> None:
        said.append(usage_context)
        raise RuntimeError("this is far enough")

    monkeypatch.setattr(start.AsyncLLM, "from_engine_args", from_engine_args)
    return said


@pytest.mark.parametrize(
    ("device", "sizes"),
    [
        (None, (128, 2048)),
        (Device("NVIDIA H100 80GB HBM3", 80), (1024, 8192)),
        (Device("NVIDIA L4", 24), (256, 2048)),
        (Device("NVIDIA B200", 180), (1024, 16384)),
    ],
    ids=["this CPU", "H100", "L4", "B200"],
)
async def test_a_step_has_as_many_sequences_and_tokens_as_that_of_vllm_serve(
    device: Device | None,
    sizes: tuple[int, int],
    usage_context: list[UsageContext],
    model_folder: ModelFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device is not None:
        monkeypatch.setattr(arg_utils, "current_platform", device)
    folder = str(model_folder("llama"))
    arguments = engine_args_for(folder, {})

    with pytest.raises(EngineFailed, match="far enough"):
        await start.start_llm(arguments)

    ours = arguments.create_engine_config(usage_context[0]).scheduler_config
    theirs = AsyncEngineArgs(model=folder).create_engine_config(UsageContext.OPENAI_API_SERVER).scheduler_config
    assert (ours.max_num_seqs, ours.max_num_batched_tokens) == (theirs.max_num_seqs, theirs.max_num_batched_tokens)
    assert (ours.max_num_seqs, ours.max_num_batched_tokens) == sizes


async def test_vllms_processes_are_no_forks_of_a_server(
    usage_context: list[UsageContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(START_METHOD, raising=False)
    with pytest.raises(EngineFailed, match="far enough"):
        await start.start_llm(engine_args_for("model", {}))
    assert os.environ[START_METHOD] == "spawn"

    monkeypatch.setenv(START_METHOD, "fork")
    with pytest.raises(Unsupported, match="'fork' is refused") as refused:
        await start.start_llm(engine_args_for("model", {}))
    assert (refused.value.reason, refused.value.field) == ("ARGUMENT_REFUSED", START_METHOD)
