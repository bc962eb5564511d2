"""Facts that a client asks its server for: about the model, and about the server itself."""

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from steer_client.channel import ClientConfig, blocking_channel, call_metadata
from steer_client.connection_errors import error_from_call
from steer_service.core.backend import ModelInfo
from steer_service.core.server_info import ServerInfo
from steer_service.runtime.deadline import CallLimit, current_limit
from steer_service.wire.info import model_info_from_proto, server_info_from_proto
from steer_service.wire.info_pb2 import GetModelRequest, GetServerInfoRequest
from steer_service.wire.info_pb2_grpc import InfoServiceStub

T = TypeVar("T")


def fetch_model_info(config: ClientConfig) -> ModelInfo:
    """Gets the facts about the model, blocking, over a channel of its own; raises a SteerError."""
    limit = unary_limit(config, "info")
    with blocking_channel(config) as channel:
        try:
            response = InfoServiceStub(channel).GetModel(  # type: ignore[no-untyped-call]
                GetModelRequest(), timeout=limit.left_s, metadata=call_metadata(config)
            )
        except grpc.RpcError as error:
            raise error_from_call(error, config, limit=limit) from error
    return model_info_from_proto(response.model)


async def fetch_model_info_async(config: ClientConfig, channel: grpc.aio.Channel) -> ModelInfo:
    """Gets the facts about the model over `channel`; raises a SteerError."""
    return await _asked(config, channel, "GetModel", GetModelRequest(), lambda got: model_info_from_proto(got.model))


async def fetch_server_info(config: ClientConfig, channel: grpc.aio.Channel) -> ServerInfo:
    """Gets the facts about the server over `channel`; raises a SteerError."""
    return await _asked(config, channel, "GetServerInfo", GetServerInfoRequest(), server_info_from_proto)


def unary_limit(config: ClientConfig, call: str) -> CallLimit:
    """The limit of an RPC with one response: that of the call around it, or else the client's own."""
    current = current_limit()
    if current is not None and current.seconds is not None:
        return current
    return CallLimit.of(current.call if current is not None else call, config.unary_timeout_s, UNARY_OPTION)


UNARY_OPTION = "unary_timeout_s of the client"


async def _asked(
    config: ClientConfig, channel: grpc.aio.Channel, method: str, request: Any, read: Callable[[Any], T]
) -> T:
    stub = InfoServiceStub(channel)  # type: ignore[no-untyped-call]
    limit = unary_limit(config, method)
    try:
        response = await getattr(stub, method)(request, timeout=limit.left_s, metadata=call_metadata(config))
    except grpc.RpcError as error:
        raise error_from_call(error, config, limit=limit) from error
    return read(response)
