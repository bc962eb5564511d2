"""What belongs to whom: clients with an id, and callers without one."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest

from steer_service.core.errors import InvalidRequest, NotFound, Unsupported
from steer_service.core.specs import SteeringSpec
from steer_service.server import generation_servicer
from steer_service.server.callers import Caller, caller_of
from steer_service.wire.generation_pb2 import GenerateRequest
from steer_service.wire.status_codes import error_from_rpc
from steer_service.wire.steering import steering_to_proto
from steer_service.wire.steering_pb2 import (
    DeleteVectorRequest,
    GetVectorRequest,
    ListVectorsRequest,
    SteeringOperation,
    UploadVectorRequest,
)
from tests.server.capture_client import Begin, Client, error
from tests.server.served import Gate, Serve, bounded, channel_to, text_request
from tests.wire.request_messages import add, inline, steered

VECTOR = inline(bytes(range(32)), (8,))


async def test_without_an_id_the_secret_of_a_capture_is_the_right_to_it(begin: Begin) -> None:
    alice = await begin()
    nobody, somebody = Client(alice.served), Client(alice.served, "bob")
    mine, theirs = await nobody.held(), await alice.held()

    assert await somebody.fetch(mine.capture_id)
    assert await nobody.fetch(mine.capture_id)
    assert isinstance(await error(nobody.fetch(theirs.capture_id)), NotFound)
    await nobody.release(capture_id=mine.capture_id)
    assert isinstance(await error(nobody.fetch(mine.capture_id)), NotFound)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("UploadVector", UploadVectorRequest(vector=VECTOR.inline)),
        ("GetVector", GetVectorRequest(digest=bytes(32))),
        ("ListVectors", ListVectorsRequest()),
        ("DeleteVector", DeleteVectorRequest(digest=bytes(32))),
    ],
)
async def test_without_an_id_nothing_is_stored_listed_or_deleted(serve: Serve, method: str, request_: Any) -> None:
    served = await serve()
    refused = await error(getattr(served.steering, method)(request_))
    assert (type(refused), refused.reason) == (Unsupported, "NO_CLIENT_ID")


async def test_vectors_of_a_request_without_an_id_are_not_stored(serve: Serve) -> None:
    served = await serve()
    carried = steered(add(VECTOR), layer=1)
    assert not (await served.generate(carried))[0].started.vectors_stored
    spec = SteeringSpec.simple_add(1, served.backend.requests[-1].steering.layers[1].operations[0].vector)
    named = text_request(steering=steering_to_proto(spec, spec.vector_digests()))
    assert error_from_rpc(await served.failure(named)).reason == "UNKNOWN_VECTOR"


async def test_a_vector_is_named_by_its_digest_within_the_call_that_carries_it(serve: Serve) -> None:
    served = await serve()
    await served.generate(steered(add(VECTOR), layer=1))
    spec = served.backend.requests[-1].steering
    twice = steered(add(VECTOR), layer=1)
    twice.steering.layers.add(layer=2, operations=[SteeringOperation()])
    twice.steering.layers[1].operations[0].add.vector.digest = spec.vector_digests()[0]

    await served.generate(twice)

    first, second = served.backend.requests[-1].steering.vectors()
    assert (first == second).all()


@pytest.mark.parametrize("given", [["a b"], ["x" * 129], ["a/b"], ["one", "two"]])
async def test_an_id_that_is_none_is_refused(serve: Serve, given: list[str]) -> None:
    served = await serve()
    metadata = [("steer-client-id", value) for value in given]
    refused = await error(served.generation.Generate(text_request(), metadata=metadata).read())
    assert (type(refused), refused.reason, refused.field) == (InvalidRequest, "BAD_CLIENT_ID", "steer-client-id")


async def test_request_ids_are_each_callers_own(serve: Serve) -> None:
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    names = ["alice", "bob", "", ""]
    channels = [channel_to(served.server.address, name) for name in names]
    calls = [generate(channel, text_request(request_id="same")) for channel in channels]
    started = [(await bounded(call.read())).started for call in calls]
    assert [one.request_id for one in started] == ["same"] * 4

    again = generate(channels[0], text_request(request_id="same"))
    assert (await error(again.read())).reason == "DUPLICATE_REQUEST_ID"
    gate.opened.set()
    for channel in channels:
        await channel.close()


def generate(channel: grpc.aio.Channel, request: GenerateRequest) -> Any:
    from steer_service.wire.generation_pb2_grpc import GenerationServiceStub

    return GenerationServiceStub(channel).Generate(request)


@pytest.mark.parametrize(("isolation", "differ"), [("client", True), ("auto", False), ("none", False)])
async def test_with_isolation_no_client_reuses_prompts_of_another(serve: Serve, isolation: str, differ: bool) -> None:
    served = await serve(prefix_isolation=isolation)

    async def salt(name: str, given: str = "") -> str:
        channel = channel_to(served.server.address, name)
        call = generate(channel, text_request(cache_salt=given))
        await bounded(asyncio.gather(*[call.read() for _ in range(1)]))
        await channel.close()
        return served.backend.requests[-1].cache_salt

    alice, bob = await salt("alice"), await salt("bob")
    assert (alice != bob) is differ
    assert await salt("alice") == alice
    if differ:
        assert await salt("alice", "x") not in (alice, await salt("bob", "x"), "x")
        assert await salt("") not in (alice, await salt(""))


async def test_by_default_authenticated_clients_reuse_no_prompts_of_each_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing authenticates yet: the callers of this test stand for those of whatever will."""

    def authenticated(context: grpc.aio.ServicerContext) -> Caller:
        return replace(caller_of(context), is_authenticated=True)

    monkeypatch.setattr(generation_servicer, "caller_of", authenticated)
    served = await serve()
    salts = []
    for name in ("alice", "bob", "alice"):
        channel = channel_to(served.server.address, name)
        await bounded(generate(channel, text_request()).read())
        await channel.close()
        salts.append(served.backend.requests[-1].cache_salt)

    assert salts[0] == salts[2] != ""
    assert salts[1] not in ("", salts[0])


async def test_page_tokens_tell_nothing_and_are_their_clients_own(serve: Serve) -> None:
    served = await serve(client_id="alice")
    for number in range(3):
        vector = inline(bytes(range(number, number + 32)), (8,)).inline
        await bounded(served.steering.UploadVector(UploadVectorRequest(vector=vector)))
    page = await bounded(served.steering.ListVectors(ListVectorsRequest(page_size=1)))
    assert len(page.next_page_token) == 48
    following = ListVectorsRequest(page_token=page.next_page_token)
    assert len((await bounded(served.steering.ListVectors(following))).vectors) == 2
    foreign = served.steering.ListVectors(following, metadata=(("steer-client-id", "bob"),))
    assert (await error(foreign)).reason == "BAD_PAGE_TOKEN"
