"""Calls with a response stream that end with their channel.

gRPC before 1.83 forgets a call that nobody awaits in a task of gRPC's own: after `close`, its reader waits for ever and
the connection stays open. `tests/client/test_dropped_clients.py` notices it there.
"""

from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import grpc

Call = TypeVar("Call", bound=grpc.aio.Call)

_calls: WeakKeyDictionary[grpc.aio.Channel, WeakSet[Any]] = WeakKeyDictionary()
"""The calls of each channel."""


def ends_with(channel: grpc.aio.Channel, call: Call) -> Call:
    """The call, which `close_channel` cancels."""
    calls = _calls.get(channel)
    if calls is None:
        calls = _calls[channel] = WeakSet()
    calls.add(call)
    return call


async def close_channel(channel: grpc.aio.Channel) -> None:
    """Cancels the calls of a channel of the running loop and closes it."""
    for call in [*_calls.pop(channel, ())]:
        call.cancel()
    await channel.close()
