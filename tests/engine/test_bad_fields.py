"""Every field that can be wrong, on real vLLM: a typed error names it before any event, and the engine answers on."""

import asyncio

import pytest
from google.protobuf.message import Message

from steer_service.core.errors import InvalidRequest, SteerError
from steer_service.engine import VLLMSteeringModel
from steer_service.runtime.calls import checked_events
from steer_service.runtime.results import Generation, collect
from steer_service.wire import tokenizer_pb2
from steer_service.wire.request import request_from_proto
from steer_service.wire.tokens import detokenize_from_proto, render_from_proto, tokenize_from_proto
from tests.bad_fields import BadField, ask, bad_fields, bad_prompts, sampled

pytestmark = pytest.mark.engine

LIMIT_S = 120


@pytest.fixture(scope="module")
def model(llama: VLLMSteeringModel) -> VLLMSteeringModel:
    """The shared engine, with the process that checks constraints started."""
    llama.generate_sync(["Warm up"], structured_outputs={"choice": ["warm"]})
    return llama


async def refused(model: VLLMSteeringModel, case: BadField, name: str) -> None:
    with pytest.raises(SteerError) as caught:
        await anext(model.submit(request_from_proto(case.message)))
    case.check(caught.value, name)


async def answered(model: VLLMSteeringModel) -> Generation:
    return await asyncio.wait_for(collect(checked_events(model, request_from_proto(ask()))), LIMIT_S)


async def test_every_bad_field_is_named_before_any_event_and_the_engine_continues(model: VLLMSteeringModel) -> None:
    cases = {name: case for name, case in bad_fields(model.info).items() if not case.on_wire_only}
    neighbour = asyncio.ensure_future(answered(model))
    for name, case in cases.items():
        await refused(model, case, name)
    assert (await neighbour).outputs[0].token_ids
    assert (await answered(model)).outputs[0].token_ids


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"regex": "("}, "BAD_CONSTRAINT"),
        ({"grammar": "root ::= nothing"}, "BAD_CONSTRAINT"),
        ({"json": '{"type": 5}'}, "BAD_CONSTRAINT"),
    ],
    ids=["regex", "grammar", "json"],
)
async def test_a_wrong_constraint_is_named_and_the_engine_continues(
    model: VLLMSteeringModel, constraint: dict[str, str], reason: str
) -> None:
    [kind] = constraint
    case = BadField(
        message=sampled(structured_outputs=constraint), field=f"sampling.structured_outputs.{kind}", reason=reason
    )
    await refused(model, case, kind)
    assert (await answered(model)).outputs[0].token_ids


async def shown(model: VLLMSteeringModel, message: Message) -> object:
    match message:
        case tokenizer_pb2.TokenizeRequest():
            return await model.tokens_of(tokenize_from_proto(message))
        case tokenizer_pb2.DetokenizeRequest():
            return await model.text_of(detokenize_from_proto(message))
    return await model.tokens_of(render_from_proto(message))


async def test_every_bad_prompt_to_show_is_named(model: VLLMSteeringModel) -> None:
    for name, (_, case) in bad_prompts(model.info).items():
        if not case.on_wire_only:
            with pytest.raises(SteerError) as caught:
                await shown(model, case.message)
            case.check(caught.value, name)
    with pytest.raises(InvalidRequest) as long:
        await model.detokenize([1] * (model.info.max_model_len + 1))
    assert (long.value.field, long.value.reason) == ("token_ids", "TOO_MANY_ENTRIES")
    assert (await model.tokenize("a")).token_ids
