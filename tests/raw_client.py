"""A client that speaks the contract without this project's client."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from steer_service.wire import capture_pb2, generation_pb2
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from tests.shm_clients import LAYERS, TOKENS


class RawClient:
    """A client that speaks the contract without this project's client."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.captures, self.generation = CaptureServiceStub(channel), GenerationServiceStub(channel)
        self.metadata = (("steer-client-id", name),)

    @asynccontextmanager
    async def session(self, folder: Path) -> AsyncIterator[bytes]:
        challenge = await self.captures.OpenSharedMemory(capture_pb2.OpenSharedMemoryRequest(), metadata=self.metadata)
        nonce = (folder / challenge.segment_name).read_bytes()
        call = self.captures.ConfirmSharedMemory(
            capture_pb2.ConfirmSharedMemoryRequest(challenge_token=challenge.challenge_token, nonce=nonce),
            metadata=self.metadata,
        )
        yield (await call.read()).session_token
        call.cancel()

    async def region(self, session: bytes, prompt: tuple[int, ...]) -> capture_pb2.SharedMemoryRegion:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=prompt),
            sampling=generation_pb2.SamplingOptions(max_tokens=TOKENS),
            capture=capture_pb2.CaptureSpec(
                layers=LAYERS,
                delivery=capture_pb2.CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
                shared_memory_session=session,
            ),
        )
        responses = [one async for one in self.generation.Generate(request, metadata=self.metadata)]
        return next(one.capture_shm for one in responses if one.WhichOneof("event") == "capture_shm")

    async def fetch(self, capture_id: str) -> grpc.StatusCode:
        call = self.captures.FetchCapture(
            capture_pb2.FetchCaptureRequest(capture_id=capture_id), metadata=self.metadata
        )
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def release(self, token: bytes) -> None:
        await self.captures.ReleaseCapture(capture_pb2.ReleaseCaptureRequest(lease_token=token), metadata=self.metadata)
