"""Structured outputs on vLLM: steered answers follow them, and no constraint stops other requests."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest
from steer_service.core.events import FinishReason, TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import SteeringSpec
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from tests.engine.all_backends import Shared
from tests.engine.oracle import Oracle, relative_error
from tests.tiny_models import LAYERS, WIDTH, ModelFolder

pytestmark = pytest.mark.engine

PROMPT = TokenPrompt(token_ids=tuple(range(3000, 3040)))
DENSE = "root ::= r0 r1\n" + "\n".join(
    f'r{i} ::= r{(i * 7 + 1) % 40} r{(i * 11 + 3) % 40} r{(i * 5 + 2) % 40} | "a" | ""' for i in range(40)
)
"""A grammar of which a token soon takes a second, each more than the one before."""

STEERING = SteeringSpec.simple_add(1, np.random.default_rng(5).normal(size=WIDTH), 0.5)
MOOD = {
    "type": "object",
    "properties": {"mood": {"enum": ["calm", "wild"]}, "score": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["mood", "score"],
    "additionalProperties": False,
}
LIMIT_S = 240


def ask(constraint: dict[str, object], **fields: object) -> GenerateRequest:
    sampling = SamplingOptions(structured_outputs=constraint, **{"max_tokens": 200, "temperature": 0.0, **fields})
    return GenerateRequest(prompt=PROMPT, sampling=sampling)


async def run(model: VLLMSteeringModel, request: GenerateRequest) -> Generation:
    return await asyncio.wait_for(collect(checked_events(model, request)), LIMIT_S)


@pytest.fixture(scope="module")
def model(llama: VLLMSteeringModel) -> VLLMSteeringModel:
    """The shared engine, with the process that checks constraints started."""
    llama.generate_sync(["Warm up"], structured_outputs={"choice": ["warm"]})
    return llama


async def test_a_steered_answer_follows_its_schema_and_its_rows_are_right(
    model: VLLMSteeringModel, model_folder: ModelFolder
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    letters = {token for letter in '{}":,moodscorecalmwild123456789' for token in tokenizer.encode(letter)}
    letters.add(tokenizer.eos_token_id)  # a random model would write spaces without end
    request = ask({"json": MOOD}, temperature=1.0, seed=3, allowed_token_ids=sorted(letters))
    request = replace(request, steering=STEERING, capture=CaptureSpec(layers=range(LAYERS)))
    generation = await run(model, request)
    [output] = generation.outputs

    assert output.finish_reason is FinishReason.STOP
    answer = json.loads(output.text)
    assert set(answer) == {"mood", "score"}
    assert answer["mood"] in ("calm", "wild")
    assert answer["score"] in range(1, 10)
    tokens = [*PROMPT.token_ids, *output.token_ids][:-1]
    assert output.receipt.rows_steered == output.receipt.rows_total == len(tokens)
    truth = Oracle(model_folder("llama")).streams(tokens, STEERING)
    for layer, rows in output.captured.hidden.items():
        assert relative_error(rows, truth[layer]) < 1e-5


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, r"[0-9]{4}-[0-9]{2}"),
        ({"grammar": 'root ::= "(" [ab] [ab] ")"'}, r"\([ab][ab]\)"),
        ({"choice": ['say "yes"', "no\n"]}, r'say "yes"|no\n'),
    ],
)
async def test_every_output_follows_its_constraint(
    model: VLLMSteeringModel, constraint: dict[str, object], pattern: str
) -> None:
    generation = await run(model, ask(constraint, n=2, temperature=1.0, seed=1))

    assert len(generation.outputs) == 2
    for output in generation.outputs:
        assert output.finish_reason is FinishReason.STOP
        assert re.fullmatch(pattern, output.text)


async def test_a_served_answer_is_that_of_the_engine(model: VLLMSteeringModel) -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0"))
    address = await server.listen()
    await server.open(Shared(model))
    options: dict[str, Any] = {"temperature": 0.0, "steering_spec": STEERING, "max_tokens": 60, "raw_output": True}
    constraints = {
        "regex": "[a-z]{3}-[0-9]{3}",
        "json": {"enum": ["calm", "wild"]},
        "grammar": 'root ::= "calm" | "wild " [0-9]',
        "choice": ["a calm sea", "a wild sea"],
    }
    try:
        async with AsyncSteerClient(address) as client:
            for kind, constraint in constraints.items():
                asked = {"structured_outputs": {kind: constraint}, **options}
                [served] = (await client.generate([PROMPT], **asked)).generations
                [own] = (await model.generate([PROMPT], **asked)).generations
                assert served.outputs[0].text == own.outputs[0].text, kind
                assert served.outputs[0].token_ids == own.outputs[0].token_ids, kind
                assert served.outputs[0].finish_reason is FinishReason.STOP, kind
                assert served.sampling == own.sampling, kind
    finally:
        await server.drain()


async def test_a_short_answer_is_the_beginning_of_one(model: VLLMSteeringModel) -> None:
    [output] = (await run(model, ask({"choice": ["a long answer of several tokens"]}, max_tokens=2))).outputs
    assert output.finish_reason is FinishReason.LENGTH
    assert "a long answer of several tokens".startswith(output.text)


async def test_options_that_leave_no_token_are_refused(model: VLLMSteeringModel, model_folder: ModelFolder) -> None:
    seven = AutoTokenizer.from_pretrained(model_folder("llama")).encode("7", add_special_tokens=False)
    for kind, options in (("yes", {"allowed_token_ids": [3000]}), ("7", {"stop_token_ids": seven})):
        with pytest.raises(InvalidRequest) as refused:
            await run(model, ask({"choice": [kind]}, **options))
        assert refused.value.reason == "NO_TOKEN_LEFT"


async def test_a_place_that_no_token_has_is_the_fault_of_the_constraint(model: VLLMSteeringModel) -> None:
    with pytest.raises(InvalidRequest) as refused:  # the check sees 12 tokens of a text
        await run(model, ask({"regex": "[ab]{150}\x04"}))
    assert (refused.value.reason, refused.value.field) == ("BAD_CONSTRAINT", "sampling.structured_outputs")


async def tokens_of(model: VLLMSteeringModel) -> AsyncGenerator[int, None]:
    """Tokens of unconstrained requests, without end."""
    sampling = SamplingOptions(max_tokens=400, temperature=0.0, ignore_eos=True)
    while True:
        async with aclosing(checked_events(model, GenerateRequest(prompt=PROMPT, sampling=sampling))) as events:
            async for event in events:
                if isinstance(event, TokenDelta):
                    yield len(event.token_ids)


@pytest.mark.parametrize(
    "constraint",
    [{"regex": ".{1,2000}x"}, {"json": {"type": "array", "items": {"type": "string", "maxLength": 5000}}}],
    ids=["regex", "schema"],
)
async def test_another_response_continues_while_a_hostile_constraint_is_refused(
    model: VLLMSteeringModel, constraint: dict[str, object]
) -> None:
    async with asyncio.timeout(LIMIT_S), aclosing(tokens_of(model)) as tokens:
        await anext(tokens)
        refusing = asyncio.ensure_future(run(model, ask(constraint)))
        meanwhile = 0
        while not refusing.done():
            meanwhile += await anext(tokens)
    with pytest.raises(InvalidRequest) as refused:
        await refusing
    assert refused.value.reason == "CONSTRAINT_TOO_COMPLEX"
    assert meanwhile > 20


async def test_a_constraint_of_which_one_token_takes_too_long_ends_its_own_request(
    model: VLLMSteeringModel, model_folder: ModelFolder
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    letters = [token for letter in "ab" for token in tokenizer.encode(letter, add_special_tokens=False)]
    grammar = DENSE.replace("r0 r1", "[ab]{150} r0 r1", 1)  # beyond what the check sees
    slow = ask({"grammar": grammar}, max_tokens=200, logit_bias=dict.fromkeys(letters, 100.0))
    neighbour = replace(slow, sampling=SamplingOptions(max_tokens=100, ignore_eos=True))

    failed, answered = await asyncio.gather(run(model, slow), run(model, neighbour), return_exceptions=True)

    assert isinstance(failed, InvalidRequest)
    assert (failed.reason, failed.field) == ("CONSTRAINT_TOO_COMPLEX", "sampling.structured_outputs")
    assert isinstance(answered, Generation)
    assert len(answered.outputs[0].token_ids) == 100


async def test_a_constraint_whose_tokens_become_slow_ends_its_own_request(
    model: VLLMSteeringModel, model_folder: ModelFolder
) -> None:
    letters = AutoTokenizer.from_pretrained(model_folder("llama")).encode("aaaaaaaa", add_special_tokens=False)
    slow = ask({"regex": "(a*)*b"}, max_tokens=450, logit_bias=dict.fromkeys(letters, 100.0))
    neighbour = replace(slow, sampling=SamplingOptions(max_tokens=100, ignore_eos=True))

    failed, answered = await asyncio.gather(run(model, slow), run(model, neighbour), return_exceptions=True)

    assert isinstance(failed, InvalidRequest)
    assert failed.reason == "CONSTRAINT_TOO_COMPLEX"
    assert isinstance(answered, Generation)
    assert len(answered.outputs[0].token_ids) == 100
    with pytest.raises(InvalidRequest) as refused:
        await anext(model.submit(slow))
    assert (refused.value.reason, refused.value.field) == (failed.reason, "sampling.structured_outputs.regex")
