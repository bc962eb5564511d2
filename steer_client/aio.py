"""The client for asynchronous programs: the calls users know, over a channel."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Self

import grpc

from steer_client.channel import (
    DEFAULT_ADDRESS,
    ClientConfig,
    LoopChannels,
    call_metadata,
    closed_error,
    error_from_call,
    fetch_model_info,
    fetch_model_info_async,
)
from steer_service.core.backend import ModelInfo
from steer_service.core.calls import SteeringCalls
from steer_service.core.request import Completed, Event, GenerateRequest
from steer_service.wire.events import events_from_responses
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.request import request_to_proto


class AsyncSteerClient(SteeringCalls):
    """A model served by `steer serve`, with the calls of an engine in this process.

    It connects at the first call, in whichever event loop that call runs; one client may serve several loops. Every
    method raises a SteerError: the one the server raised, or EngineFailed with reason UNREACHABLE, CONNECTION_LOST or
    CLOSED.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, unary_timeout_s: float = 10.0
    ) -> None:
        self._config = ClientConfig(address=address, timeout_s=timeout_s, unary_timeout_s=unary_timeout_s)
        self._channels = LoopChannels(self._config)
        self._info: ModelInfo | None = None

    @classmethod
    async def connect(
        cls, address: str = DEFAULT_ADDRESS, *, timeout_s: float | None = None, unary_timeout_s: float = 10.0
    ) -> Self:
        """A client that has reached its server and knows its model; raises EngineFailed if there is none."""
        client = cls(address, timeout_s=timeout_s, unary_timeout_s=unary_timeout_s)
        try:
            client._info = await fetch_model_info_async(client._config, client._channels.here())
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._config.address

    @property
    def info(self) -> ModelInfo:
        """Facts about the model; the first use asks the server and blocks until it answers, `connect` does not."""
        if self._info is None:
            if self._channels.is_closed:
                raise closed_error()
            self._info = fetch_model_info(self._config)
        return self._info

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Answers one request with the events the server sends; closing the iterator cancels it there."""
        stub = GenerationServiceStub(self._channels.here())  # type: ignore[no-untyped-call]
        call = stub.Generate(request_to_proto(request), timeout=self._config.timeout_s, metadata=call_metadata())
        answered, completed = False, None
        try:
            async with aclosing(events_from_responses(call)) as events:
                async for event in events:
                    answered = True
                    if isinstance(event, Completed):
                        completed = event  # is passed on when the stream has ended well, and not before
                    else:
                        yield event
        except grpc.RpcError as error:
            raise error_from_call(error, self.address, answered=answered) from error
        except asyncio.CancelledError:
            if self._channels.is_closed and not _is_cancelling():
                raise closed_error() from None  # the call was cancelled by `close`, and not this task by its owner
            raise
        finally:
            call.cancel()
        assert completed is not None, "events_from_responses refuses a stream without it"
        yield completed

    async def close(self) -> None:
        """Cancels what still runs and closes the connection; calling it again does nothing."""
        await self._channels.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
