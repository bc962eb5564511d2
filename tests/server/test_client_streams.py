"""How many response streams of one kind a client may have: a place is returned however its stream ends."""

import asyncio

import pytest

from steer_service.core.errors import Overloaded
from steer_service.server.client_streams import ClientStreams


@pytest.mark.parametrize("how", [None, ValueError, asyncio.CancelledError, GeneratorExit])
def test_a_place_is_returned_however_the_stream_ends(how: type[BaseException] | None) -> None:
    streams = ClientStreams("captures", lambda _: 1, retry_after_s=2.0)
    for _ in range(3):
        if how is None:
            with streams.one_more("alice"):
                pass
        else:
            with pytest.raises(how), streams.one_more("alice"):
                raise how


def test_a_client_that_has_as_many_as_it_may_is_refused_and_others_are_not() -> None:
    streams = ClientStreams("captures", lambda _: 1, retry_after_s=2.0)
    with streams.one_more("alice"), streams.one_more("bob"):
        with pytest.raises(Overloaded, match="1 captures at once") as raised, streams.one_more("alice"):
            pass
    assert (raised.value.reason, raised.value.retry_after_s) == ("CLIENT_QUOTA", 2.0)
