"""Two servers behind one balancer: which of them has what, and what the other one says."""

import base64
from pathlib import Path

import pytest

from steer_service.core.errors import InvalidRequest, OtherInstance, SteerError
from steer_service.server.config import ServerConfig
from steer_service.server.instance import Instance
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import capture_pb2, info_pb2, steering_pb2
from steer_service.wire.capture_pb2 import ReleaseCaptureRequest
from steer_service.wire.generation_pb2 import CancelRequest
from steer_service.wire.status_codes import error_from_rpc
from tests.arena import Arena
from tests.server.capture_client import (
    Client,
    all_of,
    asking,
    error,
    failure,
    preferred,
    regions,
    required,
)
from tests.server.served import Gate, Serve, Served, bounded, text_request

HERE, THERE = "10.0.0.3:50051", "10.0.0.4:50051"


def header_of(name: str) -> tuple[str, str]:
    return "steer-instance", base64.b64encode(name.encode()).decode()


@pytest.fixture
async def pair(serve: Serve, arena: Arena, tmp_path: Path) -> list[Client]:
    """One client of two servers that share the memory of this host."""
    return [
        Client(await serve(FakeBackend(place=arena), shm_dir=str(arena.folder), instance=name), "alice")
        for name in (HERE, THERE)
    ]


def assert_elsewhere(raised: SteerError, field: str) -> None:
    assert isinstance(raised, OtherInstance)
    assert (raised.instance, raised.reason, raised.field) == (HERE, "OTHER_INSTANCE", field)


async def test_a_held_capture_of_another_server_is_refused_with_its_name(pair: list[Client]) -> None:
    here, there = pair
    held = await here.held()
    assert held.instance == HERE
    assert_elsewhere(await error(there.fetch(held.capture_id)), "capture_id")
    assert_elsewhere(await error(there.release(capture_id=held.capture_id)), "capture_id")
    assert await here.fetch(held.capture_id)


async def test_a_lease_of_another_server_is_refused_with_its_name(pair: list[Client], arena: Arena) -> None:
    here, there = pair
    session, stream = await here.session(arena.folder)
    [region, *_] = regions(await here.generate(required(session)))
    assert_elsewhere(await error(there.release(lease_token=region.lease_token)), "lease_token")
    stream.cancel()


async def test_a_session_of_another_server_is_refused_where_shared_memory_is_required(
    pair: list[Client], arena: Arena
) -> None:
    here, there = pair
    challenge = await here.challenge()
    assert challenge.instance == HERE
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    wrong = there.confirming(challenge.challenge_token, nonce)
    assert_elsewhere(await error(all_of(wrong)), "challenge_token")
    stream = here.confirming(challenge.challenge_token, nonce)
    session = (await bounded(stream.read())).session_token

    assert_elsewhere(await error(there.generate(required(session))), "capture.shared_memory_session")
    [started, *_] = await there.generate(preferred(session))
    assert started.started.shared_memory_fallback == capture_pb2.SHARED_MEMORY_FALLBACK_OTHER_INSTANCE
    assert started.started.instance == THERE
    stream.cancel()


async def test_a_running_request_of_another_server_is_not_cancelled_but_named(pair: list[Client]) -> None:
    here, there = pair
    gate = here.served.backend.step = Gate(1)
    call = here.served.generation.Generate(text_request())
    started = (await bounded(call.read())).started
    assert started.instance == HERE
    cancel = CancelRequest(cancel_token=started.cancel_token)
    assert_elsewhere(await error(there.served.generation.Cancel(cancel)), "cancel_token")
    assert (await bounded(here.served.generation.Cancel(cancel))).cancelled
    gate.opened.set()


async def test_a_release_by_the_clients_own_token_goes_to_the_server_that_the_call_names(pair: list[Client]) -> None:
    here, there = pair
    token = b"t" * 16
    await here.generate(asking(release_token=token))
    request = ReleaseCaptureRequest(release_token=token)
    about = (*here.metadata, header_of(HERE))
    assert_elsewhere(await error(there.served.capture.ReleaseCapture(request, metadata=about)), "steer-instance")
    answers = [await bounded(here.served.capture.ReleaseCapture(request, metadata=about)) for _ in range(2)]
    assert [answer.released for answer in answers] == [True, False]


async def test_a_release_says_whether_it_released(pair: list[Client]) -> None:
    here, _ = pair
    held = await here.held()
    bob = Client(here.served, "bob")
    request = ReleaseCaptureRequest(capture_id=held.capture_id)
    said = [
        (await bounded(who.served.capture.ReleaseCapture(request, metadata=who.metadata))).released
        for who in (bob, here, here)
    ]
    assert said == [False, True, False]


async def test_every_response_names_the_server_in_its_headers(pair: list[Client], arena: Arena) -> None:
    served = pair[0].served
    held = await pair[0].held()
    challenge = await pair[0].challenge()
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    calls = [
        served.generation.Generate(text_request()),
        served.capture.FetchCapture(
            capture_pb2.FetchCaptureRequest(capture_id=held.capture_id), metadata=pair[0].metadata
        ),
        served.info.GetServerInfo(info_pb2.GetServerInfoRequest()),
        pair[0].confirming(challenge.challenge_token, nonce),
    ]
    for call in calls:
        assert header_of(HERE) in tuple(await bounded(call.initial_metadata()))
        call.cancel()


async def test_a_refusal_has_no_headers_and_names_the_server_beside_its_status(pair: list[Client]) -> None:
    call = pair[0].served.steering.GetVector(
        steering_pb2.GetVectorRequest(digest=b"d" * 32), metadata=(("steer-client-id", "a"),)
    )
    refused = await failure(call)
    assert header_of(HERE) in tuple(refused.trailing_metadata())
    assert header_of(HERE) not in tuple(refused.initial_metadata())
    assert error_from_rpc(refused).instance == HERE  # a vector that is missing says where


@pytest.mark.parametrize("value", ["", "not base64!", "AAAA", base64.b64encode(b"a/b").decode()])
async def test_a_name_that_is_none_changes_nothing(serve: Serve, value: str) -> None:
    served: Served = await serve()
    request = ReleaseCaptureRequest(release_token=b"t" * 16)
    answer = await bounded(served.capture.ReleaseCapture(request, metadata=(("steer-instance", value),)))
    assert not answer.released


def test_a_server_without_a_name_has_a_random_one() -> None:
    names = {Instance().name for _ in range(10)}
    assert len(names) == 10


@pytest.mark.parametrize("name", ["a/b", "a b", "é", "x" * 129, "a\n"])
def test_a_name_that_no_header_and_no_id_can_have_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"instance: .* is not 1\.\.128 characters"):
        ServerConfig(instance=name)


async def test_the_server_says_its_name(serve: Serve) -> None:
    served = await serve(instance="[fd00::3]:50051")
    info = await bounded(served.info.GetServerInfo(info_pb2.GetServerInfoRequest()))
    assert (info.instance, info.api_revision) == ("[fd00::3]:50051", 6)
