"""A real model under tensor, pipeline and data parallelism, with LoRA adapters and quantised, against its oracle."""

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.errors import NotFound
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.spans import EVERYWHERE, OPEN_END, clipped, positions_of
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.results import Generation, collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.deterministic_model.drive import AT_ONCE, LIMIT_S, few_threads
from tests.engine.oracle import Oracle, relative_error
from tests.engine.test_numbers import TOLERANCE, mixed_specs
from tests.engine.variants import Int8Oracle, make_adapter, make_int8
from tests.tiny_models import LAYERS, ModelFolder

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ARGUMENTS: dict[str, Any] = {**ENGINE_ARGUMENTS, "steer_slots": 6}

SCOPES = (None, -1, None, "prompt", None, PositionRange(-1, None))
SITES = tuple(CaptureSite)

LORA_TOLERANCE = 2e-5
"""An adapter's product is rounded on its own and then added."""

INT8_TOLERANCE = 0.1
"""An activation that lies between two steps may be rounded the other way than in float64 (0.026 seen); rows of another
position or token are farther apart than their own length.
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's tensors are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def requests_for(
    seed: int, count: int, models: Sequence[str] = ("",), *, captured: float = 0.6
) -> list[GenerateRequest]:
    """Random prompts, some with a shared beginning, steered or not, `captured` of them, for one of `models` each.

    Half of the specs and captures are for chosen positions, which every prompt has.
    """
    chance = random.Random(seed)
    beginning = [chance.randrange(100, 40_000) for _ in range(70)]
    specs = [None if spec is None else replace(spec, positions=scope) for spec in mixed_specs() for scope in SCOPES]
    return [
        GenerateRequest(
            prompt=TokenPrompt(
                token_ids=(beginning if chance.random() < 0.5 else [])
                + [chance.randrange(100, 40_000) for _ in range(chance.randint(1, 60))]
            ),
            sampling=SamplingOptions(
                max_tokens=chance.randint(1, 10),
                temperature=chance.choice([0.0, 1.0]),
                seed=chance.choice([None, 7]),
                ignore_eos=True,
                logprobs=0,
                n=chance.choice([None, None, 2]),
            ),
            steering=chance.choice(specs),
            capture=CaptureSpec(layers=range(LAYERS), positions=chance.choice(SCOPES), site=chance.choice(SITES))
            if chance.random() < captured
            else None,
            model=chance.choice(models),
        )
        for _ in range(count)
    ]


async def run_all(model: VLLMSteeringModel, requests: Sequence[GenerateRequest]) -> list[Generation]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(request: GenerateRequest) -> Generation:
        async with room:
            return await collect(model.submit(request))

    return await asyncio.wait_for(asyncio.gather(*[one(request) for request in requests]), LIMIT_S)


def check(
    oracles: Mapping[str, Oracle], request: GenerateRequest, generation: Generation, tolerance: float = TOLERANCE
) -> None:
    """Every row of every output, or where none was captured every log-probability, equals the oracle's."""
    oracle, prompt = oracles[request.model], generation.prompt_token_ids
    for output in generation.outputs:
        tokens = [*prompt, *output.token_ids]
        rows = len(tokens) - 1
        assert output.receipt.rows_total == rows
        assert output.receipt.steering_digest == (request.steering.digest() if request.steering else "")
        if request.capture is None:
            want = oracle.logprobs(tokens, request.steering, len(prompt))
            np.testing.assert_allclose([entry.logprob for entry in output.logprobs], want, atol=10 * tolerance)
            continue
        scope = request.capture.positions
        spans = EVERYWHERE if scope is None else scope.resolve(len(prompt), OPEN_END)
        chosen = positions_of(clipped(spans, rows))
        assert output.receipt.rows_captured == len(chosen)
        for site in request.capture.site.parts:
            captured = output.captured.before if site is CaptureSite.BEFORE else output.captured.after
            streams = oracle.streams(
                tokens[:-1], request.steering, prompt_tokens=len(prompt), before=site is CaptureSite.BEFORE
            )
            for layer in range(LAYERS):
                assert relative_error(captured[layer], streams[layer][chosen]) <= tolerance


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor", marks=pytest.mark.extended),
        pytest.param({"pipeline_parallel_size": 2, "enforce_eager": False}, id="pipeline", marks=pytest.mark.extended),
        pytest.param(
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enforce_eager": False},
            id="tensor-and-pipeline",
            marks=pytest.mark.extended,
        ),
        pytest.param({"data_parallel_size": 2}, id="data", marks=pytest.mark.extended),
    ],
)
async def test_parallel_rows_equal_the_oracle(model_folder: ModelFolder, arguments: dict[str, Any]) -> None:
    folder = model_folder("llama")
    requests = requests_for(1, 40)
    with few_threads(), VLLMSteeringModel(str(folder), **{**ARGUMENTS, **arguments}) as model:
        generations = await run_all(model, requests)
    oracle = Oracle(folder)
    for request, generation in zip(requests, generations, strict=True):
        check({"": oracle}, request, generation)


@pytest.mark.parametrize(
    ("count", "enforce_eager"),
    [pytest.param(25, False, id="compiled"), pytest.param(200, True, id="eager", marks=pytest.mark.extended)],
)
async def test_requests_with_lora_adapters_beside_steered_ones(
    model_folder: ModelFolder, tmp_path: Path, count: int, enforce_eager: bool
) -> None:
    """Each request is for the base model or one of two adapters: one batch holds all of them.

    HuggingFace in float64, which recomputes each of them alone, takes most of the time.
    """
    base = model_folder("llama")
    for number in (1, 2):
        make_adapter(base, tmp_path / f"adapter-{number}", tmp_path / f"merged-{number}", seed=number)
    modules = {f"sea-{number}": str(tmp_path / f"adapter-{number}") for number in (1, 2)}
    requests = requests_for(2, count, ["", *modules])
    arguments = {**ARGUMENTS, "enforce_eager": enforce_eager, "enable_lora": True, "lora_modules": modules}
    with few_threads(), VLLMSteeringModel(str(base), **arguments) as model:
        assert model.info.adapters == tuple(modules)
        generations = await run_all(model, requests)
        with pytest.raises(NotFound, match="'sea-3' is not served here"):
            await run_all(model, requests_for(3, 1, ["sea-3"]))
    oracles = {"": Oracle(base)} | {f"sea-{number}": Oracle(tmp_path / f"merged-{number}") for number in (1, 2)}
    for request, generation in zip(requests, generations, strict=True):
        check(oracles, request, generation, LORA_TOLERANCE)


@pytest.mark.extended
async def test_rows_of_a_quantised_model(model_folder: ModelFolder, tmp_path: Path) -> None:
    """On int8 weights and activations."""
    make_int8(model_folder("llama"), tmp_path / "int8", tmp_path / "rounded")
    requests = requests_for(4, 200, captured=1.0)
    with few_threads(), VLLMSteeringModel(str(tmp_path / "int8"), **ARGUMENTS) as model:
        generations = await run_all(model, requests)
    oracle = Int8Oracle(tmp_path / "rounded")
    for request, generation in zip(requests, generations, strict=True):
        check({"": oracle}, request, generation, INT8_TOLERANCE)
