"""CaptureService: captures kept on the server and shared memory, which are not built yet."""

from collections.abc import AsyncGenerator

import grpc

from steer_service.server.status import translated
from steer_service.wire import capture_pb2
from steer_service.wire.capture_pb2_grpc import CaptureServiceServicer
from steer_service.wire.fields import not_built


class CaptureServicer(CaptureServiceServicer):
    """Refuses every call with the reason."""

    async def FetchCapture(
        self, request: capture_pb2.FetchCaptureRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[capture_pb2.FetchCaptureResponse, None]:
        """Not built yet."""
        async with translated(context):
            raise not_built("FetchCapture")
        yield  # makes it a generator, as gRPC expects of a stream

    async def ReleaseCapture(
        self, request: capture_pb2.ReleaseCaptureRequest, context: grpc.aio.ServicerContext
    ) -> capture_pb2.ReleaseCaptureResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("ReleaseCapture")

    async def OpenSharedMemory(
        self, request: capture_pb2.OpenSharedMemoryRequest, context: grpc.aio.ServicerContext
    ) -> capture_pb2.OpenSharedMemoryResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("OpenSharedMemory")

    async def ConfirmSharedMemory(
        self, request: capture_pb2.ConfirmSharedMemoryRequest, context: grpc.aio.ServicerContext
    ) -> capture_pb2.ConfirmSharedMemoryResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("ConfirmSharedMemory")
