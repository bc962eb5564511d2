"""Bad input is refused by field, and nobody else notices."""

import asyncio

import grpc
import numpy as np
import pytest

from steer_client import AsyncSteerClient
from steer_service.core.capture import CaptureSpec
from steer_service.core.errors import InvalidRequest, NotFound, SteerError, Unsupported
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.wire import generation_pb2_grpc
from steer_service.wire.request import request_to_proto
from steer_service.wire.status_codes import error_from_rpc
from steer_service.wire.tokenizer_pb2_grpc import TokenizerServiceStub
from tests.bad_fields import BadField, bad_fields, bad_prompts, chat, sampled
from tests.bad_fields import ask as fields_ask
from tests.real_server.serving import Server, ask, run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


BAD_REQUESTS = {
    "an unknown layer": (
        lambda: ask("x", steering=SteeringSpec.simple_add(30, np.ones(576))),
        InvalidRequest,
        "steering.layers[30]",
        "UNKNOWN_LAYER",
    ),
    "a wrong width": (
        lambda: ask("x", steering=SteeringSpec.simple_add(3, np.ones(64))),
        InvalidRequest,
        "steering.layers[3].operations[0].vector",
        "WRONG_WIDTH",
    ),
    "an overflow in bfloat16": (
        lambda: ask("x", steering=SteeringSpec(layers={3: LayerSteeringSpec([AddSpec(np.full(576, 3.4e38))])})),
        InvalidRequest,
        "steering.layers[3].operations[0].vector",
        "NON_FINITE",
    ),
    "an unknown capture layer": (
        lambda: ask("x", capture=CaptureSpec(layers=(1, 99))),
        InvalidRequest,
        "capture.layers[1]",
        "UNKNOWN_LAYER",
    ),
    "a prompt over the model's limit": (
        lambda: GenerateRequest(prompt=TokenPrompt(token_ids=[5] * 512)),
        InvalidRequest,
        "prompt",
        "PROMPT_TOO_LONG",
    ),
    "an unknown model": (lambda: ask("x", model="another"), NotFound, "model", "UNKNOWN_MODEL"),
}

ONLY_HERE = {
    "tools that the template ignores": BadField(
        message=fields_ask(chat=chat(tools=['{"type": "function", "function": {"name": "tide"}}'])),
        field="prompt.tools",
        reason="NO_TOOLS",
        kind=Unsupported,
    ),
    "a wrong expression": BadField(
        message=sampled(structured_outputs={"regex": "("}),
        field="sampling.structured_outputs.regex",
        reason="BAD_CONSTRAINT",
    ),
    "a prompt of special tokens": BadField(
        message=fields_ask(
            capture={"layers": [0], "positions": {"skip_special_tokens": True}},
            token_ids={"ids": [1]},
            sampling={"max_tokens": 0},
        ),
        field="capture.positions.skip_special_tokens",
        reason="EMPTY_POSITIONS",
    ),
}
"""What the fields of this model and its tokenizer refuse."""


class TestBadInput:
    @pytest.mark.parametrize("name", BAD_REQUESTS)
    async def test_bad_input_is_refused_by_field_and_other_requests_continue(
        self, client: AsyncSteerClient, name: str
    ) -> None:
        make, kind, field, reason = BAD_REQUESTS[name]
        other = asyncio.ensure_future(run(client, ask("Meanwhile", sampling={"max_tokens": 16})))
        with pytest.raises(kind) as caught:
            await anext(client.submit(make()))
        assert (caught.value.field, caught.value.reason) == (field, reason)
        assert len((await other).outputs[0].token_ids) == 16

    @pytest.mark.parametrize(
        ("break_it", "field"),
        [
            (lambda m: m.ClearField("prompt"), "prompt"),
            (lambda m: setattr(m, "text", ""), "prompt"),
            (lambda m: setattr(m.sampling, "max_tokens", 2**31), "sampling.max_tokens"),
            (lambda m: setattr(m.sampling, "temperature", float("nan")), "sampling.temperature"),
            (lambda m: setattr(_vector(m), "data", b"abc"), "steering.layers[0].operations[0].vector"),
            (lambda m: setattr(_vector(m), "data", _floats(np.nan)), "steering.layers[0].operations[0].vector"),
            (lambda m: setattr(_vector(m), "data", _floats(0.0)), "steering.layers[0].operations[0].vector"),
            (lambda m: setattr(_operation(m).add, "scale", float("inf")), "steering.layers[0].operations[0].scale"),
            (lambda m: _invert_bounds(m), "steering.layers[0].operations[0].min"),
        ],
        ids=["no prompt", "empty", "no tokens", "NaN", "truncated", "NaN vector", "zero norm", "inf scale", "inverted"],
    )
    async def test_malformed_messages_are_refused_by_field(self, server, client, break_it, field) -> None:
        message = request_to_proto(ask("x", steering=SteeringSpec.simple_add(3, np.ones(576))))
        break_it(message)
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(message, timeout=60)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        error = error_from_rpc(caught.value)
        assert isinstance(error, InvalidRequest)
        assert error.field.startswith(field)
        assert (await run(client, ask("Still here"))).outputs[0].text

    async def test_every_bad_field_is_named_and_other_requests_continue(
        self, server: Server, client: AsyncSteerClient
    ) -> None:
        info = await client.load_info()
        others = asyncio.ensure_future(run(client, ask("Meanwhile", sampling={"max_tokens": 16})))
        async with grpc.aio.insecure_channel(server.address) as channel:
            generate = generation_pb2_grpc.GenerationServiceStub(channel).Generate
            for name, case in (bad_fields(info) | ONLY_HERE).items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await generate(case.message, timeout=60).read()
                case.check(error_from_rpc(caught.value), name)
            for name, (method, case) in bad_prompts(info).items():
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await getattr(TokenizerServiceStub(channel), method)(case.message, timeout=60)
                case.check(error_from_rpc(caught.value), name)
        assert len((await others).outputs[0].token_ids) == 16
        assert (await run(client, ask("Still here"))).outputs[0].text

    async def test_a_message_over_the_limit_is_refused(self, client: AsyncSteerClient) -> None:
        with pytest.raises(SteerError) as caught:
            await anext(client.submit(ask("x" * (17 << 20))))
        assert caught.value.reason == "MESSAGE_TOO_LARGE"
        assert (await run(client, ask("Still here"))).outputs[0].text


def _operation(message):
    return message.steering.layers[0].operations[0]


def _vector(message):
    return _operation(message).add.vector.inline


def _floats(value: float) -> bytes:
    return np.full(576, value, np.float32).tobytes()


def _invert_bounds(message) -> None:
    vector = _operation(message).add.vector
    cap = type(_operation(message))()
    cap.projection_cap.vector.CopyFrom(vector)
    cap.projection_cap.min, cap.projection_cap.max = 1.0, -1.0
    _operation(message).CopyFrom(cap)
