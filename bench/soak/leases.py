"""Captures in shared memory: they are right while they are leased, and gone afterwards however the lease ends."""

import asyncio
import os
import random
import time

import grpc

from bench.soak.clients import SHARED_MEMORY, Client, read_segment
from bench.soak.faults import World
from bench.soak.history import END_S
from steer_service.wire.capture_pb2 import (
    CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED,
    ConfirmSharedMemoryRequest,
    OpenSharedMemoryRequest,
    ReleaseCaptureRequest,
)
from steer_service.wire.capture_pb2_grpc import CaptureServiceStub
from steer_service.wire.generation_pb2 import GenerateRequest

NONCE_BYTES = 32


async def leased_capture(world: World, chance: random.Random) -> None:
    """A capture is leased; the lease ends by its release, with its session, with its connection, or expires."""
    ending = chance.choice(["released", "session ended", "connection closed", "expired"])
    async with world.client(chance) as client:
        session = await _session(client)
        if session is None:
            return
        token, call = session
        request = GenerateRequest()
        request.CopyFrom(world.asks["held"])
        request.capture.delivery = CAPTURE_DELIVERY_SHARED_MEMORY_REQUIRED
        request.capture.shared_memory_session = token
        rows = (await client.generate("held", request=request, fault="leased capture")).rows
        if not rows.segment:  # the engine has died
            return
        operation = client.begin("lease", rows.segment, allowed=frozenset({"GONE"}), fault=ending)
        match ending:
            case "released":
                target = ReleaseCaptureRequest(lease_token=rows.lease)
                await CaptureServiceStub(client.channel).ReleaseCapture(target, metadata=client.metadata)
            case "session ended":
                call.cancel()
            case "connection closed":
                await client.channel.close()
            case _:
                await asyncio.sleep(world.hold_s)
        until_s = time.monotonic() + END_S
        while rows.segment in os.listdir(SHARED_MEMORY) and time.monotonic() < until_s:
            await asyncio.sleep(0.05)
        client.end(operation, "STILL THERE" if rows.segment in os.listdir(SHARED_MEMORY) else "GONE")
        call.cancel()


async def _session(client: Client) -> tuple[bytes, grpc.aio.UnaryStreamCall] | None:
    """The token of a shared-memory session, and the call that keeps it; None if there is no server to open one."""
    operation, stub = client.begin("session", client.owner), CaptureServiceStub(client.channel)
    try:
        challenge = await stub.OpenSharedMemory(OpenSharedMemoryRequest(), metadata=client.metadata)
        nonce = read_segment(challenge.segment_name)[:NONCE_BYTES]
        proof = ConfirmSharedMemoryRequest(challenge_token=challenge.challenge_token, nonce=nonce)
        call = stub.ConfirmSharedMemory(proof, metadata=client.metadata)
        token = (await call.read()).session_token
    except grpc.aio.AioRpcError as error:
        client.end(operation, error.code().name)
        return None
    client.end(operation, "OK")
    return token, call
