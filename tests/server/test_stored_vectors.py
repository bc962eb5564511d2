"""VectorService and requests that name vectors, over a real channel."""

from collections.abc import Awaitable
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

from steer_service.core.arrays import Float32Array, vector_digest
from steer_service.core.errors import InvalidRequest, MissingVectors, OverBudget, SteerError, Unsupported
from steer_service.core.specs import AddSpec, LayerSteeringSpec, SteeringSpec
from steer_service.server.vector_store import OVERHEAD_BYTES
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import generation_pb2, info_pb2
from steer_service.wire.status_codes import error_from_rpc
from steer_service.wire.steering import steering_to_proto
from steer_service.wire.steering_pb2 import (
    DeleteVectorRequest,
    GetVectorRequest,
    ListVectorsRequest,
    UploadVectorRequest,
    UploadVectorResponse,
)
from steer_service.wire.tensor_pb2 import Tensor
from steer_service.wire.tensors import tensor_from_proto, tensor_to_proto
from tests.server.served import Gate, Serve, Served, bounded, text_request

ONE = 8 * 4 + OVERHEAD_BYTES
"""Bytes that one vector of the fake model counts."""

OTHER = (("steer-client-id", "other"),)


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """As everywhere, but with a client id: stored vectors belong to one."""
    return partial(serve, client_id="me")


def vector(number: int) -> Float32Array:
    return np.arange(8, dtype=np.float32) + number


def steered(*numbers: int, named: bool = True) -> generation_pb2.GenerateRequest:
    """A request with an addition of each vector, named or in it."""
    spec = SteeringSpec({1: LayerSteeringSpec([AddSpec(vector(number)) for number in numbers])})
    return text_request(steering=steering_to_proto(spec, spec.vector_digests() if named else ()))


async def upload(served: Served, number: int, **fields: Any) -> UploadVectorResponse:
    request = UploadVectorRequest(vector=tensor_to_proto(vector(number)), **fields)
    return await bounded(served.steering.UploadVector(request))


async def refusal(call: Awaitable[Any]) -> SteerError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(call)
    return error_from_rpc(caught.value)


async def listed(served: Served, **about: Any) -> list[bytes]:
    return [one.digest for one in (await bounded(served.steering.ListVectors(ListVectorsRequest(), **about))).vectors]


async def missing(served: Served, request: generation_pb2.GenerateRequest) -> tuple[bytes, ...]:
    error = error_from_rpc(await served.failure(request))
    assert type(error) is MissingVectors
    return error.digests


def digests(*numbers: int) -> tuple[bytes, ...]:
    return tuple(vector_digest(vector(number)) for number in numbers)


async def test_an_uploaded_vector_can_be_named_fetched_listed_and_deleted(serve: Serve):
    served = await serve()
    answer = await upload(served, 1)
    assert (answer.digest, answer.created) == (*digests(1), True)
    assert not (await upload(served, 1, digest=answer.digest)).created

    fetched = await bounded(served.steering.GetVector(GetVectorRequest(digest=answer.digest)))
    np.testing.assert_array_equal(tensor_from_proto(fetched.vector), vector(1))
    [stored] = (await bounded(served.steering.ListVectors(ListVectorsRequest()))).vectors
    assert (stored.digest, stored.size, stored.stored_bytes) == (answer.digest, 8, ONE)

    events = await served.generate(steered(1, 1))
    assert events[0].started.vectors_stored
    spec = served.backend.requests[-1].steering
    np.testing.assert_array_equal(np.stack([*spec.vectors()]), np.stack([vector(1)] * 2))
    assert events[-2].finished.receipt.steering_digest.hex() == spec.digest()

    assert (await bounded(served.steering.DeleteVector(DeleteVectorRequest(digest=answer.digest)))).deleted
    assert not (await bounded(served.steering.DeleteVector(DeleteVectorRequest(digest=answer.digest)))).deleted
    assert await missing(served, steered(1)) == digests(1)


async def test_a_request_stores_the_vectors_that_it_carries(serve: Serve):
    served = await serve()
    assert (await served.generate(steered(1, 2, named=False)))[0].started.vectors_stored
    first = served.backend.requests[-1].steering

    assert (await served.generate(steered(1, 2)))[0].started.vectors_stored
    assert served.backend.requests[-1].steering == first
    assert set(await listed(served)) == set(digests(1, 2))
    assert not (await served.generate(text_request()))[0].started.vectors_stored


async def test_a_client_that_always_sends_its_vectors_is_served(serve: Serve):
    served = await serve()
    for _ in range(2):
        events = await served.generate(steered(1, 2, named=False))
        assert events[-2].finished.receipt.rows_steered == 6
    assert served.backend.requests[-1].steering == served.backend.requests[-2].steering


async def test_every_vector_that_is_missing_is_listed_before_any_work(serve: Serve):
    served = await serve()
    await upload(served, 1)
    requests = len(served.backend.requests)
    error = error_from_rpc(await served.failure(steered(2, 1, 3, 2)))
    assert type(error) is MissingVectors
    assert (error.digests, error.count) == (digests(2, 3), 2)
    assert (error.reason, error.field) == ("UNKNOWN_VECTOR", "steering.layers[0].operations[0].vector")
    assert (len(served.backend.requests), served.server.running) == (requests, 0)


async def test_missing_vectors_beyond_the_list_are_counted(serve: Serve):
    served = await serve()
    error = error_from_rpc(await served.failure(steered(*range(600))))
    assert type(error) is MissingVectors
    assert (error.digests, error.count) == (digests(*range(128)), 600)


async def test_vectors_of_a_refused_request_are_not_stored(serve: Serve):
    served = await serve()
    request = steered(1, named=False)
    request.steering.layers[0].layer = 99
    await served.failure(request)
    assert await listed(served) == []


async def test_vectors_belong_to_their_client_only(serve: Serve):
    served = await serve()
    await upload(served, 1)
    asked = GetVectorRequest(digest=digests(1)[0])
    assert type(await refusal(served.steering.GetVector(asked, metadata=OTHER))) is MissingVectors
    assert await listed(served, metadata=OTHER) == []
    deleted = served.steering.DeleteVector(DeleteVectorRequest(digest=digests(1)[0]), metadata=OTHER)
    assert not (await bounded(deleted)).deleted
    stream = served.generation.Generate(steered(1), metadata=OTHER)
    assert type(await refusal(stream.read())) is MissingVectors
    assert await listed(served) == [*digests(1)]


async def test_a_vector_whose_bytes_have_another_digest_is_refused(serve: Serve):
    served = await serve()
    error = await refusal(upload(served, 1, digest=digests(2)[0]))
    assert (type(error), error.reason, error.field) == (InvalidRequest, "DIGEST_MISMATCH", "digest")
    assert await listed(served) == []


BAD = {
    "no vector": (None, "vector", "MISSING_FIELD"),
    "wrong width": (np.ones(9, np.float32), "vector", "WRONG_WIDTH"),
    "two dimensions": (np.ones((2, 4), np.float32), "vector", "BAD_SHAPE"),
    "not finite": (np.full(8, np.nan, np.float32), "vector", "NON_FINITE"),
    "no direction": (np.zeros(8, np.float32), "vector", "ZERO_NORM"),
}


@pytest.mark.parametrize("name", BAD)
async def test_vectors_that_cannot_steer_are_not_stored(serve: Serve, name: str):
    served = await serve()
    array, field, reason = BAD[name]
    request = UploadVectorRequest(vector=tensor_to_proto(array) if array is not None else None)
    error = await refusal(served.steering.UploadVector(request))
    assert (type(error), error.field, error.reason) == (InvalidRequest, field, reason)


async def test_bytes_that_are_no_tensor_are_refused_by_the_path_of_their_field(serve: Serve):
    served = await serve()
    error = await refusal(served.steering.UploadVector(UploadVectorRequest(vector=Tensor(dtype=1, shape=[8]))))
    assert (error.field, error.reason) == ("vector", "BAD_SHAPE")


@pytest.mark.parametrize("method", ["GetVector", "DeleteVector"])
async def test_half_a_digest_is_refused(serve: Serve, method: str):
    served = await serve()
    kind = {"GetVector": GetVectorRequest, "DeleteVector": DeleteVectorRequest}[method]
    error = await refusal(getattr(served.steering, method)(kind(digest=bytes(16))))
    assert (type(error), error.field, error.reason) == (InvalidRequest, "digest", "BAD_DIGEST")


async def test_the_least_recently_used_vector_is_forgotten_under_the_limit(serve: Serve):
    served = await serve(vector_store_bytes=2 * ONE)
    await upload(served, 1)
    await upload(served, 2)
    await served.generate(steered(1))

    await upload(served, 3)

    assert await missing(served, steered(1, 2, 3)) == digests(2)


async def test_a_vector_that_a_running_request_uses_is_not_forgotten(serve: Serve):
    gate = Gate()
    served = await serve(FakeBackend(step=None), client_vector_bytes=ONE)
    await upload(served, 1)
    served.backend.step = gate
    stream = served.generation.Generate(steered(1))
    await bounded(gate.reached.wait())

    error = await refusal(upload(served, 2))
    others = served.generation.Generate(steered(2, named=False))
    is_stored = (await bounded(others.read())).started.vectors_stored
    others.cancel()
    gate.opened.set()
    responses = await bounded(_all(stream))

    assert type(error) is OverBudget
    assert (error.asked_bytes, error.allowed_bytes, error.field, error.retry_after_s) == (ONE, 0, "vector", 1.0)
    assert not is_stored
    assert responses[-1].HasField("completed")
    assert (await upload(served, 2)).created  # the request that used the other has ended
    assert await listed(served) == [*digests(2)]


async def _all(stream: Any) -> list[generation_pb2.GenerateResponse]:
    return [response async for response in stream]


async def test_a_vector_deleted_under_a_running_request_steers_it_to_its_end(serve: Serve):
    gate = Gate()
    served = await serve(FakeBackend(step=None))
    await upload(served, 1)
    served.backend.step = gate
    stream = served.generation.Generate(steered(1))
    await bounded(gate.reached.wait())
    await bounded(served.steering.DeleteVector(DeleteVectorRequest(digest=digests(1)[0])))
    gate.opened.set()

    responses = await bounded(_all(stream))

    assert responses[-2].finished.receipt.rows_steered > 0
    assert await listed(served) == []


async def test_a_vector_larger_than_the_limit_is_refused_with_the_bytes(serve: Serve):
    served = await serve(client_vector_bytes=ONE - 1)
    error = await refusal(upload(served, 1))
    assert type(error) is OverBudget
    assert (error.asked_bytes, error.allowed_bytes, error.retry_after_s) == (ONE, ONE - 1, None)


async def test_a_list_comes_in_pages_the_most_recently_used_first(serve: Serve):
    served = await serve()
    for number in range(5):
        await upload(served, number)
    await served.generate(steered(0))

    pages, token = [], ""
    while not pages or token:
        page = await bounded(served.steering.ListVectors(ListVectorsRequest(page_size=2, page_token=token)))
        pages.append([one.digest for one in page.vectors])
        token = page.next_page_token

    assert pages == [[*digests(0, 4)], [*digests(3, 2)], [*digests(1)]]


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        (ListVectorsRequest(page_size=0), "page_size", "OUT_OF_RANGE"),
        (ListVectorsRequest(page_size=1001), "page_size", "OUT_OF_RANGE"),
        (ListVectorsRequest(page_token="yes"), "page_token", "BAD_PAGE_TOKEN"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(serve: Serve, request_: ListVectorsRequest, field: str, reason: str):
    served = await serve()
    error = await refusal(served.steering.ListVectors(request_))
    assert (type(error), error.field, error.reason) == (InvalidRequest, field, reason)


async def test_a_server_that_stores_no_vectors_serves_those_in_the_request(serve: Serve):
    served = await serve(vector_store_bytes=0)
    facts = await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    assert info_pb2.FEATURE_STORED_VECTORS not in facts.features
    assert facts.limits.max_vector_bytes == 0
    error = await refusal(upload(served, 1))
    assert (type(error), error.reason) == (Unsupported, "SWITCHED_OFF")
    assert not (await served.generate(steered(1, named=False)))[0].started.vectors_stored
    assert await missing(served, steered(1)) == digests(1)


async def test_stored_bytes_and_their_limit_are_reported(serve: Serve):
    served = await serve(client_vector_bytes=ONE)
    facts = await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    assert info_pb2.FEATURE_STORED_VECTORS in facts.features
    assert facts.limits.max_vector_bytes == ONE


async def test_nothing_is_stored_before_the_width_is_known(serve: Serve):
    served = await serve(opened=False)
    assert (await refusal(upload(served, 1))).reason == "LOADING"
