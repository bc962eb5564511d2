"""Who may release a held capture, and when it is freed without being released."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from steer_service.core.errors import EngineFailed, InvalidRequest
from steer_service.wire.generation_pb2 import CancelRequest
from tests.arena import Arena
from tests.server.capture_client import Begin, Interrupted, asking, error, failure, payload, rest_of, until
from tests.server.served import Gate, bounded


async def test_an_unused_capture_expires(begin: Begin, arena: Arena):
    alice = await begin(shm_ttl=0.0)
    held = await alice.held()
    await until(lambda: alice.served.backend.holding == 0)
    assert arena.segments == []
    assert alice.served.server.metrics.total("expired") == held.total_bytes


async def test_releasing_frees_and_can_be_repeated(begin: Begin, arena: Arena):
    alice = await begin()
    held = await alice.held()
    assert len(arena.segments) == 1
    for _ in range(2):
        await alice.release(capture_id=held.capture_id)
        assert (alice.served.backend.holding, arena.segments) == (0, [])
    await alice.release(capture_id="never was")


async def test_other_clients_cannot_release(begin: Begin):
    alice = await begin()
    held = await alice.held()
    for name in ("bob", ""):
        await replace(alice, name=name).release(capture_id=held.capture_id)
        await replace(alice, name=name).release(lease_token=held.capture_id.encode())
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


TOKEN = bytes(range(16))


async def test_a_release_token_frees_all_of_its_request_and_nothing_else(begin: Begin, arena: Arena):
    alice = await begin()
    request = asking(release_token=TOKEN)
    request.sampling.n = 2
    await alice.generate(request)
    other = await alice.held(asking(release_token=TOKEN[::-1]))
    plain = await alice.held()
    for _ in range(2):
        await alice.release(release_token=TOKEN)
        assert alice.served.backend.holding == len(arena.segments) == 2
    for held in (other, plain):
        assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


async def test_other_clients_cannot_release_by_a_token(begin: Begin):
    alice = await begin()
    held = await alice.held(asking(release_token=TOKEN))
    await replace(alice, name="bob").release(release_token=TOKEN)
    assert len(payload(await alice.fetch(held.capture_id))) == held.total_bytes


async def test_a_request_that_still_runs_is_stopped_by_its_release_token(begin: Begin, arena: Arena):
    gate = Gate()
    alice = await begin()
    alice.served.backend.step = gate
    running = asyncio.ensure_future(error(alice.generate(asking(release_token=TOKEN))))
    await bounded(gate.reached.wait())
    await replace(alice, name="bob").release(release_token=TOKEN)
    assert not running.done()
    await alice.release(release_token=TOKEN)
    told = await bounded(running)
    assert (type(told), told.reason) == (EngineFailed, "CANCELLED")
    assert (alice.served.backend.holding, arena.segments) == (0, [])


async def test_other_clients_cannot_stop_a_request_by_its_release_token(begin: Begin):
    gate = Gate()
    alice = await begin()
    alice.served.backend.step = gate
    running = asyncio.ensure_future(alice.generate(asking(release_token=TOKEN)))
    await bounded(gate.reached.wait())
    for name in ("bob", ""):
        await replace(alice, name=name).release(release_token=TOKEN)
    gate.opened.set()
    assert (await bounded(running))[-1].HasField("completed")


@pytest.mark.parametrize("token", [b"", b"short", bytes(65)])
async def test_a_token_that_can_be_guessed_or_is_too_long_is_refused(begin: Begin, token: bytes):
    alice = await begin()
    told = await error(alice.release(release_token=token))
    assert (type(told), told.field) == (InvalidRequest, "release_token")
    if token:
        told = await error(alice.generate(asking(release_token=token)))
        assert (type(told), told.field) == (InvalidRequest, "capture.release_token")


async def test_clients_without_a_name_are_one_client(begin: Begin):
    nobody = replace(await begin(), name="")
    held = await nobody.held()
    assert len(payload(await nobody.fetch(held.capture_id))) == held.total_bytes


async def test_a_name_that_is_too_long_is_refused(begin: Begin):
    alice = replace(await begin(), name="x" * 129)
    told = await error(alice.generate(asking()))
    assert (type(told), told.field) == (InvalidRequest, "steer-client-id")


async def test_nothing_to_release_is_refused(begin: Begin):
    told = await error((await begin()).release())
    assert (type(told), told.field) == (InvalidRequest, "target")


async def test_a_request_that_fails_after_it_was_held_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted(EngineFailed("broken", reason="BROKEN"))
    alice = await begin(backend)
    backend.go_on.set()
    assert (await error(alice.generate(asking()))).reason == "BROKEN"
    assert (backend.holding, arena.segments, len(alice.served.server._store)) == (0, [], 0)


async def test_a_request_that_is_cancelled_after_it_was_held_leaves_nothing(begin: Begin, arena: Arena):
    backend = Interrupted()
    alice = await begin(backend)
    call = alice.served.generation.Generate(asking(), metadata=alice.metadata)
    while not (response := await bounded(call.read())).HasField("capture_held"):
        pass
    capture_id = response.capture_held.capture_id
    assert len(payload(await alice.fetch(capture_id))) > 0  # it is there already
    call.cancel()
    await until(lambda: backend.holding == 0)
    assert arena.segments == []
    assert (await failure(alice.fetch(capture_id))).code() == grpc.StatusCode.NOT_FOUND


async def test_a_request_that_is_cancelled_by_its_token_after_it_was_held_leaves_nothing(begin: Begin):
    backend = Interrupted()
    alice = await begin(backend)
    call = alice.served.generation.Generate(asking(), metadata=alice.metadata)
    token = (await bounded(call.read())).started.cancel_token
    await bounded(backend.handed_over.wait())
    await bounded(alice.served.generation.Cancel(CancelRequest(cancel_token=token)))
    assert (await failure(rest_of(call))).code() == grpc.StatusCode.CANCELLED
    assert backend.holding == 0
