"""VectorService: stores, lists and deletes the steering vectors of each client."""

import hmac
import itertools
import re
import secrets

import grpc

from steer_service.core.arrays import Float32Array, vector_digest
from steer_service.core.backend import ModelInfo
from steer_service.core.checks import wrong_width
from steer_service.core.errors import InvalidRequest, MissingVectors, Unsupported, within
from steer_service.core.vectors import checked_vector
from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.admission import Admission
from steer_service.server.callers import caller_of
from steer_service.server.client_limits import ClientLimits
from steer_service.server.instance import Instance
from steer_service.server.request_body import RequestBody
from steer_service.server.vector_store import StoredVector, VectorStore
from steer_service.wire import steering_pb2
from steer_service.wire.fields import missing
from steer_service.wire.steering import check_digest
from steer_service.wire.steering_pb2_grpc import VectorServiceServicer
from steer_service.wire.tensors import tensor_from_proto, tensor_to_proto

MAX_PAGE = 1000
"""Vectors of one page of ListVectors at most, about 60 KB."""


class VectorServicer(VectorServiceServicer):
    """Serves the vectors of `store` to the clients that own them."""

    def __init__(self, admission: Admission, store: VectorStore, instance: Instance, limits: ClientLimits) -> None:
        self._admission = admission
        self._instance = instance
        self._limits = limits
        self._store = store
        self._key = secrets.token_bytes(32)
        self._mask = secrets.randbits(64)

    async def UploadVector(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> steering_pb2.UploadVectorResponse:
        """Stores a vector of the model's hidden size under its own digest."""
        async with errors_as_status(context):
            request = body.read(steering_pb2.UploadVectorRequest)
            if not self._store.client_limit_bytes:
                raise Unsupported("this server stores no vectors", reason="SWITCHED_OFF")
            owner = caller_of(context).owner_of_vectors()
            self._limits.check_allowed(owner, "steering")
            vector = _vector_from(request, self._admission.backend.info)
            digest = vector_digest(vector)
            if request.digest and request.digest != digest:
                raise InvalidRequest("the vector has another digest", reason="DIGEST_MISMATCH", field="digest")
            created = not self._store.holds(owner, digest)
            self._store.put(owner, digest, vector)
            return steering_pb2.UploadVectorResponse(digest=digest, created=created)

    async def GetVector(self, body: RequestBody, context: grpc.aio.ServicerContext) -> steering_pb2.GetVectorResponse:
        """Returns a vector of the calling client."""
        async with errors_as_status(context):
            request = body.read(steering_pb2.GetVectorRequest)
            check_digest(request.digest, "digest")
            stored = self._store.find(caller_of(context).owner_of_vectors(), request.digest)
            if stored is None:
                raise MissingVectors(
                    "no vector with this digest is stored on this server",
                    digests=(request.digest,),
                    instance=self._instance.name,
                    field="digest",
                )
            return steering_pb2.GetVectorResponse(vector=tensor_to_proto(stored.vector))

    async def ListVectors(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> steering_pb2.ListVectorsResponse:
        """Returns a page of the client's vectors; one that is used between two pages may be on neither."""
        async with errors_as_status(context):
            request = body.read(steering_pb2.ListVectorsRequest)
            owner = caller_of(context).owner_of_vectors()
            size, before = _page_size(request), self._page_start(request.page_token, owner)
            found = list(itertools.islice(self._store.listed(owner, before), size + 1))
            page = found[:size]
            return steering_pb2.ListVectorsResponse(
                vectors=map(_stored_to_proto, page),
                next_page_token=self._page_token(page[-1].last_use, owner) if len(found) > size else "",
            )

    async def DeleteVector(
        self, body: RequestBody, context: grpc.aio.ServicerContext
    ) -> steering_pb2.DeleteVectorResponse:
        """Deletes a vector of the calling client."""
        async with errors_as_status(context):
            request = body.read(steering_pb2.DeleteVectorRequest)
            check_digest(request.digest, "digest")
            owner = caller_of(context).owner_of_vectors()
            return steering_pb2.DeleteVectorResponse(deleted=self._store.forget(owner, request.digest))

    def _page_token(self, last_use: int, owner: str) -> str:
        """A token for the vectors before `last_use`, which its client can neither read nor make."""
        return f"{last_use ^ self._mask:016x}{self._signature(last_use, owner)}"

    def _page_start(self, token: str, owner: str) -> int | None:
        """What a token of this client stands for; raises InvalidRequest (BAD_PAGE_TOKEN) for any other text."""
        if not token:
            return None
        if re.fullmatch("[0-9a-f]{48}", token):
            last_use = int(token[:16], 16) ^ self._mask
            if hmac.compare_digest(token[16:], self._signature(last_use, owner)):
                return last_use
        raise InvalidRequest(
            "it is not the next_page_token of an earlier response", reason="BAD_PAGE_TOKEN", field="page_token"
        )

    def _signature(self, last_use: int, owner: str) -> str:
        return hmac.digest(self._key, f"{last_use} {owner}".encode(), "sha256").hex()[:32]


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
