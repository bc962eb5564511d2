"""A client that cancels its call is no error of the server."""

import logging

import pytest

from steer_service.testing.fake_backend import FakeBackend
from tests.server.capture_client import LONG, WIDE, Begin, asking, until, until_stuck
from tests.server.served import Gate, Serve, bounded, text_request


def assert_nothing_was_logged(caplog: pytest.LogCaptureFixture) -> None:
    ours = [record for record in caplog.records if record.name.startswith("steer_service")]  # gRPC has logs of its own
    assert [record.getMessage() for record in ours if record.levelno >= logging.WARNING] == []


async def test_a_client_that_cancels_while_the_engine_works_is_no_error(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    served = await serve()
    served.backend.step = gate
    call = served.generation.Generate(text_request())
    await bounded(gate.reached.wait())

    call.cancel()

    await bounded(served.backend.wait_idle())
    await bounded(served.server._admission.wait_idle())
    assert_nothing_was_logged(caplog)


async def test_a_client_that_cancels_what_it_does_not_read_is_no_error(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    alice = await begin(FakeBackend(WIDE))
    held = await alice.held(asking(text=LONG, max_tokens=1, layers=[0, 1, 2, 3]))
    call = alice.fetching(held.capture_id)
    await bounded(call.read())
    await until_stuck(lambda: int(alice.served.server.metrics.total("delivered")))
    [stored] = alice.served.server._store._captures.values()

    call.cancel()

    await until(lambda: not stored.readers)
    assert_nothing_was_logged(caplog)
