"""The same requests through transformers, the engine, and a client and a server around the engine.

Any new backend is added to `BACKENDS` and must pass.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steer_client import AsyncSteerClient
from steer_service.core.calls import Generation, SteeringCalls, checked_events, collect
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.positions import PositionRange
from steer_service.core.request import ChatMessage, ChatPrompt, GenerateRequest, SamplingOptions, TextPrompt
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.hf import HFSteeringModel
from steer_service.hf.embedded import ensure_embedded_model
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.oracle import relative_error
from tests.tiny_models import ModelFolder

pytestmark = pytest.mark.engine

STATES = 1e-5
"""Relative to the largest number of the states that are compared, in float32."""
LOGPROBS = 1e-4
BACKENDS = ("hf", "engine", "served")
TEXT = "The three of them met at the harbour before sunrise"
GREEDY = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)


@dataclass(frozen=True)
class Ring:
    """All backends on one model."""

    hf: HFSteeringModel
    engine: VLLMSteeringModel
    folder: Path

    @asynccontextmanager
    async def backends(self) -> AsyncIterator[dict[str, SteeringCalls]]:
        server = SteerServer(ServerConfig(address="127.0.0.1:0"))
        address = await server.listen()
        await server.open(Shared(self.engine))
        try:
            async with AsyncSteerClient(address) as client:
                yield dict(zip(BACKENDS, (self.hf, self.engine, client), strict=True))
        finally:
            await server.drain()


class Shared:
    """An engine that outlives the server around it."""

    def __init__(self, engine: VLLMSteeringModel) -> None:
        self.info, self.is_alive, self.submit = engine.info, True, engine.submit

    async def close(self) -> None:
        """It is not this server's to end."""


MODELS = ["llama", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("qwen3", "gemma3", "embedded"))]


@pytest.fixture(scope="module", params=MODELS)
def ring(request: pytest.FixtureRequest, model_folder: ModelFolder) -> Iterator[Ring]:
    name = request.param
    folder = ensure_embedded_model() if name == "embedded" else model_folder(name)
    with HFSteeringModel(folder, dtype=torch.float32, attn_implementation="eager") as hf:
        if name == "llama":
            yield Ring(hf, request.getfixturevalue("llama"), folder)
        else:
            with VLLMSteeringModel(str(folder), **ENGINE_ARGUMENTS) as engine:
                yield Ring(hf, engine, folder)


def requests_for(ring: Ring) -> dict[str, GenerateRequest]:
    """What every backend must answer alike, by name."""
    layers, width = ring.hf.layer_count, ring.hf.hidden_size
    size = 1.0 if layers > 8 else 3.0

    def direction(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).normal(size=width)

    add, cap, ablate = (
        AddSpec(direction(1) / np.sqrt(width), size),
        ProjectionCapSpec(direction(2), min=-0.1, max=0.3),
        AblationSpec(direction(3), -0.5),
    )
    low, high = 1, layers - 2
    everywhere = CaptureSpec(layers=(0, low, high, layers - 1), site=CaptureSite.BOTH)
    chat = ChatPrompt(messages=[ChatMessage(role="user", content="Where is the harbour?")])

    def ask(**fields: object) -> GenerateRequest:
        return GenerateRequest(**{"prompt": TextPrompt(text=TEXT), "sampling": GREEDY, "capture": everywhere, **fields})

    def steered(*operations: object, layer: int = low, **scope: object) -> SteeringSpec:
        return SteeringSpec({layer: LayerSteeringSpec(operations)}, **scope)

    return {
        "unsteered": ask(),
        "add": ask(steering=steered(add)),
        "cap": ask(steering=steered(cap)),
        "ablate": ask(steering=steered(ablate)),
        "in one order": ask(steering=steered(add, cap, ablate, layer=high)),
        "in another": ask(steering=steered(ablate, cap, add, layer=high)),
        "two layers": ask(steering=SteeringSpec({low: LayerSteeringSpec([add]), high: LayerSteeringSpec([cap])})),
        "the prompt": ask(steering=steered(add, positions="prompt")),
        "the last prompt token": ask(steering=steered(add, positions=-1)),
        "generated tokens": ask(steering=steered(add, positions="generated")),
        "chosen rows": ask(capture=replace(everywhere, positions=[PositionRange(1, 3), -1, "generated"])),
        "a chat": ask(prompt=chat, steering=steered(add)),
        "n outputs": ask(sampling=replace(GREEDY, n=2), steering=steered(cap)),
        "one token": ask(sampling=replace(GREEDY, max_tokens=1)),
        "a stop string": ask(sampling=replace(GREEDY, stop=(" the",))),
    }


async def run(backend: SteeringCalls, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(backend, request)), 300)


async def test_all_backends_answer_alike(ring: Ring) -> None:
    requests = requests_for(ring)
    async with ring.backends() as backends:
        answers = {
            name: await asyncio.gather(*[run(backend, request) for request in requests.values()])
            for name, backend in backends.items()
        }
    for index, name in enumerate(requests):
        want = answers["hf"][index]
        for backend in BACKENDS[1:]:
            same_answer(answers[backend][index], want, f"{name}, {backend}")
    differ = {
        tuple(answer.outputs[0].captures[max(answer.outputs[0].captures)].ravel()[-8:]) for answer in answers["hf"]
    }
    assert len(differ) >= 8  # the steering did something


def same_answer(got: Generation, want: Generation, about: str) -> None:
    assert got.prompt_token_ids == want.prompt_token_ids, about
    assert got.message_boundaries == want.message_boundaries, about
    assert got.sampling == want.sampling, about
    for mine, theirs in zip(got.outputs, want.outputs, strict=True):
        assert mine.token_ids == theirs.token_ids, about
        assert (mine.text, mine.finish_reason, mine.stop) == (theirs.text, theirs.finish_reason, theirs.stop), about
        np.testing.assert_allclose(
            [entry.logprob for entry in mine.logprobs], [entry.logprob for entry in theirs.logprobs], atol=LOGPROBS
        )
        assert mine.labels == theirs.labels, about
        compared = (
            "steering_digest",
            "steered_layers",
            "rows_steered",
            "captured_layers",
            "rows_captured",
            "rows_total",
        )
        for field in compared:
            assert getattr(mine.receipt, field) == getattr(theirs.receipt, field), (about, field)
        for part in ("before", "after"):
            rows, other = getattr(mine.captured, part), getattr(theirs.captured, part)
            assert rows.keys() == other.keys(), about
            for layer in rows:
                assert rows[layer].dtype == other[layer].dtype, about
                assert relative_error(rows[layer], other[layer]) <= STATES, (about, part, layer)
