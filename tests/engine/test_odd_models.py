"""No request ends the engine: random ones that look valid, on models of odd sizes, each beside a neighbour."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import EngineFailed, InvalidRequest, SteerError
from steer_service.core.prompt import TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import collect
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.engine.odd_models import ODD_MODELS, RandomRequests

pytestmark = pytest.mark.engine

TWELVE = "twelve ids, ten tokens, one layer"
AT_ONCE = 12
TIMEOUT_S = 120
"""For one request; only a request that hangs takes it."""


@contextmanager
def engine_on(name: str, folder: Path) -> Iterator[VLLMSteeringModel]:
    odd = ODD_MODELS[name]
    odd.save(folder)
    with VLLMSteeringModel(str(folder), **{**ENGINE_ARGUMENTS, "max_model_len": None, **odd.arguments}) as model:
        yield model


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSteeringModel]:
    with engine_on(TWELVE, tmp_path_factory.mktemp("twelve")) as model:
        yield model


async def test_log_probabilities_beyond_the_vocabulary_are_refused(twelve: VLLMSteeringModel) -> None:
    assert (twelve.info.vocab_size, twelve.info.max_logprobs) == (12, 12)
    with pytest.raises(InvalidRequest, match=r"sampling\.logprobs: 13 is outside 0\.\.12 on this model"):
        await twelve.generate(["a"], max_tokens=1, logprobs=13)

    [generation], _ = await twelve.generate(["a"], max_tokens=2, logprobs=12, ignore_eos=True, raw_output=True)

    assert [len(one.top) for one in generation.outputs[0].logprobs] == [12, 12]


async def test_ids_that_the_tokenizer_does_not_have_can_be_generated(twelve: VLLMSteeringModel) -> None:
    [generation], _ = await twelve.generate(
        ["a"], max_tokens=4, logprobs=12, ignore_eos=True, logit_bias={11: 100.0}, raw_output=True
    )

    assert (generation.outputs[0].token_ids, generation.outputs[0].text) == ([11] * 4, "")
    [likely] = {
        tuple(sorted((one.token_id, one.text) for one in entry.top)) for entry in generation.outputs[0].logprobs
    }
    assert dict(likely)[11] == ""


async def test_a_prompt_leaves_one_token_of_a_model_s_own_maximum(twelve: VLLMSteeringModel) -> None:
    limit, capture = twelve.info.max_model_len, CaptureSpec(layers=(0,))
    assert twelve.info.max_prompt_tokens == limit - 1
    prompt = TokenPrompt(token_ids=[1 + index % 10 for index in range(limit - 1)])
    longer = TokenPrompt(token_ids=(*prompt.token_ids, 1))

    [generation], [handle] = await twelve.generate(prompt, max_tokens=0, capture=capture, raw_output=True)
    with pytest.raises(InvalidRequest, match="needs one token more") as refused:
        await twelve.generate(longer, max_tokens=0, capture=capture)

    [output] = generation.outputs
    assert (output.token_ids, output.finish_reason.value, output.receipt.rows_total) == ([], "length", limit - 1)
    async with handle:
        await handle.fetch()
    assert len(handle.matrix(0)) == limit - 1
    assert refused.value.reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_as_many_tokens_as_fit_are_kept_at_a_model_s_own_maximum(
    twelve: VLLMSteeringModel, max_tokens: int
) -> None:
    ids = [1 + index % 10 for index in range(3 * twelve.info.max_model_len)]
    most = twelve.info.max_model_len - 1

    [generation], _ = await twelve.generate(
        TokenPrompt(token_ids=ids), max_tokens=max_tokens, truncate_prompt_tokens=-1, raw_output=True
    )

    assert generation.prompt_token_ids == tuple(ids[-most:])
    assert (await twelve.render(ids, truncate_prompt_tokens=-1)).token_ids == generation.prompt_token_ids


async def test_random_requests_on_twelve_ids_leave_the_engine_alive(twelve: VLLMSteeringModel) -> None:
    await fuzz(twelve, seed=1, count=200)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_MODELS)
async def test_a_thousand_random_requests_leave_the_engine_alive(name: str, tmp_path: Path) -> None:
    with engine_on(name, tmp_path) as model:
        await fuzz(model, seed=2, count=1000)


async def fuzz(model: VLLMSteeringModel, *, seed: int, count: int) -> None:
    """Sends `count` random requests, some at a time, each with a neighbour."""
    requests = RandomRequests(model.info, seed)
    ends: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)

    async def send(number: int, request: GenerateRequest) -> None:
        async with gate:
            end, neighbour = await asyncio.gather(end_of(model, request), served(model))
            assert neighbour, f"the neighbour of request {number} was not served"
            assert not end.startswith("EngineFailed"), (number, end, request)
            assert model.is_alive, (number, end, request)
            ends[end] += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            while (request := requests.next()) is None:
                pass
            tasks.create_task(send(number, request))
    print(dict(ends))
    assert ends["complete"] > count / 4  # most are valid
    assert len(ends) > 2  # and some are not


async def end_of(model: VLLMSteeringModel, request: GenerateRequest) -> str:
    """How a request ended: complete, or the kind and reason of its error."""
    try:
        generation = await asyncio.wait_for(collect(checked_events(model, request)), TIMEOUT_S)
    except EngineFailed as error:
        cause = error.__cause__
        return f"EngineFailed {error.reason}: {error!r}, {cause!r}, {cause and cause.__cause__!r}"
    except SteerError as error:
        return f"{type(error).__name__} {error.reason}"
    assert len(generation.outputs) == (request.sampling.n or 1)
    return "complete"


async def served(model: VLLMSteeringModel) -> bool:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2, 3)), sampling=SamplingOptions(max_tokens=3, temperature=0, ignore_eos=True)
    )
    generation = await asyncio.wait_for(collect(checked_events(model, request)), TIMEOUT_S)
    return len(generation.outputs[0].token_ids) == 3 and generation.prompt_token_ids == (1, 2, 3)


async def test_a_text_of_tokens_that_the_model_does_not_have_is_refused(twelve: VLLMSteeringModel) -> None:
    info, prompt = twelve.info, TextPrompt(text="a b c")
    generation = await collect(checked_events(twelve, GenerateRequest(prompt=prompt)))
    assert max(generation.prompt_token_ids) < info.vocab_size
