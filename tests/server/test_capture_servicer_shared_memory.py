"""Captures in shared memory: sessions, leases, refusals and what is freed."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from steer_service.core.errors import EngineFailed, InvalidRequest, NotFound, Unsupported
from steer_service.server.shared_memory_sessions import CHALLENGE_S
from steer_service.testing.fake_backend import encode_row
from steer_service.wire import capture_pb2
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_INLINE,
    CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
    CAPTURE_SITE_BOTH,
)
from steer_service.wire.position_pb2 import PositionScope
from steer_service.wire.status_codes import error_from_rpc
from tests.arena import Arena
from tests.server.capture_client import (
    LAYERS,
    ROW_BYTES,
    ROWS,
    Begin,
    Client,
    Interrupted,
    error,
    failure,
    headers,
    payload,
    places,
    preferred,
    regions,
    required,
    until,
)
from tests.server.served import Gate, bounded, text_request


async def test_the_nonce_is_read_by_this_user_alone_and_only_once(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    segment = arena.folder / challenge.segment_name
    assert segment.stat().st_mode & 0o777 == 0o600
    assert segment.stat().st_size == 32
    assert 0 < challenge.expires_in.ToMilliseconds() <= CHALLENGE_S * 1000
    nonce = segment.read_bytes()
    stream = alice.confirming(challenge.challenge_token, nonce)
    assert len((await bounded(stream.read())).session_token) >= 32
    assert not segment.exists()
    told = await error(alice.confirming(challenge.challenge_token, nonce).read())
    assert (type(told), told.reason) == (InvalidRequest, "UNKNOWN_CHALLENGE")
    stream.cancel()


async def test_a_wrong_nonce_is_refused_and_ends_the_challenge(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    told = await error(alice.confirming(challenge.challenge_token, bytes(32)).read())
    assert (type(told), told.reason, told.field) == (InvalidRequest, "WRONG_NONCE", "nonce")
    told = await error(alice.confirming(challenge.challenge_token, nonce).read())
    assert (told.reason, told.field) == ("UNKNOWN_CHALLENGE", "challenge_token")
    assert arena.segments == []


async def test_a_challenge_is_answered_only_by_the_client_that_asked(begin: Begin, arena: Arena):
    alice = await begin()
    challenge = await alice.challenge()
    nonce = (arena.folder / challenge.segment_name).read_bytes()
    told = await error(replace(alice, name="bob").confirming(challenge.challenge_token, nonce).read())
    assert told.reason == "UNKNOWN_CHALLENGE"
    stream = alice.confirming(challenge.challenge_token, nonce)
    assert (await bounded(stream.read())).session_token
    stream.cancel()


@pytest.mark.parametrize("ask", [required, preferred])
async def test_rows_in_shared_memory_are_those_that_come_inline(begin: Begin, arena: Arena, ask: Callable[..., Any]):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    responses = await alice.generate(ask(session, site=CAPTURE_SITE_BOTH))

    assert responses[0].started.capture_delivery == CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED
    assert responses[0].started.shared_memory_fallback == 0
    kinds = [response.WhichOneof("event") for response in responses]
    shared = ["capture_shm"] * 6
    assert kinds == ["started", *["token"] * 4, "capture_labels", *shared, "finished", "completed"]
    [segment] = arena.segments
    memory = segment.read_bytes()
    labels = next(one.capture_labels for one in responses if one.HasField("capture_labels"))
    for number, region in enumerate(regions(responses)):
        header = region.header
        assert (region.capture, region.segment_name, region.offset % 64) == (number, segment.name, 0)
        rows = np.frombuffer(memory, np.float32, ROWS * 8, region.offset).reshape(ROWS, 8)
        is_before = header.site == capture_pb2.CAPTURE_SITE_BEFORE
        expected = [encode_row(header.layer, *pair) for pair in zip(labels.positions, labels.token_ids, strict=True)]
        assert rows[:, :5].tolist() == np.stack(expected)[:, :5].tolist()
        assert rows[:, 5].tolist() == [is_before] * ROWS
    stream.cancel()


async def test_one_lease_is_for_all_regions_of_an_output_and_its_release_removes_the_segment(
    begin: Begin, arena: Arena
):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    request = required(session)
    request.sampling.n = 2
    responses = await alice.generate(request)
    by_output = {0: set(), 1: set()}
    for header, region in zip(headers(responses), regions(responses), strict=True):
        by_output[header.output_index].add((region.lease_token, region.segment_name))
    [(first, name)], [(second, other)] = by_output.values()
    assert first != second
    assert {path.name for path in arena.segments} == {name, other}
    await alice.release(lease_token=first)
    await alice.release(lease_token=first)
    assert [path.name for path in arena.segments] == [other]
    await replace(alice, name="bob").release(lease_token=second)
    assert alice.served.backend.holding == 1
    stream.cancel()
    await until(lambda: alice.served.backend.holding == 0)


async def no_session(_: Client, __: Path) -> tuple[bytes, Any]:
    return b"", None


async def unknown_session(_: Client, __: Path) -> tuple[bytes, Any]:
    return bytes(32), None


async def foreign_session(alice: Client, folder: Path) -> tuple[bytes, Any]:
    return await replace(alice, name="bob").session(folder)


async def ended_session(alice: Client, folder: Path) -> tuple[bytes, Any]:
    session, stream = await alice.session(folder)
    stream.cancel()
    await until(lambda: not alice.served.server._sessions.holds(session, "client alice"))
    return session, stream


REFUSED = {
    "was never proven": no_session,
    "is unknown": unknown_session,
    "is another client's": foreign_session,
    "has ended": ended_session,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_without_a_session_required_is_refused_and_preferred_falls_back_to_inline(
    begin: Begin, arena: Arena, name: str
):
    alice = await begin()
    session, stream = await REFUSED[name](alice, arena.folder)  # a stream that is dropped would end its session
    failed = await failure(alice.generate(required(session)))
    assert failed.code() == grpc.StatusCode.FAILED_PRECONDITION
    told = error_from_rpc(failed)
    assert (type(told), told.reason, told.field) == (Unsupported, "NO_SHARED_MEMORY", "capture.delivery")
    assert len(alice.served.backend.requests) == 1  # the warm-up

    responses = await alice.generate(preferred(session))

    started = responses[0].started
    expected = "NO_SESSION" if name == "was never proven" else "SESSION_ENDED"
    assert started.capture_delivery == CAPTURE_DELIVERY_INLINE
    assert capture_pb2.SharedMemoryFallback.Name(started.shared_memory_fallback) == f"SHARED_MEMORY_FALLBACK_{expected}"
    assert regions(responses) == []
    assert sorted(places(responses)) == sorted((layer, row) for layer in LAYERS for row in range(ROWS))
    assert alice.served.backend.holding == 0
    if stream is not None:
        stream.cancel()


async def test_shared_memory_can_be_switched_off(begin: Begin, arena: Arena):
    alice = await begin(shared_memory=0)
    told = await failure(alice.challenge())
    assert told.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error_from_rpc(told).reason == "SWITCHED_OFF"
    assert (await error(alice.generate(required(b"x")))).reason == "NO_SHARED_MEMORY"
    started = (await alice.generate(preferred(b"x")))[0].started
    assert started.shared_memory_fallback == capture_pb2.SHARED_MEMORY_FALLBACK_SWITCHED_OFF
    assert started.capture_delivery == CAPTURE_DELIVERY_INLINE
    assert len(payload(await alice.fetch((await alice.held()).capture_id))) > 0  # holding needs no shared memory


async def test_a_session_that_its_client_ends_frees_its_leases_and_no_others(begin: Begin, arena: Arena):
    alice = await begin()
    bob = replace(alice, name="bob")
    session, stream = await alice.session(arena.folder)
    other, lasting = await bob.session(arena.folder)
    await alice.generate(required(session))
    await alice.generate(required(session))
    kept = regions(await bob.generate(required(other)))[0]
    held = await alice.held()
    assert alice.served.backend.holding == 4

    stream.cancel()

    await until(lambda: alice.served.backend.holding == 2)
    assert kept.segment_name in {path.name for path in arena.segments}
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes
    lasting.cancel()


async def test_a_session_that_ends_during_a_request_fails_it_and_leaves_nothing(begin: Begin, arena: Arena):
    gate = Gate()
    alice = await begin()
    alice.served.backend.step = gate
    session, stream = await alice.session(arena.folder)
    running = asyncio.ensure_future(error(alice.generate(required(session))))
    await bounded(gate.reached.wait())
    stream.cancel()
    await until(lambda: not alice.served.server._sessions.holds(session, "client alice"))
    gate.opened.set()
    told = await bounded(running)
    assert (type(told), told.reason, told.field) == (NotFound, "SESSION_ENDED", "capture.shared_memory_session")
    assert (alice.served.backend.holding, arena.segments) == (0, [])


async def test_a_request_in_shared_memory_that_fails_late_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted(EngineFailed("broken", reason="BROKEN"))
    alice = await begin(backend)
    backend.go_on.set()
    session, stream = await alice.session(arena.folder)
    assert (await error(alice.generate(required(session)))).reason == "BROKEN"
    assert (backend.holding, arena.segments) == (0, [])
    stream.cancel()


async def test_a_lease_that_nobody_releases_expires(begin: Begin, arena: Arena):
    alice = await begin(shm_ttl=0.0)
    session, stream = await alice.session(arena.folder)
    responses = await alice.generate(required(session))
    assert len(regions(responses)) == 3
    await until(lambda: alice.served.backend.holding == 0)
    assert arena.segments == []
    stream.cancel()


async def test_captures_without_rows_are_handed_out_without_a_lease_and_held_by_nobody(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    probe = await alice.generate(text_request(max_tokens=1))
    request = required(session, positions=PositionScope(generated=True))
    request.sampling.stop_token_ids.extend(probe[1].token.token_ids)
    responses = await alice.generate(request)
    assert [list(header.shape) for header in headers(responses)] == [[0, 8]] * 3
    assert [(region.lease_token, region.segment_name) for region in regions(responses)] == [(b"", "")] * 3
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    stream.cancel()


async def test_draining_ends_sessions_and_frees_what_is_held_and_leased(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    await alice.held()
    await alice.challenge()  # never answered
    assert (alice.served.backend.holding, len(arena.segments)) == (2, 3)

    await bounded(alice.served.server.drain())

    assert await bounded(stream.read()) is grpc.aio.EOF  # it ended well
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    assert alice.served.server.metrics.total("released") == 2 * 3 * ROWS * ROW_BYTES


async def test_a_session_ends_when_its_server_stops_at_once(begin: Begin, arena: Arena):
    alice = await begin()
    session, stream = await alice.session(arena.folder)
    await alice.generate(required(session))
    alice.served.server.stop_now()
    await bounded(alice.served.server.drain())
    assert (alice.served.backend.holding, arena.segments) == (0, [])
    stream.cancel()
