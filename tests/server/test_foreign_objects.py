"""What one client can do to the objects of another, by every RPC of the contract: nothing, and it cannot tell."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from steer_service.core.specs import SteeringSpec
from steer_service.server.services import _DESCRIPTORS
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import capture_pb2, generation_pb2, steering_pb2
from steer_service.wire.steering import steering_to_proto
from tests.arena import Arena
from tests.server.capture_client import Client, all_of, asking, regions, required, rest_of
from tests.server.served import Gate, Serve, bounded, text_request
from tests.server.test_tokens import entry
from tests.wire.request_messages import add, inline, steered

VECTOR = inline(bytes(range(32)), (8,))
RELEASE_TOKEN = b"r" * 16
REQUEST_ID = "alices-request"

WITHOUT_IDS = {
    "steer.v1.CaptureService.OpenSharedMemory",
    "steer.v1.VectorService.UploadVector",
    "steer.v1.TokenizerService.Tokenize",
    "steer.v1.TokenizerService.Detokenize",
    "steer.v1.TokenizerService.Render",
    "steer.v1.InfoService.GetServerInfo",
    "steer.v1.InfoService.GetModel",
}
"""Methods whose requests name nothing that belongs to a client."""


class Named(Client):
    """A client with a bearer token; it claims the other's client id besides."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.name}"), ("steer-client-id", "alice"))


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What belongs to alice, or to nobody."""

    capture_id: str
    lease_token: bytes
    session: bytes
    challenge: bytes
    nonce: bytes
    cancel_token: bytes
    digest: bytes
    page_token: str


NOBODYS = Objects(
    capture_id="nothing",
    lease_token=b"nothing",
    session=b"s" * 32,
    challenge=b"c" * 32,
    nonce=b"n" * 32,
    cancel_token=b"nothing",
    digest=b"d" * 32,
    page_token="0" * 48,
)


def with_digest(digest: bytes) -> generation_pb2.GenerateRequest:
    request = steered(add(VECTOR), layer=1)
    request.steering.layers[0].operations[0].add.vector.digest = digest
    return request


Call = Callable[[Client, Objects], Any]

CALLS: dict[str, tuple[str, Call]] = {
    "cancels by the token": (
        "steer.v1.GenerationService.Cancel",
        lambda bob, of: bob.served.generation.Cancel(
            generation_pb2.CancelRequest(cancel_token=of.cancel_token), metadata=bob.metadata
        ),
    ),
    "generates with the vector": (
        "steer.v1.GenerationService.Generate",
        lambda bob, of: all_of(bob.served.generation.Generate(with_digest(of.digest), metadata=bob.metadata)),
    ),
    "captures into the session": (
        "steer.v1.GenerationService.Generate",
        lambda bob, of: all_of(bob.served.generation.Generate(required(of.session), metadata=bob.metadata)),
    ),
    "fetches": (
        "steer.v1.CaptureService.FetchCapture",
        lambda bob, of: all_of(bob.fetching(of.capture_id)),
    ),
    "fetches the lease": (
        "steer.v1.CaptureService.FetchCapture",
        lambda bob, of: all_of(bob.fetching(of.lease_token.decode())),
    ),
    "releases the capture": (
        "steer.v1.CaptureService.ReleaseCapture",
        lambda bob, of: releasing(bob, capture_id=of.capture_id),
    ),
    "releases the lease": (
        "steer.v1.CaptureService.ReleaseCapture",
        lambda bob, of: releasing(bob, lease_token=of.lease_token),
    ),
    "releases by the release token": (
        "steer.v1.CaptureService.ReleaseCapture",
        lambda bob, of: releasing(bob, release_token=RELEASE_TOKEN if of is not NOBODYS else b"x" * 16),
    ),
    "confirms the challenge": (
        "steer.v1.CaptureService.ConfirmSharedMemory",
        lambda bob, of: all_of(bob.confirming(of.challenge, of.nonce)),
    ),
    "reads the vector": (
        "steer.v1.VectorService.GetVector",
        lambda bob, of: bob.served.steering.GetVector(
            steering_pb2.GetVectorRequest(digest=of.digest), metadata=bob.metadata
        ),
    ),
    "deletes the vector": (
        "steer.v1.VectorService.DeleteVector",
        lambda bob, of: bob.served.steering.DeleteVector(
            steering_pb2.DeleteVectorRequest(digest=of.digest), metadata=bob.metadata
        ),
    ),
    "lists a page": (
        "steer.v1.VectorService.ListVectors",
        lambda bob, of: bob.served.steering.ListVectors(
            steering_pb2.ListVectorsRequest(page_token=of.page_token), metadata=bob.metadata
        ),
    ),
    "lists": (
        "steer.v1.VectorService.ListVectors",
        lambda bob, of: bob.served.steering.ListVectors(steering_pb2.ListVectorsRequest(), metadata=bob.metadata),
    ),
    "generates under the same id": (
        "steer.v1.GenerationService.Generate",
        lambda bob, of: first_of(bob, REQUEST_ID if of is not NOBODYS else "another"),
    ),
}


def releasing(client: Client, **target: Any) -> Awaitable[Any]:
    request = capture_pb2.ReleaseCaptureRequest(**target)
    return client.served.capture.ReleaseCapture(request, metadata=client.metadata)


async def first_of(client: Client, request_id: str) -> str:
    """Which event comes first; the request itself is held by the gate."""
    call = client.served.generation.Generate(text_request(request_id=request_id), metadata=client.metadata)
    kind = (await call.read()).WhichOneof("event")
    call.cancel()
    return str(kind)


async def outcome(call: Any) -> tuple[Any, ...]:
    """All that a client sees of a call: its status, text and details, or its response."""
    try:
        return ("OK", str(await bounded(call)))
    except grpc.aio.AioRpcError as error:
        details = {key: value for key, value in error.trailing_metadata() if key != "steer-instance"}
        return (error.code().name, error.details(), str(sorted(details)))


def test_every_method_is_in_this_matrix() -> None:
    methods = {method.full_name for service in _DESCRIPTORS for method in service.methods}
    assert {method for method, _ in CALLS.values()} | WITHOUT_IDS == methods


@pytest.fixture
async def clients(serve: Serve, arena: Arena, tmp_path: Path) -> tuple[Client, Client]:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry("alice", "alices") + entry("bob", "bobs"))
    backend = FakeBackend(place=arena)
    served = await serve(backend, shm_dir=str(arena.folder), token_file=str(tokens))
    return Named(served, "alices"), Named(served, "bobs")


async def test_no_rpc_reads_cancels_or_infers_what_belongs_to_another_client(
    clients: tuple[Client, Client], arena: Arena
) -> None:
    alice, bob = clients
    served = alice.served
    session, session_stream = await alice.session(arena.folder)
    [region, *_] = regions(await alice.generate(required(session)))
    held = await alice.held(asking(release_token=RELEASE_TOKEN))
    challenge = await alice.challenge()
    await alice.generate(steered(add(VECTOR), layer=1))
    spec: SteeringSpec = served.backend.requests[-1].steering
    [digest] = spec.vector_digests()
    for seed in range(2):  # so that there is a second page
        request = steering_pb2.UploadVectorRequest(vector=inline(bytes([seed + 1] * 32), (8,)).inline)
        await bounded(served.steering.UploadVector(request, metadata=alice.metadata))
    page = await bounded(
        served.steering.ListVectors(steering_pb2.ListVectorsRequest(page_size=1), metadata=alice.metadata)
    )
    gate = served.backend.step = Gate(2)
    running = served.generation.Generate(
        text_request(request_id=REQUEST_ID, capture=asking(release_token=RELEASE_TOKEN).capture),
        metadata=alice.metadata,
    )
    started = (await bounded(running.read())).started
    await bounded(gate.reached.wait())
    served.backend.step = lambda number: asyncio.sleep(0)
    alices = Objects(
        capture_id=held.capture_id,
        lease_token=region.lease_token,
        session=session,
        challenge=challenge.challenge_token,
        nonce=(arena.folder / challenge.segment_name).read_bytes(),
        cancel_token=started.cancel_token,
        digest=digest,
        page_token=page.next_page_token,
    )

    told_apart = {}
    for what, (_, call) in CALLS.items():
        seen = [await outcome(call(bob, of)) for of in (alices, NOBODYS)]
        if seen[0] != seen[1]:
            told_apart[what] = seen
    assert told_apart == {}

    # Everything of alice's is as it was: her own calls find it.
    assert await alice.fetch(held.capture_id)
    assert (await releasing(alice, lease_token=region.lease_token)).released
    vector = served.steering.GetVector(steering_pb2.GetVectorRequest(digest=digest), metadata=alice.metadata)
    assert (await bounded(vector)).vector.shape == [8]
    assert len(await alice.generate(text_request(steering=steering_to_proto(spec, [digest])))) > 1
    confirmed = alice.confirming(alices.challenge, alices.nonce)
    assert (await bounded(confirmed.read())).session_token
    gate.opened.set()
    rest = await bounded(rest_of(running))
    assert rest[-1].HasField("completed")
    for stream in (session_stream, confirmed):
        stream.cancel()
