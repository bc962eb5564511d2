"""Calls of the scenarios' clients, and what they wait with."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from bench.soak.hostile import serialized
from bench.soak.processes import Server
from steer_service.wire.chunks import generate_response_from_bytes
from steer_service.wire.generation_pb2 import GenerateRequest, SamplingOptions, TokenIds

Figures = dict[str, Any]

GENERATE = "/steer.v1.GenerationService/Generate"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call ended."""

    code: str
    """Name of its status code."""
    tokens: int
    """Tokens that were received."""
    first_s: float
    """Seconds until the first token; infinite without one."""


def request(prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4, **fields: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=prompt), sampling=SamplingOptions(max_tokens=max_tokens), **fields)


def channel_to(address: str, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(address, options=[*own, *options])


def generating(channel: grpc.aio.Channel) -> grpc.aio.UnaryStreamMultiCallable:
    """Generate, for requests and for bytes in place of one."""
    return channel.unary_stream(
        GENERATE, request_serializer=serialized, response_deserializer=generate_response_from_bytes
    )


async def outcome(channel: grpc.aio.Channel, asked: GenerateRequest | bytes, client: str = "") -> Ended:
    """Sends a request and reads its stream to the end."""
    start, first, tokens = time.perf_counter(), float("inf"), 0
    call = generating(channel)(asked, metadata=(("steer-client-id", client),) if client else ())
    try:
        async for response in call:
            if getattr(response, "HasField", None) and response.HasField("token"):
                first = min(first, time.perf_counter() - start)
                tokens += len(response.token.token_ids)
    except grpc.aio.AioRpcError as error:
        return Ended(error.code().name, tokens, first)
    return Ended("OK", tokens, first)


async def idle(server: Server, within_s: float = 1.0) -> Figures:
    """The server's numbers once nothing runs; fails if that takes longer than `within_s`."""
    deadline = time.monotonic() + within_s
    while (numbers := await server.numbers())["running"] or numbers["places"] or numbers["backend"]:
        assert time.monotonic() < deadline, f"still running: {numbers}"
        await asyncio.sleep(0.02)
    return numbers


def percentile(seconds: list[float], part: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * part))]
