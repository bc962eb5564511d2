"""Registers this project's services, and reflection of them, with a gRPC server.

The generated `add_...Servicer_to_server` functions would serialize every response with protobuf. Generate and
FetchCapture send chunks, which `wire.chunks` serializes with fewer copies, so their services are registered here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2
from steer_service.wire.chunks import fetch_response_to_bytes, generate_response_to_bytes

SERVICES = tuple(
    service.full_name
    for file in (generation_pb2, steering_pb2, capture_pb2, info_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
"""Full names of this project's services."""

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

Serializer = Callable[[Any], bytes]
"""Turns a response into its bytes on the wire."""


def add_generation_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers GenerationService, whose capture chunks are serialized by `wire.chunks`."""
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    _add(server, service, servicer, {"Generate": generate_response_to_bytes})


def add_capture_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers CaptureService, whose capture chunks are serialized by `wire.chunks`."""
    service = capture_pb2.DESCRIPTOR.services_by_name["CaptureService"]
    _add(server, service, servicer, {"FetchCapture": fetch_response_to_bytes})


def add_reflection(server: grpc.aio.Server) -> None:
    """Registers server reflection, version v1 and v1alpha, for this project's services, health and reflection."""
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)  # clients look up a descriptor of every name
    servicer = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (reflection.SERVICE_NAME, REFLECTION_V1):  # the two versions differ only in their name
        methods = {"ServerReflectionInfo": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))


def _add(
    server: grpc.aio.Server, service: ServiceDescriptor, servicer: Any, serializers: Mapping[str, Serializer]
) -> None:
    """Registers every method of a service; `serializers` holds those that do not use protobuf's, by method."""
    handlers = {method.name: _handler(method, servicer, serializers.get(method.name)) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(method: MethodDescriptor, servicer: Any, serializer: Serializer | None) -> grpc.RpcMethodHandler:
    assert not method.client_streaming, "no method of the contract streams requests"
    is_streaming = method.server_streaming
    make = grpc.unary_stream_rpc_method_handler if is_streaming else grpc.unary_unary_rpc_method_handler
    return make(
        getattr(servicer, method.name),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=serializer or GetMessageClass(method.output_type).SerializeToString,
    )
