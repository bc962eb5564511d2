"""What the generated stubs register, but for the streams of chunks, whose messages this project writes by itself."""

from typing import Any

import grpc

from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.chunks import fetch_response_to_bytes, generate_response_to_bytes


def add_generation_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers GenerationService."""
    _add(
        server,
        generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
        {
            "Generate": grpc.unary_stream_rpc_method_handler(
                servicer.Generate,
                request_deserializer=generation_pb2.GenerateRequest.FromString,
                response_serializer=generate_response_to_bytes,
            ),
            "Cancel": grpc.unary_unary_rpc_method_handler(
                servicer.Cancel,
                request_deserializer=generation_pb2.CancelRequest.FromString,
                response_serializer=generation_pb2.CancelResponse.SerializeToString,
            ),
        },
    )


def add_capture_service(servicer: Any, server: grpc.aio.Server) -> None:
    """Registers CaptureService."""
    _add(
        server,
        capture_pb2.DESCRIPTOR.services_by_name["CaptureService"],
        {
            "FetchCapture": grpc.unary_stream_rpc_method_handler(
                servicer.FetchCapture,
                request_deserializer=capture_pb2.FetchCaptureRequest.FromString,
                response_serializer=fetch_response_to_bytes,
            ),
            "ReleaseCapture": grpc.unary_unary_rpc_method_handler(
                servicer.ReleaseCapture,
                request_deserializer=capture_pb2.ReleaseCaptureRequest.FromString,
                response_serializer=capture_pb2.ReleaseCaptureResponse.SerializeToString,
            ),
            "OpenSharedMemory": grpc.unary_unary_rpc_method_handler(
                servicer.OpenSharedMemory,
                request_deserializer=capture_pb2.OpenSharedMemoryRequest.FromString,
                response_serializer=capture_pb2.OpenSharedMemoryResponse.SerializeToString,
            ),
            "ConfirmSharedMemory": grpc.unary_stream_rpc_method_handler(
                servicer.ConfirmSharedMemory,
                request_deserializer=capture_pb2.ConfirmSharedMemoryRequest.FromString,
                response_serializer=capture_pb2.ConfirmSharedMemoryResponse.SerializeToString,
            ),
        },
    )


def _add(server: grpc.aio.Server, service: Any, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
    assert set(handlers) == set(service.methods_by_name), "a method of the contract is not served"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
