"""VectorService: stores, lists and deletes the steering vectors of each client."""

import itertools

import grpc

from steer_service.core.arrays import Float32Array, vector_digest
from steer_service.core.backend import ModelInfo
from steer_service.core.checks import wrong_width
from steer_service.core.errors import InvalidRequest, MissingVectors, Unsupported, within
from steer_service.core.specs import checked_vector
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import Admission
from steer_service.server.client_id import client_id_of
from steer_service.server.vector_store import StoredVector, VectorStore
from steer_service.wire import steering_pb2
from steer_service.wire.fields import missing
from steer_service.wire.message_scan import read_request
from steer_service.wire.steering import check_digest
from steer_service.wire.steering_pb2_grpc import VectorServiceServicer
from steer_service.wire.tensors import tensor_from_proto, tensor_to_proto

MAX_PAGE = 1000
"""Vectors of one page of ListVectors at most, about 60 KB."""


class VectorServicer(VectorServiceServicer):
    """Serves the vectors of `store` to the clients that own them."""

    def __init__(self, admission: Admission, store: VectorStore) -> None:
        self._admission = admission
        self._store = store

    async def UploadVector(self, data: bytes, context: grpc.aio.ServicerContext) -> steering_pb2.UploadVectorResponse:
        """Stores a vector of the model's hidden size under its own digest."""
        async with errors_as_status(context):
            request = read_request(steering_pb2.UploadVectorRequest, data)
            if not self._store.client_limit_bytes:
                raise Unsupported("this server stores no vectors", reason="SWITCHED_OFF")
            vector = _vector_from(request, self._admission.backend.info)
            digest, client_id = vector_digest(vector), client_id_of(context)
            if request.digest and request.digest != digest:
                raise InvalidRequest("the vector has another digest", reason="DIGEST_MISMATCH", field="digest")
            created = not self._store.holds(client_id, digest)
            self._store.put(client_id, digest, vector)
            return steering_pb2.UploadVectorResponse(digest=digest, created=created)

    async def GetVector(self, data: bytes, context: grpc.aio.ServicerContext) -> steering_pb2.GetVectorResponse:
        """Returns a vector of the calling client."""
        async with errors_as_status(context):
            request = read_request(steering_pb2.GetVectorRequest, data)
            check_digest(request.digest, "digest")
            stored = self._store.find(client_id_of(context), request.digest)
            if stored is None:
                raise MissingVectors(
                    "no vector with this digest is stored on this server", digests=(request.digest,), field="digest"
                )
            return steering_pb2.GetVectorResponse(vector=tensor_to_proto(stored.vector))

    async def ListVectors(self, data: bytes, context: grpc.aio.ServicerContext) -> steering_pb2.ListVectorsResponse:
        """Returns a page of the client's vectors; one that is used between two pages may be on neither."""
        async with errors_as_status(context):
            request = read_request(steering_pb2.ListVectorsRequest, data)
            size, before = _page_size(request), _page_start(request.page_token)
            found = list(itertools.islice(self._store.listed(client_id_of(context), before), size + 1))
            page = found[:size]
            return steering_pb2.ListVectorsResponse(
                vectors=map(_stored_to_proto, page),
                next_page_token=str(page[-1].last_use) if len(found) > size else "",
            )

    async def DeleteVector(self, data: bytes, context: grpc.aio.ServicerContext) -> steering_pb2.DeleteVectorResponse:
        """Deletes a vector of the calling client."""
        async with errors_as_status(context):
            request = read_request(steering_pb2.DeleteVectorRequest, data)
            check_digest(request.digest, "digest")
            return steering_pb2.DeleteVectorResponse(deleted=self._store.forget(client_id_of(context), request.digest))


def _vector_from(request: steering_pb2.UploadVectorRequest, info: ModelInfo) -> Float32Array:
    if not request.HasField("vector"):
        raise missing("the vector", "vector")
    with within("vector"):
        array = tensor_from_proto(request.vector)
    vector = checked_vector(array, "Vector")
    if vector.size != info.hidden_size:
        raise wrong_width(vector, info, "Vector dimension mismatch")
    return vector


def _stored_to_proto(stored: StoredVector) -> steering_pb2.StoredVector:
    return steering_pb2.StoredVector(digest=stored.digest, size=stored.vector.size, stored_bytes=stored.stored_bytes)


def _page_size(request: steering_pb2.ListVectorsRequest) -> int:
    if not request.HasField("page_size"):
        return MAX_PAGE
    if not 1 <= request.page_size <= MAX_PAGE:
        raise InvalidRequest(f"{request.page_size} is outside 1..{MAX_PAGE}", reason="OUT_OF_RANGE", field="page_size")
    return int(request.page_size)


def _page_start(token: str) -> int | None:
    if not token:
        return None
    if not (token.isascii() and token.isdecimal() and len(token) < 20):
        raise InvalidRequest(
            "it is not the next_page_token of an earlier response", reason="BAD_PAGE_TOKEN", field="page_token"
        )
    return int(token)
