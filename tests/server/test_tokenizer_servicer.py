"""TokenizerService over a real channel, around the fake backend."""

import asyncio
from typing import Any

import grpc
import pytest

from steer_service.core.errors import EngineFailed
from steer_service.core.prompt_tokens import PromptTokens, RenderRequest
from steer_service.testing.fake_backend import FAKE_MODEL, FakeBackend
from steer_service.wire import generation_pb2, info_pb2, tokenizer_pb2
from steer_service.wire.status_codes import error_from_rpc
from tests.server.served import Gate, Serve, Served, bounded, channel_to, text_request

CHAT = generation_pb2.ChatPrompt(messages=[{"role": "user", "content": "one two"}])


class Slow(FakeBackend):
    """Holds every prompt that is shown until it is let go, but short ones; counts those that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[RenderRequest] = []
        self.arrived = asyncio.Event()
        self.let_go = asyncio.Event()

    async def tokens_of(self, request: RenderRequest) -> PromptTokens:
        self.asked.append(request)
        self.arrived.set()
        if request.prompt.text != "quick":
            await self.let_go.wait()
        return await super().tokens_of(request)


async def failure(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call)
    error = error_from_rpc(caught.value)
    return caught.value.code(), error.reason, error.field


async def test_a_text_becomes_the_tokens_of_a_request(serve: Serve) -> None:
    served = await serve()
    started = (await served.generate(text_request("one  two")))[0].started

    request = tokenizer_pb2.TokenizeRequest(text="one  two", with_token_texts=True, with_offsets=True)
    response = await served.tokenizer.Tokenize(request)

    assert response.token_ids == started.prompt_token_ids
    assert response.token_texts == ["one", "two"]
    assert (response.offsets.starts, response.offsets.ends) == ([0, 5], [3, 8])
    bare = await served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="one two"))
    assert (len(bare.token_texts), bare.HasField("offsets")) == (0, False)


async def test_a_prompt_may_fill_the_limit_of_the_model(serve: Serve) -> None:
    served = await serve()
    response = await served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="a " * FAKE_MODEL.max_model_len))
    assert len(response.token_ids) == FAKE_MODEL.max_model_len


async def test_tokens_become_text(serve: Serve) -> None:
    served = await serve()
    response = await served.tokenizer.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=[1, 2]))
    assert response.text == " t1 t2"


async def test_a_conversation_is_rendered_as_for_a_request(serve: Serve) -> None:
    served = await serve()
    asked = generation_pb2.GenerateRequest(chat=CHAT, capture={"layers": [1]}, sampling={"max_tokens": 1})
    started = (await served.generate(asked))[0].started

    response = await served.tokenizer.Render(tokenizer_pb2.RenderRequest(chat=CHAT))

    assert response.text == "<user> one two <assistant>"
    assert response.token_ids == started.prompt_token_ids
    assert response.message_boundaries == started.message_boundaries


@pytest.mark.parametrize(
    ("method", "request_", "want"),
    [
        ("Tokenize", {"text": "a", "model": "other"}, (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", "model")),
        ("Tokenize", {}, (grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT", "prompt.text")),
        (
            "Tokenize",
            {"text": "a " * (FAKE_MODEL.max_model_len + 1)},
            (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "prompt"),
        ),
        ("Render", {}, (grpc.StatusCode.INVALID_ARGUMENT, "MISSING_FIELD", "prompt")),
        (
            "Render",
            {"token_ids": {"ids": [1] * (FAKE_MODEL.max_model_len + 1)}},
            (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", "prompt"),
        ),
        (
            "Render",
            {"token_ids": {"ids": [FAKE_MODEL.vocab_size]}},
            (grpc.StatusCode.INVALID_ARGUMENT, "BAD_TOKEN", "prompt.token_ids"),
        ),
        (
            "Detokenize",
            {"token_ids": [1] * (FAKE_MODEL.max_model_len + 1)},
            (grpc.StatusCode.INVALID_ARGUMENT, "TOO_MANY_ENTRIES", "token_ids"),
        ),
    ],
)
async def test_what_cannot_be_shown_is_refused_with_its_field(
    serve: Serve, method: str, request_: dict[str, Any], want: tuple[grpc.StatusCode, str, str]
) -> None:
    served = await serve()
    message = getattr(tokenizer_pb2, f"{method}Request")(**request_)
    assert await failure(getattr(served.tokenizer, method)(message)) == want


async def test_it_answers_while_every_place_is_taken(serve: Serve) -> None:
    served = await serve(max_concurrent_requests=1)
    served.backend.step = gate = Gate()
    running = asyncio.ensure_future(served.generate(text_request()))
    await bounded(gate.reached.wait())

    assert (await bounded(served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="a")))).token_ids

    gate.opened.set()
    await bounded(running)


async def test_one_client_cannot_keep_the_others_from_their_turn(serve: Serve) -> None:
    served = await serve(Slow(), client_id="greedy")
    greedy = [tokenize(served, "greedy") for _ in range(20)]
    await bounded(served.backend.arrived.wait())
    async with channel_to(served.server.address, "modest") as channel:
        stub = type(served.tokenizer)(channel)
        modest = asyncio.ensure_future(stub.Tokenize(tokenizer_pb2.TokenizeRequest(text="modest")))
        while served.server._admission._reading.waiting < 19:  # its two turns are taken
            await asyncio.sleep(0)
        served.backend.let_go.set()
        await bounded(asyncio.gather(modest, *greedy))

    order = [request.prompt.text for request in served.backend.asked]
    assert order.index("modest") <= 3


async def test_one_slow_text_does_not_hold_up_another_client(serve: Serve) -> None:
    served = await serve(Slow(), client_id="slow")
    async with channel_to(served.server.address, "quick") as channel:
        stub, quick = type(served.tokenizer)(channel), tokenizer_pb2.TokenizeRequest(text="quick")
        await bounded(stub.Tokenize(quick))  # so that there are two clients
        served.backend.arrived.clear()
        slow = [tokenize(served, "slow") for _ in range(5)]
        await bounded(served.backend.arrived.wait())

        assert (await bounded(stub.Tokenize(quick))).token_ids

        served.backend.let_go.set()
        await bounded(asyncio.gather(*slow))


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c"]], ids=["has its turn", "waits"])
async def test_a_call_ends_at_the_deadline_of_the_server(serve: Serve, texts: list[str]) -> None:
    served = await serve(Slow(), max_deadline_s=0.2)
    ends = await asyncio.gather(*[failure(tokenize(served, text)) for text in texts])
    assert ends == [(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "")] * len(texts)
    await bounded(served.server._admission.wait_idle())


async def test_a_server_that_stops_ends_every_call(serve: Serve) -> None:
    served = await serve(Slow(), grace_s=0.0)
    calls = [tokenize(served, text) for text in "abc"]
    await bounded(served.backend.arrived.wait())
    draining = asyncio.ensure_future(served.server.drain())
    ends = await asyncio.gather(*map(failure, calls))
    assert ends == [(grpc.StatusCode.UNAVAILABLE, "DRAINING", "")] * 3
    await bounded(draining)


async def test_calls_end_with_the_engine(serve: Serve) -> None:
    served = await serve(Slow())
    call = tokenize(served, "a")
    await bounded(served.backend.arrived.wait())
    served.backend.failure = EngineFailed("the engine died", reason="ENGINE_DIED")
    await served.failure(text_request())
    assert await failure(call) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_DIED", "")


async def test_a_client_over_its_quota_is_refused_before_anything_is_read(serve: Serve) -> None:
    served = await serve(Slow(), client_id="one", max_client_requests=1)
    first = tokenize(served, "a")
    await bounded(served.backend.arrived.wait())

    code, reason, _ = await failure(served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="b")))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CLIENT_QUOTA")

    served.backend.let_go.set()
    await bounded(first)


async def test_it_is_unavailable_until_the_model_is_loaded(serve: Serve) -> None:
    served = await serve(opened=False)
    code, reason, _ = await failure(served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text="a")))
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "LOADING")


async def test_the_server_says_that_it_has_the_service(serve: Serve) -> None:
    served = await serve()
    info = await served.info.GetServerInfo(info_pb2.GetServerInfoRequest())
    assert info_pb2.FEATURE_TOKENIZER in info.features
    assert (await served.statuses())["steer.v1.TokenizerService"] == "SERVING"


def tokenize(served: Served, text: str) -> "asyncio.Future[tokenizer_pb2.TokenizeResponse]":
    return asyncio.ensure_future(served.tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(text=text)))
