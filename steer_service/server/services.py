"""Registers this project's services, and reflection of them, with a gRPC server.

The generated `add_...Servicer_to_server` functions would parse every request before the service sees it. Here methods
take the bytes of their request, which `wire.message_scan` checks first. Generate and FetchCapture send chunks, which
`wire.chunks` serializes with fewer copies than protobuf.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from steer_service.server.aborted_calls import errors_as_status
from steer_service.server.late_reading import reading_late
from steer_service.server.request_body import RequestBody
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.chunks import fetch_response_to_bytes, generate_response_to_bytes
from steer_service.wire.message_scan import parsed

_DESCRIPTORS: tuple[ServiceDescriptor, ...] = tuple(
    service
    for file in (generation_pb2, steering_pb2, capture_pb2, tokenizer_pb2, info_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)

SERVICES = tuple(service.full_name for service in _DESCRIPTORS)
"""Full names of this project's services."""

MESSAGE_S = 5.0
"""Seconds within which the message of a health check must have arrived, since anyone may call."""

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

Serializer = Callable[[Any], bytes]
"""Turns a response into its bytes on the wire."""


_SERIALIZERS: Mapping[str, Serializer] = {
    "steer.v1.GenerationService.Generate": generate_response_to_bytes,
    "steer.v1.CaptureService.FetchCapture": fetch_response_to_bytes,
}
"""Methods whose responses protobuf does not serialize."""


def add_service(name: str, servicer: Any, server: grpc.aio.Server) -> None:
    """Registers one of SERVICES, by its full name."""
    service = next(one for one in _DESCRIPTORS if one.full_name == name)
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def _everyone(_: grpc.aio.ServicerContext) -> None:
    """Health checks need no credentials."""


def add_health(servicer: Any, server: grpc.aio.Server | grpc.Server) -> None:
    """Registers the methods of health checks that `servicer` has."""
    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    methods = (method for method in service.methods if hasattr(servicer, method.name))
    handlers = {
        method.name: reading_late(_handler(method, getattr(servicer, method.name)), _everyone, MESSAGE_S)
        for method in methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def add_reflection(server: grpc.aio.Server) -> None:
    """Registers server reflection, version v1 and v1alpha, for this project's services, health and reflection."""
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)  # clients look up a descriptor of every name
    servicer = reflection.aio.ReflectionServicer(names)

    async def info(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncGenerator[Any, None]:
        async with errors_as_status(context) as call:
            messages = (parsed(reflection_pb2.ServerReflectionRequest, data) async for data in requests)
            async for response in servicer.ServerReflectionInfo(messages, context):
                await call.open(context)
                yield response

    handler = grpc.stream_stream_rpc_method_handler(
        info, response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString
    )
    for name in (reflection.SERVICE_NAME, REFLECTION_V1):  # the two versions differ only in their name
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def _handler(method: MethodDescriptor, behaviour: Any) -> grpc.RpcMethodHandler:
    """The handler of a method that takes the bytes of its request."""
    assert not method.client_streaming, "no method of the contract streams requests"
    serializer = _SERIALIZERS.get(method.full_name) or GetMessageClass(method.output_type).SerializeToString
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(behaviour, RequestBody, serializer)
    return grpc.unary_unary_rpc_method_handler(behaviour, RequestBody, serializer)
