"""Waiting for a server: until it listens, its health is SERVING and its model is there."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from steer_client.channel import ClientConfig, call_metadata
from steer_client.connection_errors import error_from_call
from steer_client.facts import fetch_model_info_async
from steer_client.open_calls import ends_with
from steer_service.core.backend import ModelInfo
from steer_service.core.errors import DeadlineExceeded, EngineFailed, SteerError
from steer_service.core.field_checks import check_timeout
from steer_service.runtime.deadline import CallLimit
from steer_service.runtime.retry import NOTHING_RAN

READY_TIMEOUT_S = 600.0
"""Seconds in which a server loads a large model."""

PAUSE_S = 0.5
"""Seconds between two questions that were refused."""

WAITED_OUT = NOTHING_RAN | {"CONNECTION_LOST", "ENGINE_DIED", "DEADLINE_EXCEEDED", "ROUTE_TIMEOUT"}
"""Reasons of errors that end without a change by somebody."""

SERVING = b"\x08\x01"
"""The bytes of a HealthCheckResponse that says so: the base install has no health checks."""


async def wait_until_ready(config: ClientConfig, channel: grpc.aio.Channel, timeout_s: float) -> ModelInfo:
    """The facts about the model, once the server at the other end of `channel` serves it; see AsyncSteerClient."""
    check_timeout(timeout_s, "timeout_s")
    last: SteerError | None = None
    limit = CallLimit.of("wait_until_ready", timeout_s)
    try:
        async with asyncio.timeout(timeout_s) as timer:
            while True:
                try:
                    async with aclosing(_health(config, channel)) as health:
                        async for is_serving in health:
                            if is_serving:
                                return await fetch_model_info_async(config, channel)
                            last = EngineFailed("it is NOT_SERVING: it starts or stops", reason="LOADING")
                            last = await _why_not_serving(config, channel) or last
                except grpc.RpcError as error:
                    last = error_from_call(error, config)
                except SteerError as error:
                    last = error
                if last is not None and last.reason not in WAITED_OUT:
                    raise last
                await _pause(channel, last)
    except TimeoutError as error:
        if isinstance(error, SteerError) or not timer.expired():
            raise
        said = f"last: {last}" if last is not None else "it had not answered"
        raise DeadlineExceeded(
            f"the server at {config.address} was not ready within {limit.seconds:g} s, the {limit.option}; {said}"
        ) from last


async def _health(config: ClientConfig, channel: grpc.aio.Channel) -> AsyncGenerator[bool, None]:
    """Whether the server is SERVING, now and after each change. One that knows no health checks is."""
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=bytes,
        response_deserializer=bytes,
    )
    call = ends_with(channel, watch(b"", metadata=call_metadata(config)))
    try:
        async for response in call:
            yield response == SERVING
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.UNIMPLEMENTED:
            raise
        yield True
    finally:
        call.cancel()


async def _why_not_serving(config: ClientConfig, channel: grpc.aio.Channel) -> SteerError | None:
    """The error that a server which is NOT_SERVING gives to a question about its model; None if it gives the model."""
    try:
        await fetch_model_info_async(config, channel)
    except SteerError as error:
        if error.reason not in WAITED_OUT:
            raise
        told = EngineFailed(f"it is NOT_SERVING: {error.message} ({error.reason})", reason=error.reason)
        told.__cause__ = error
        return told
    return None


async def _pause(channel: grpc.aio.Channel, last: SteerError | None) -> None:
    """Waits until gRPC connects again if there is no connection, and else for a moment."""
    state = channel.get_state(try_to_connect=True)
    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
        await channel.wait_for_state_change(state)
    else:
        await asyncio.sleep(PAUSE_S if last is None or last.retry_after_s is None else min(last.retry_after_s, PAUSE_S))
