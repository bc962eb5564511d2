"""What a request comes to on its model."""

from typing import Any

import pytest

from steer_service.core.capture import CaptureDelivery, CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TextPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.runtime.prepare import PreparedRequest, prepare
from steer_service.runtime.prompts import RenderedPrompt
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend

PROMPT = RenderedPrompt(token_ids=(3, 1, 4))
DIRECTION = [1.0] * FAKE_MODEL.hidden_size
SHARED = CaptureDelivery.SHARED_MEMORY_PREFERRED


async def prepared(request: GenerateRequest, prompt: RenderedPrompt = PROMPT) -> PreparedRequest:
    async def render(asked: GenerateRequest) -> RenderedPrompt:
        assert asked is request
        return prompt

    return await prepare(request, FAKE_MODEL, render)


def asking(**fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt(text="pi"), sampling=SamplingOptions(max_tokens=4), **fields)


async def test_defaults_are_filled_in_and_rows_are_counted() -> None:
    result = await prepared(asking())
    assert result.prompt is PROMPT
    assert (result.options.max_tokens, result.options.n, result.options.temperature) == (4, 1, 1.0)
    assert result.rows.limit == 3 + 4 - 1
    assert (result.steering, result.capture, result.delivery) == (None, None, None)


async def test_positions_become_spans() -> None:
    steering = SteeringSpec.simple_add(1, DIRECTION, positions=-1)
    result = await prepared(
        asking(steering=steering, capture=CaptureSpec(layers=(0,), positions=range(2), delivery=SHARED))
    )
    assert (result.rows.steered, result.rows.captured) == (((2, 3),), ((0, 2),))
    assert result.steering is steering
    assert result.capture is result.request.capture
    assert result.delivery is CaptureDelivery.SHARED_MEMORY_REQUIRED


async def test_what_does_nothing_is_none() -> None:
    result = await prepared(asking(steering=SteeringSpec.simple_add(1, DIRECTION, 0.0), capture=CaptureSpec(layers=())))
    assert (result.steering, result.capture, result.delivery) == (None, None, None)


async def test_a_request_that_does_not_fit_is_refused_before_its_prompt_is_rendered() -> None:
    async def render(_: GenerateRequest) -> RenderedPrompt:
        pytest.fail("it was rendered")

    request = asking(capture=CaptureSpec(layers=(FAKE_MODEL.layer_count,)))
    with pytest.raises(InvalidRequest, match=r"capture\.layers\[0\]"):
        await prepare(request, FAKE_MODEL, render)


@pytest.mark.parametrize("count", [0, FAKE_MODEL.max_model_len])
async def test_a_prompt_without_tokens_or_room_is_refused(count: int) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        await prepared(asking(), RenderedPrompt(token_ids=(1,) * count))


async def test_a_prompt_may_fill_the_model_if_nothing_is_generated() -> None:
    request = GenerateRequest(
        prompt=TextPrompt(text="pi"),
        sampling=SamplingOptions(max_tokens=0),
        capture=CaptureSpec(layers=(0,), positions=-1),
    )
    count = FAKE_MODEL.max_model_len
    result = await prepared(request, RenderedPrompt(token_ids=(1,) * count))

    assert (result.options.max_tokens, result.rows.limit, result.rows.captured) == (0, count, ((count - 1, count),))
    with pytest.raises(InvalidRequest, match=f"the prompt has {count + 1} tokens, more than the model's limit"):
        await prepared(request, RenderedPrompt(token_ids=(1,) * (count + 1)))


async def test_a_position_beyond_the_request_is_refused() -> None:
    assert (await prepared(asking(capture=CaptureSpec(layers=(0,), positions=5)))).rows.captured == ((5, 6),)
    with pytest.raises(InvalidRequest, match=r"capture\.positions\.ranges\[0\].*at most 6 rows"):
        await prepared(asking(capture=CaptureSpec(layers=(0,), positions=6)))


async def test_the_fake_backend_says_no_delivery_where_nothing_is_captured() -> None:
    [generation], _ = await FakeBackend().generate("p", capture=CaptureSpec(layers=()), raw_output=True)
    assert generation.capture_delivery is None
