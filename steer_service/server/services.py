"""What the generated stubs register, but for the streams of chunks, whose messages this project writes by itself."""

from collections.abc import Callable, Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.chunks import fetch_response_to_bytes, generate_response_to_bytes

Serializer = Callable[[Any], bytes]
"""A response -> its bytes on the wire."""


def add_generation_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers GenerationService."""
    service = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"]
    _add(server, service, servicer, {"Generate": generate_response_to_bytes})


def add_capture_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers CaptureService."""
    service = capture_pb2.DESCRIPTOR.services_by_name["CaptureService"]
    _add(server, service, servicer, {"FetchCapture": fetch_response_to_bytes})


def _add(
    server: grpc.aio.Server, service: ServiceDescriptor, servicer: Any, serializers: Mapping[str, Serializer]
) -> None:
    """Registers every method of a service; `serializers` write the responses of some."""
    handlers = {method.name: _handler(method, servicer, serializers.get(method.name)) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def _handler(method: MethodDescriptor, servicer: Any, serializer: Serializer | None) -> grpc.RpcMethodHandler:
    assert not method.client_streaming, "the contract has no streams of requests"
    streams = method.server_streaming
    make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
    return make(
        getattr(servicer, method.name),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=serializer or GetMessageClass(method.output_type).SerializeToString,
    )
