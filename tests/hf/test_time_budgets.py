"""A request of transformers ends with its time, also while it waits for a batch."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from steer_service.core.capture import CaptureSpec
from steer_service.core.events import Event, FinishReason, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.hf.model import HFSteeringModel
from steer_service.runtime.results import collect

LONG = SamplingOptions(max_tokens=400, ignore_eos=True, temperature=0.0)


async def test_a_request_that_waits_for_a_batch_ends_with_its_time(hf: HFSteeringModel) -> None:
    first = hf.submit(GenerateRequest(prompt=TokenPrompt(token_ids=(1, 2, 3)), sampling=LONG))
    while not isinstance(await anext(first), TokenDelta):
        pass
    rest = asyncio.ensure_future(read_rest(first))  # its batch runs to its end before the next begins

    waiting = GenerateRequest(prompt=TokenPrompt(token_ids=(4, 5)), sampling=LONG, time_budget_s=0.01)
    [output] = (await collect(hf.submit(waiting))).outputs

    assert (output.finish_reason, output.token_ids) == (FinishReason.TIME_BUDGET, [])
    assert not rest.done()
    rest.cancel()
    await asyncio.gather(rest, return_exceptions=True)


async def test_a_request_without_a_token_has_empty_captures(hf: HFSteeringModel) -> None:
    request = GenerateRequest(
        prompt=TokenPrompt(token_ids=(1, 2)), sampling=LONG, capture=CaptureSpec(layers=(0, 2)), time_budget_s=1e-6
    )

    [output] = (await collect(hf.submit(request))).outputs

    assert output.receipt.rows_total == 0
    assert [output.captures[layer].shape for layer in (0, 2)] == [(0, hf.hidden_size)] * 2


async def read_rest(events: AsyncGenerator[Event, None]) -> None:
    """Reads a request whose first token has been read to its end."""
    async with aclosing(events):
        async for _ in events:
            pass


async def test_text_that_was_kept_back_comes_with_the_end(hf: HFSteeringModel) -> None:
    stop = ("\0" * 1000,)  # so long that all text might begin it
    sampling = SamplingOptions(max_tokens=400, ignore_eos=True, temperature=0.0, stop=stop, skip_special_tokens=True)
    request = GenerateRequest(prompt=TokenPrompt(token_ids=(1, 2, 3)), sampling=sampling, time_budget_s=0.2)

    [output] = (await collect(hf.submit(request))).outputs

    assert output.finish_reason is FinishReason.TIME_BUDGET
    assert output.text == hf.tokenizer.decode(output.token_ids, skip_special_tokens=True)
