"""What a type checker makes of the calls: `raw_output` and `framework` choose the exact type of the result."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RIGHT = """
from typing import assert_type

from steer_client import (
    AsyncSteerClient, CaptureHandle, Captures, ChatResponse, ChatResponses, Generation, Generations, SteerClient,
    SteeringSpec, StreamEvent, SyncCaptureHandle, Texts, TorchCaptures, fetch_all,
)
from steer_service.engine.model import VLLMSteeringModel
from steer_service.runtime.calls import SteeringCalls


async def calls(model: SteeringCalls, client: AsyncSteerClient, flag: bool) -> None:
    texts, handles = await model.generate(["a"], max_tokens=5, top_k=3, stop="x", logit_bias={1: 0.5})
    assert_type(texts, list[str])
    assert_type(handles, list[CaptureHandle] | None)
    assert_type(await client.generate("a", raw_output=False), Texts[CaptureHandle])
    assert_type(await client.generate("a", raw_output=True), Generations[CaptureHandle])
    assert_type(await client.generate("a", raw_output=flag), Texts[CaptureHandle] | Generations[CaptureHandle])
    [generation], _ = await client.chat([{"role": "user", "content": "a"}], raw_output=True)
    assert_type(generation, Generation)
    responses, _ = await client.chat([{"role": "user", "content": "a"}], n=2)
    assert_type(responses, list[ChatResponse])
    assert handles is not None
    assert_type(await handles[0].fetch(), Captures)
    assert_type(await handles[0].fetch(framework="torch"), TorchCaptures)
    assert_type(await fetch_all(handles), list[Captures])
    assert_type(await fetch_all(handles, framework="torch"), list[TorchCaptures])
    spec = SteeringSpec.simple_add(1, [1.0])
    await model.generate(["a", "b"], steering_spec=[spec, None], model=["", "adapter"], request_id=["x", "y"])
    async for event in model.stream_events("a", capture_layers=[1], timeout_s=5):
        assert_type(event, StreamEvent[CaptureHandle])


def blocking_calls(client: SteerClient, engine: VLLMSteeringModel) -> None:
    texts, handles = client.generate("a", seed=1, capture_layers=1)
    assert_type(texts, list[str])
    assert_type(handles, list[SyncCaptureHandle] | None)
    assert_type(client.generate("a", raw_output=True), Generations[SyncCaptureHandle])
    assert_type(client.chat([{"role": "user", "content": "a"}]), ChatResponses[SyncCaptureHandle])
    assert handles is not None
    assert_type(handles[0].fetch(), Captures)
    assert_type(client.fetch_all(handles, framework="torch"), list[TorchCaptures])
    for event in client.stream_events("a", capture_layers=[1]):
        assert_type(event, StreamEvent[SyncCaptureHandle])
    for text in engine.stream_sync("a", request_id="mine"):
        assert_type(text, str)
    assert_type(engine.generate_sync("a"), Texts[CaptureHandle])
    assert_type(engine.generate_sync("a", raw_output=True), Generations[CaptureHandle])
    assert_type(engine.chat_sync([{"role": "user", "content": "a"}]), ChatResponses[CaptureHandle])
"""

WRONG = """
from steer_client import SteerClient

client = SteerClient()
client.generate("a", max_token=5)  # call-overload
client.generate("a", temperature="hot")  # call-overload
client.stream("a", top_p="much")  # arg-type
client.stream("a", steering_spec=[])  # arg-type
client.stream("a", capture_layers=1)  # call-arg
client.generate("a", model=5)  # call-overload
text: str = client.generate("a", raw_output=True)[0][0]  # assignment
"""


def check(program: str, folder: Path) -> list[str]:
    """The complaints of mypy about `program`, under the options of this project."""
    file = folder / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--follow-imports=silent", file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert not done.stderr
    return [line.partition("program.py:")[2] for line in done.stdout.splitlines() if ": error:" in line]


@pytest.mark.slow
def test_a_result_has_the_exact_type_that_its_call_chose(tmp_path: Path) -> None:
    assert check(RIGHT, tmp_path) == []


@pytest.mark.slow
def test_a_wrong_keyword_or_type_is_an_error(tmp_path: Path) -> None:
    complaints = check(WRONG, tmp_path)

    found = {(int(text.split(":")[0]), text.rpartition("[")[2].rstrip("]")) for text in complaints}
    lines = enumerate(WRONG.splitlines(), 1)
    assert found == {(number, line.rpartition("# ")[2]) for number, line in lines if "#" in line}
