"""Names that a trusted proxy gives its clients, over real connections: who is believed, and what the name may do."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2

from steer_service.core.errors import InvalidRequest, NotFound, Overloaded, PermissionDenied, Unauthenticated
from steer_service.server import request_body
from steer_service.server.callers import identity_of_peer
from steer_service.server.config import ServerConfig
from steer_service.server.trusted_proxy import (
    TrustedProxy,
    forwarded_name,
    objective_priorities,
    trusted_proxy,
)
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import info_pb2, steering_pb2
from tests.server.capture_client import Client, all_of, asking, error
from tests.server.served import Gate, Serve, Served, bounded, text_request
from tests.server.test_priority import WithPriority
from tests.server.test_tokens import entry
from tests.wire.request_messages import add, inline, steered

NOTEBOOK = "spiffe://example.org/ns/research/sa/notebook"
VECTOR = inline(bytes(range(32)), (8,))


def xfcc(name: str) -> tuple[tuple[str, str], ...]:
    return (("x-forwarded-client-cert", f'By=spiffe://example.org/edge;Hash=abc;Subject="CN=x";URI={name}'),)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f"By=spiffe://mesh/edge;Hash=a;URI={NOTEBOOK}", NOTEBOOK),
        (f"URI=spiffe://mesh/first,By=x;URI={NOTEBOOK}", NOTEBOOK),  # the last proxy is the one that is trusted
        (f'Subject="O=a,CN=b,C=\\"c;d\\"";URI={NOTEBOOK}', NOTEBOOK),
        (f"URI=https://other;URI={NOTEBOOK}", NOTEBOOK),
        (f'Hash=a;Subject="";URI={NOTEBOOK}', NOTEBOOK),  # as Istio sends it
        ("Hash=a;DNS=client.example;DNS=other.example", "client.example"),
        ('Hash=a;Subject="CN=alice";URI=;DNS=alice.example', "alice.example"),  # as Envoy sends it
        ('Hash=a;Subject="CN=alice";URI=', "alice"),
        ('Hash=a;Subject="O=lab,CN=alice"', "alice"),
        ("", ""),
    ],
)
def test_the_name_in_the_header(header: str, name: str) -> None:
    assert forwarded_name([header]) == name


@pytest.mark.parametrize(
    "header",
    [
        "Hash=a",
        "nonsense",
        "URI=",
        "URI=\x7f",
        "URI=" + "x" * 257,
        'Hash=a;Subject="O=lab"',
        'Subject="CN=one,CN=two"',
        'Subject="CN=admin\\,mallory"',  # a comma in the name
        'Subject="emailAddress=x\\,CN=admin,CN=mallory\\,x"',
        'URI=spiffe://x/admin;X=",Hash=a;Subject="CN=client"',  # a quote that would hide the proxy's own element
        'URI=a"b',
        'Subject="CN=a"b;URI=c',
        'Subject="CN=a',
        "URI=~hash",
        "=a",
        ",",
        "URI=" + "x" * 20_000,
    ],
)
def test_a_header_that_is_not_well_formed_or_names_nobody_is_refused(header: str) -> None:
    with pytest.raises(PermissionDenied, match="no name that this server can use"):
        forwarded_name([header])


def test_a_subject_with_another_name_in_it_is_the_name_that_it_is() -> None:
    assert forwarded_name(['Subject="emailAddress=x\\,CN=admin,CN=mallory"']) == "mallory"


@pytest.mark.parametrize("part", ["a", " ", '"', '\\"', "a=", ",", ";"])
def test_a_long_header_takes_no_longer_for_each_character(part: str) -> None:
    """It would stop all calls: 16,000 characters are read at most, each once."""
    with pytest.raises(PermissionDenied):
        forwarded_name([part * 8000])


def test_headers_in_pieces_are_read_as_one() -> None:
    assert forwarded_name(["URI=spiffe://one", f"URI={NOTEBOOK}"]) == NOTEBOOK
    assert forwarded_name([b"URI=spiffe://one"]) == ""


class Peer:
    """A call's context, as far as its peer goes."""

    def __init__(self, peer: str, **names: list[bytes]) -> None:
        self._peer, self._names = peer, names

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return dict(self._names)


@pytest.mark.parametrize(
    ("setting", "peer", "trusted"),
    [
        ("loopback", "ipv4:127.0.0.1:5", True),
        ("loopback", "ipv6:%5B::1%5D:5", True),
        ("loopback", "ipv6:[::ffff:127.0.0.1]:5", True),
        ("loopback", "ipv4:10.0.0.1:5", False),
        ("loopback", "unix:", False),
        ("unix", "unix:", True),
        ("unix, 10.0.0.0/24", "ipv4:10.0.0.7:5", True),
        ("10.0.0.0/24", "ipv4:10.0.1.7:5", False),
        ("fd00::/8", "ipv6:%5Bfd00::7%25eth0%5D:5", True),
        ("certificate:edge", "ipv4:10.0.0.1:5", False),
    ],
)
def test_which_peers_are_trusted(setting: str, peer: str, trusted: bool) -> None:
    proxy = trusted_proxy(setting)
    assert proxy is not None
    assert proxy.trusts(Peer(peer)) is trusted


def test_a_proxy_is_trusted_by_the_name_in_its_own_certificate() -> None:
    proxy = TrustedProxy(names=frozenset({"edge.example"}))
    assert proxy.trusts(Peer("ipv4:1.2.3.4:5", x509_subject_alternative_name=[b"a", b"edge.example"]))
    assert not proxy.trusts(Peer("ipv4:1.2.3.4:5", x509_subject_alternative_name=[b"edge.example.org"]))


@pytest.mark.parametrize("text", ["envoy", "10.0.0.1/24", "certificate:", "loopback unix", "10.0.0.0/33"])
def test_a_setting_that_names_no_peer_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="trusted_proxy: "):
        ServerConfig(trusted_proxy=text)


@pytest.mark.parametrize("text", ["chat", "chat=", "chat=high", "a=1,a=2", "a b=1"])
def test_objectives_without_a_priority_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="objectives: "):
        ServerConfig(objectives=text)
    assert objective_priorities("chat=0, batch=-10") == {"chat": 0, "batch": -10}


class Workload(Client):
    """A client behind the proxy, of this name; it claims the client id of another."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (*xfcc(self.name), ("steer-client-id", "same"))


async def test_the_name_that_a_trusted_proxy_gives_owns_what_the_call_leaves(serve: Serve) -> None:
    served = await serve(trusted_proxy="loopback")
    alice, bob = Workload(served, "spiffe://mesh/alice"), Workload(served, "spiffe://mesh/bob")
    held = await alice.held()
    assert isinstance(await error(bob.fetch(held.capture_id)), NotFound)
    assert await alice.fetch(held.capture_id)
    assert served.backend.requests[-1].client_id == "identity spiffe://mesh/alice"


async def test_a_peer_that_is_not_trusted_says_nothing(serve: Serve) -> None:
    served = await serve(trusted_proxy="10.0.0.0/8")
    alice, bob = Workload(served, "spiffe://mesh/alice"), Workload(served, "spiffe://mesh/bob")
    held = await alice.held()
    assert await bob.fetch(held.capture_id)  # they claim the same client id, and nothing else counts
    assert served.backend.requests[-1].client_id == "client same"
    assert identity_of_peer(Peer("ipv4:127.0.0.1:5")) is None  # outside of a call there are no rules


async def generate(served: Served, *metadata: tuple[str, str], **fields: Any) -> None:
    await bounded(all_of(served.generation.Generate(text_request(**fields), metadata=metadata)))


@pytest.mark.parametrize(
    ("trusted", "turn"),
    [("loopback", "fairness team-a"), ("unix", "client me")],
)
async def test_whose_turn_a_request_takes_is_what_a_trusted_proxy_says(serve: Serve, trusted: str, turn: str) -> None:
    served = await serve(trusted_proxy=trusted)
    seen: list[str] = []
    place = served.server._admission._queue.place
    served.server._admission._queue.place = lambda share, load, **more: seen.append(share) or place(share, load, **more)
    await generate(served, ("x-gateway-inference-fairness-id", "team-a"), ("steer-client-id", "me"))
    assert seen == [turn]
    assert served.backend.requests[-1].client_id == "client me"


async def test_an_objective_of_a_trusted_proxy_is_a_priority_where_the_engine_has_them(serve: Serve) -> None:
    backend = WithPriority()
    served = await serve(backend, trusted_proxy="loopback", objectives="chat=0,batch=10")
    for given in ("batch", "unknown"):
        await generate(served, ("x-gateway-inference-objective", given))
    await generate(served, ("x-gateway-inference-objective", "batch"), priority=3)
    assert [request.priority for request in backend.requests[-3:]] == [10, None, 3]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        entry("alice", "alices")
        + f'[clients."{NOTEBOOK}"]\ncertificate = true\nallow = ["capture"]\nmax_vector_bytes = 2000\n'
        + '[clients."spiffe://mesh/old"]\ncertificate = true\nexpires = 2020-01-01T00:00:00Z\n'
    )
    return path


async def test_a_name_in_the_file_needs_no_token(serve: Serve, token_file: Path) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    notebook = Workload(served, NOTEBOOK)
    held = await notebook.held()
    assert await notebook.fetch(held.capture_id)
    assert await bounded(served.info.GetModel(info_pb2.GetModelRequest(), metadata=xfcc(NOTEBOOK)))
    token = (("authorization", "Bearer alices"), *xfcc("spiffe://mesh/unknown"))
    assert await bounded(served.info.GetModel(info_pb2.GetModelRequest(), metadata=token))


async def test_a_header_that_names_nobody_is_not_allowed(serve: Serve, token_file: Path) -> None:
    for settings in ({}, {"token_file": str(token_file)}):
        served = await serve(trusted_proxy="loopback", **settings)
        metadata = (("x-forwarded-client-cert", "Hash=a"), ("steer-client-id", "alice"))
        refused = await error(all_of(served.generation.Generate(text_request(), metadata=metadata)))
        assert isinstance(refused, PermissionDenied)


async def test_who_needs_no_token_is_known_before_the_message_is_read(
    serve: Serve, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    read: list[bytes] = []
    monkeypatch.setattr(request_body.RequestBody, "__init__", lambda _, data: read.append(data))
    for metadata in ((), xfcc("spiffe://mesh/unknown")):
        for call in (
            served.info.GetModel(info_pb2.GetModelRequest(), metadata=metadata),
            all_of(served.generation.Generate(text_request(), metadata=metadata)),
        ):
            assert isinstance(await error(call), Unauthenticated | PermissionDenied)
    assert read == []


async def test_reflection_is_for_those_who_are_known(serve: Serve, token_file: Path) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    reflection = served.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    listing = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
    assert isinstance(await error(all_of(reflection(iter([listing])))), Unauthenticated)
    assert await bounded(all_of(reflection(iter([listing]), metadata=xfcc(NOTEBOOK))))


@pytest.mark.parametrize("name", ["spiffe://mesh/unknown", "spiffe://mesh/old", "alice"])
async def test_a_name_that_the_file_does_not_have_is_not_allowed(serve: Serve, token_file: Path, name: str) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    for call in (
        served.info.GetModel(info_pb2.GetModelRequest(), metadata=xfcc(name)),
        all_of(served.generation.Generate(text_request(), metadata=xfcc(name))),
    ):
        refused = await error(call)
        assert (type(refused), refused.reason) == (PermissionDenied, "PERMISSION_DENIED")
        assert refused.message == "this client may not use this server"


@pytest.mark.parametrize(
    "metadata",
    [(), (("x-forwarded-client-cert", ""),), (("authorization", "Bearer wrong"), *xfcc(NOTEBOOK))],
    ids=["nothing", "an empty header", "a wrong token beside a name"],
)
async def test_without_a_name_or_with_a_wrong_token_a_call_is_refused(
    serve: Serve, token_file: Path, metadata: Any
) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    refused = await error(served.info.GetModel(info_pb2.GetModelRequest(), metadata=metadata))
    assert (type(refused), refused.message) == (Unauthenticated, "the call needs a valid bearer token")
    unknown = served.channel.unary_unary("/steer.v1.InfoService/NoSuchMethod")
    assert isinstance(await error(unknown(b"", metadata=metadata)), Unauthenticated)


async def test_what_the_file_does_not_allow_is_refused_with_its_field(serve: Serve, token_file: Path) -> None:
    served = await serve(trusted_proxy="loopback", token_file=str(token_file))
    notebook = xfcc(NOTEBOOK)
    refused = await error(all_of(served.generation.Generate(steered(add(VECTOR), layer=1), metadata=notebook)))
    assert (type(refused), refused.field) == (PermissionDenied, "steering")
    upload = steering_pb2.UploadVectorRequest(vector=VECTOR.inline)
    assert isinstance(await error(served.steering.UploadVector(upload, metadata=notebook)), PermissionDenied)
    assert served.backend.requests[1:] == []  # but the warm-up, nothing reached the model
    assert await bounded(all_of(served.generation.Generate(asking(), metadata=notebook)))


async def test_bytes_of_vectors_are_limited_for_one_client(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "alices", max_vector_bytes=600) + entry("bob", "bobs"))
    served = await serve(token_file=str(path))
    alice, bob = ((("authorization", f"Bearer {name}"),) for name in ("alices", "bobs"))
    for seed in range(3):
        vector = inline(bytes([seed + 1] * 32), (8,)).inline
        for name in (alice, bob):
            await bounded(served.steering.UploadVector(steering_pb2.UploadVectorRequest(vector=vector), metadata=name))
    listed = [
        len((await bounded(served.steering.ListVectors(steering_pb2.ListVectorsRequest(), metadata=name))).vectors)
        for name in (alice, bob)
    ]
    assert listed == [1, 3]


async def test_turns_that_a_proxy_names_are_no_quotas_of_their_own(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "alices", max_requests=1))
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), token_file=str(path), trusted_proxy="loopback")
    alice = ("authorization", "Bearer alices")
    running = asyncio.ensure_future(generate(served, alice, ("x-gateway-inference-fairness-id", "a")))
    await bounded(gate.reached.wait())
    refused = await error(generate(served, alice, ("x-gateway-inference-fairness-id", "b")))
    assert (type(refused), refused.reason) == (Overloaded, "CLIENT_QUOTA")
    gate.opened.set()
    await running
    await generate(served, alice, ("x-gateway-inference-fairness-id", "b"))
