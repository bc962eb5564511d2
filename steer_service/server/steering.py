"""SteeringService: vectors kept on the server, which is not built yet."""

import grpc

from steer_service.server.status import translated
from steer_service.wire import steering_pb2
from steer_service.wire.fields import not_built
from steer_service.wire.steering_pb2_grpc import SteeringServiceServicer


class SteeringServicer(SteeringServiceServicer):
    """Refuses every call with the reason."""

    async def UploadVector(
        self, request: steering_pb2.UploadVectorRequest, context: grpc.aio.ServicerContext
    ) -> steering_pb2.UploadVectorResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("UploadVector")

    async def GetVector(
        self, request: steering_pb2.GetVectorRequest, context: grpc.aio.ServicerContext
    ) -> steering_pb2.GetVectorResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("GetVector")

    async def ListVectors(
        self, request: steering_pb2.ListVectorsRequest, context: grpc.aio.ServicerContext
    ) -> steering_pb2.ListVectorsResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("ListVectors")

    async def DeleteVector(
        self, request: steering_pb2.DeleteVectorRequest, context: grpc.aio.ServicerContext
    ) -> steering_pb2.DeleteVectorResponse:
        """Not built yet."""
        async with translated(context):
            raise not_built("DeleteVector")
