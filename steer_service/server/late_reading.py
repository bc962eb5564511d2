"""Handlers that decide about a call before they read its message.

gRPC hands a method without request streams its message first, up to the largest that the server accepts, however slowly
it comes. Whoever need not be known could fill the server's memory with halves of messages. These handlers take the
message from the stream of requests instead, when they want it.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from steer_service.core.errors import InvalidRequest
from steer_service.server.aborted_calls import errors_as_status

Handler = Any

Check = Callable[[grpc.aio.ServicerContext], Awaitable[None]]
"""Ends a call that may not go on, by the exception that `abort` raises."""


def reading_late(handler: Handler, check: Check, timeout_s: float | None = None) -> Handler:
    """`handler`, which reads its message after `check`, and within `timeout_s`; None: as long as the call lasts."""
    if handler.stream_stream is not None:  # takes its messages from the stream already
        return grpc.stream_stream_rpc_method_handler(
            _checked(handler.stream_stream, check), handler.request_deserializer, handler.response_serializer
        )
    unary, streaming = handler.unary_unary, handler.unary_stream
    behaviour = unary or streaming
    if not (inspect.iscoroutinefunction(behaviour) or inspect.isasyncgenfunction(behaviour)):
        return handler  # of a server with threads

    async def respond(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
        await check(context)
        message = await _first(messages, context, timeout_s)
        if streaming is None:
            yield await unary(message, context)
            return
        async with aclosing(streaming(message, context)) as responses:
            async for response in responses:
                yield response

    return grpc.stream_stream_rpc_method_handler(respond, handler.request_deserializer, handler.response_serializer)


def _checked(behaviour: Any, check: Check) -> Any:
    async def respond(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
        await check(context)
        async with aclosing(behaviour(messages, context)) as responses:
            async for response in responses:
                yield response

    return respond


async def _first(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext, timeout_s: float | None) -> Any:
    """The call's message; ends the call if there is none."""
    try:
        return await asyncio.wait_for(anext(messages), timeout_s)
    except (StopAsyncIteration, TimeoutError):
        async with errors_as_status(context):
            raise InvalidRequest("the call has no message", reason="MALFORMED") from None
    raise AssertionError
