"""A server under test, the stubs of a client, and what tests wait with."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from steer_service.server.app import SERVICES, SteerServer
from steer_service.wire import generation_pb2
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.info_pb2_grpc import InfoServiceStub
from steer_service.wire.steering_pb2_grpc import VectorServiceStub
from steer_service.wire.tokenizer_pb2_grpc import TokenizerServiceStub

BOUND_S = 10.0
"""Seconds within which whatever a test waits for must happen."""


def text_request(text: str = "one two three", max_tokens: int = 4, **fields: Any) -> generation_pb2.GenerateRequest:
    sampling = generation_pb2.SamplingOptions(max_tokens=max_tokens)
    return generation_pb2.GenerateRequest(text=text, sampling=sampling, **fields)


async def bounded(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, BOUND_S)


class Gate:
    """A step of the fake backend that holds every request before its token `at` until it is opened."""

    def __init__(self, at: int = 1) -> None:
        self.at = at
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, number: int) -> None:
        if number == self.at:
            self.reached.set()
            await self.opened.wait()


def _naming(name: str) -> Any:
    metadata = grpc.aio.Metadata(("steer-client-id", name))

    async def intercept(_: Any, continuation: Any, details: Any, request: Any) -> Any:
        return await continuation(details._replace(metadata=details.metadata or metadata), request)

    kinds = grpc.aio.UnaryUnaryClientInterceptor, grpc.aio.UnaryStreamClientInterceptor
    names = "intercept_unary_unary", "intercept_unary_stream"
    return [type("Naming", (kind,), {method: intercept})() for kind, method in zip(kinds, names, strict=True)]


def channel_to(address: str, client_id: str = "") -> grpc.aio.Channel:
    """A channel that sends `client_id`, unless it is "", with every call that has no metadata of its own."""
    own = ("grpc.use_local_subchannel_pool", 1)  # channels of one process would share a connection
    return grpc.aio.insecure_channel(address, options=[own], interceptors=_naming(client_id) if client_id else [])


@dataclass(slots=True)
class Served:
    """A server under test and the stubs of a client."""

    server: SteerServer
    backend: Any
    channel: grpc.aio.Channel

    @property
    def generation(self) -> GenerationServiceStub:
        return GenerationServiceStub(self.channel)

    @property
    def info(self) -> InfoServiceStub:
        return InfoServiceStub(self.channel)

    @property
    def steering(self) -> VectorServiceStub:
        return VectorServiceStub(self.channel)

    @property
    def capture(self) -> CaptureServiceStub:
        return CaptureServiceStub(self.channel)

    @property
    def tokenizer(self) -> TokenizerServiceStub:
        return TokenizerServiceStub(self.channel)

    @property
    def health(self) -> health_pb2_grpc.HealthStub:
        return health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, request: generation_pb2.GenerateRequest) -> list[generation_pb2.GenerateResponse]:
        async def drain() -> list[generation_pb2.GenerateResponse]:
            return [response async for response in self.generation.Generate(request)]

        return await bounded(drain())

    async def failure(self, request: generation_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(request)
        return caught.value

    async def statuses(self) -> dict[str, str]:
        names = health_pb2.HealthCheckResponse.ServingStatus
        return {
            service: names.Name((await self.health.Check(health_pb2.HealthCheckRequest(service=service))).status)
            for service in ("", *SERVICES)
        }


Serve = Callable[..., Awaitable[Served]]
