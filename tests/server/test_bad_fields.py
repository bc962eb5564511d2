"""Every field that can be wrong: a typed error that names it, before any event, and the server answers on."""

import asyncio

import grpc
import pytest

from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import tokenizer_pb2
from steer_service.wire.status_codes import error_from_rpc
from tests.bad_fields import bad_fields, bad_prompts
from tests.server.served import Gate, Serve, bounded, text_request

FIELDS = {name: case for name, case in bad_fields(FAKE_MODEL).items() if not case.needs_tokenizer}
PROMPTS = bad_prompts(FAKE_MODEL)


@pytest.mark.parametrize("name", FIELDS)
async def test_a_bad_field_is_named_before_any_event_and_the_server_continues(serve: Serve, name: str) -> None:
    served = await serve()
    call = served.generation.Generate(FIELDS[name].message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call.read())
    FIELDS[name].check(error_from_rpc(caught.value), name)
    assert served.backend.running == 0
    assert (await served.generate(text_request()))[-1].HasField("completed")


async def test_bad_fields_disturb_no_request_under_way(serve: Serve) -> None:
    gate = Gate()
    served = await serve(FakeBackend())
    served.backend.step = gate
    neighbour = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())
    for case in FIELDS.values():
        await served.failure(case.message)
    gate.opened.set()
    assert (await bounded(neighbour))[-1].HasField("completed")


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_bad_prompt_to_show_is_named_and_the_server_continues(serve: Serve, name: str) -> None:
    served = await serve()
    method, case = PROMPTS[name]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(getattr(served.tokenizer, method)(case.message))
    case.check(error_from_rpc(caught.value), name)
    assert (await served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="a"))).token_ids


async def test_a_backend_without_structured_outputs_refuses_each_kind(serve: Serve) -> None:
    served = await serve()
    for constraint in ({"json": "{}"}, {"regex": "a"}, {"grammar": 'root ::= "a"'}, {"choice": {"texts": ["a"]}}):
        request = text_request()
        request.sampling.structured_outputs.CopyFrom(type(request.sampling.structured_outputs)(**constraint))
        failure = await served.failure(request)
        error = error_from_rpc(failure)
        assert failure.code() == grpc.StatusCode.UNIMPLEMENTED
        assert (error.reason, error.field) == ("NO_STRUCTURED_OUTPUTS", "sampling.structured_outputs")


async def test_a_backend_that_knows_no_special_tokens_cannot_leave_them_out(serve: Serve) -> None:
    served = await serve()
    request = text_request(capture={"layers": [0], "positions": {"skip_special_tokens": True}})
    failure = await served.failure(request)
    error = error_from_rpc(failure)
    assert failure.code() == grpc.StatusCode.UNIMPLEMENTED
    assert (error.reason, error.field) == ("NO_SPECIAL_TOKENS", "capture.positions.skip_special_tokens")
