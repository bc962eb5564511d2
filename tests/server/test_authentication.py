"""Bearer tokens over real connections: who is refused, before what, and what belongs to whom."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from steer_service.core.errors import NotFound, Overloaded, Unauthenticated
from steer_service.server import request_body
from steer_service.server.services import SERVICES
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.status_codes import error_from_rpc
from tests.server.capture_client import Begin, Client, all_of, error
from tests.server.served import Gate, Serve, bounded, text_request
from tests.server.test_tokens import entry

ALICE, BOB = (("authorization", "Bearer alices"),), (("authorization", "Bearer bobs"),)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("alice", "alices") + entry("bob", "bobs", max_requests=1))
    return path


CREDENTIALS = {
    "none": (),
    "an empty one": (("authorization", ""),),
    "a wrong one": (("authorization", "Bearer wrong"),),
    "a prefix": (("authorization", "Bearer alice"),),
    "a longer one": (("authorization", "Bearer alicess"),),
    "two spaces": (("authorization", "Bearer  alices"),),
    "no scheme": (("authorization", "alices"),),
    "another scheme": (("authorization", "Basic alices"),),
    "no token": (("authorization", "Bearer "),),
    "two of them": (*ALICE, *BOB),
    "the same twice": (*ALICE, *ALICE),
    "another key": (("x-authorization", "Bearer alices"),),
    "bytes": (("authorization-bin", b"Bearer alices"),),
    "a long one": (("authorization", "Bearer " + "a" * 6000),),
    "the client id alone": (("steer-client-id", "alice"),),
}


@pytest.mark.parametrize("credentials", CREDENTIALS.values(), ids=CREDENTIALS)
async def test_a_call_without_a_valid_token_is_refused_before_its_message_is_read(
    serve: Serve, token_file: Path, credentials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(token_file=str(token_file))
    read: list[bytes] = []
    monkeypatch.setattr(request_body.RequestBody, "__init__", lambda _, data: read.append(data))

    for call in (
        served.generation.Generate(text_request(), metadata=credentials),
        served.capture.FetchCapture(capture_pb2.FetchCaptureRequest(capture_id="x"), metadata=credentials),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bounded(all_of(call))
        refused = error_from_rpc(caught.value)
        assert (type(refused), refused.reason) == (Unauthenticated, "UNAUTHENTICATED")
        assert refused.message == "the call needs a valid bearer token"
    for unary, request in (
        (served.info.GetModel, info_pb2.GetModelRequest()),
        (served.generation.Cancel, generation_pb2.CancelRequest(cancel_token=b"0" * 16)),
        (served.steering.ListVectors, steering_pb2.ListVectorsRequest()),
        (served.tokenizer.Tokenize, tokenizer_pb2.TokenizeRequest(text="a")),
        (served.capture.ReleaseCapture, capture_pb2.ReleaseCaptureRequest(capture_id="x")),
    ):
        refused = await error(unary(request, metadata=credentials))
        assert (type(refused), refused.message) == (Unauthenticated, "the call needs a valid bearer token")
    assert read == []


async def test_every_method_but_health_needs_a_token(serve: Serve, token_file: Path) -> None:
    served = await serve(token_file=str(token_file))
    assert set((await served.statuses()).values()) == {"SERVING"}
    for service in SERVICES:
        call = served.channel.unary_unary(f"/{service}/NoSuchMethod")
        assert isinstance(await error(call(b"")), Unauthenticated)
    reflection = served.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(all_of(reflection(iter([b""]))))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_many_bad_tokens_harm_nobody(serve: Serve, token_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = await serve(token_file=str(token_file))
    check = served.channel.unary_unary("/steer.v1.InfoService/GetModel")

    async def refused(number: int) -> bool:
        try:
            await check(b"", metadata=(("authorization", f"Bearer {number}"),))
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
        return False

    assert all(await asyncio.gather(*map(refused, range(500))))
    assert await served.info.GetModel(info_pb2.GetModelRequest(), metadata=ALICE)
    lines = [record.getMessage() for record in caplog.records if "no valid token" in record.getMessage()]
    assert len(lines) == 1  # others within the minute are counted in the next
    assert "Bearer" not in lines[0]


class Named(Client):
    """A client with a token; its client id is another's."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.name}"), ("steer-client-id", "alice"))


async def test_the_name_behind_the_token_owns_what_the_call_leaves(begin: Begin, token_file: Path) -> None:
    served = (await begin(token_file=str(token_file))).served
    alice, bob = Named(served, "alices"), Named(served, "bobs")
    held = await alice.held()

    assert isinstance(await error(bob.fetch(held.capture_id)), NotFound)
    await bob.release(capture_id=held.capture_id)
    assert await alice.fetch(held.capture_id)
    await alice.release(capture_id=held.capture_id)
    assert isinstance(await error(alice.fetch(held.capture_id)), NotFound)


async def test_two_clients_may_use_one_request_id_and_share_no_prefix(serve: Serve, token_file: Path) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), token_file=str(token_file))
    running = [
        asyncio.ensure_future(all_of(served.generation.Generate(text_request(request_id="same"), metadata=name)))
        for name in (ALICE, BOB)
    ]
    await bounded(gate.reached.wait())
    while served.server.running < 2:
        await asyncio.sleep(0.01)
    salts = {request.cache_salt for request in served.server._admission.in_engine()}
    assert len(salts) == 2
    assert "" not in salts
    gate.opened.set()
    assert all(await bounded(asyncio.gather(*running)))


async def test_a_quota_of_the_file_is_that_of_one_client(serve: Serve, token_file: Path) -> None:
    gate = Gate(at=2)
    served = await serve(FakeBackend(step=gate), token_file=str(token_file))
    running = [asyncio.ensure_future(all_of(served.generation.Generate(text_request(), metadata=BOB)))]
    await bounded(gate.reached.wait())

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bounded(all_of(served.generation.Generate(text_request(), metadata=BOB)))
    refused = error_from_rpc(caught.value)
    assert (type(refused), refused.reason) == (Overloaded, "CLIENT_QUOTA")
    running += [
        asyncio.ensure_future(all_of(served.generation.Generate(text_request(), metadata=ALICE))) for _ in range(3)
    ]
    while served.server.running < 4:
        await asyncio.sleep(0.01)
    gate.opened.set()
    await bounded(asyncio.gather(*running))


async def test_tokens_change_without_a_restart(serve: Serve, token_file: Path) -> None:
    served = await serve(token_file=str(token_file))
    await asyncio.to_thread(token_file.write_text, entry("alice", "new"))
    new = (("authorization", "bearer new"),)

    async def until_known() -> None:
        while True:
            try:
                await served.info.GetModel(info_pb2.GetModelRequest(), metadata=new)
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)

    await bounded(until_known())
    assert isinstance(await error(served.info.GetModel(info_pb2.GetModelRequest(), metadata=ALICE)), Unauthenticated)
