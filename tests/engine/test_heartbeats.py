"""Heartbeats of a server around a real engine."""

import grpc
import pytest

from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.wire.generation_pb2_grpc import GenerationServiceStub
from steer_service.wire.request import request_to_proto
from tests.engine.all_backends import Shared

pytestmark = pytest.mark.engine


async def test_a_long_prompt_gets_heartbeats_before_its_first_token(llama: VLLMSteeringModel) -> None:
    prompt = TokenPrompt(token_ids=tuple(range(5, 485)))  # takes eight steps
    request = GenerateRequest(prompt=prompt, sampling=SamplingOptions(max_tokens=4, ignore_eos=True))
    server = SteerServer(ServerConfig(address="127.0.0.1:0", heartbeat_s=0.001))
    address = await server.listen()
    await server.open(Shared(llama))
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            responses = [
                response async for response in GenerationServiceStub(channel).Generate(request_to_proto(request))
            ]
    finally:
        await server.drain()

    kinds = [response.WhichOneof("event") for response in responses]
    assert "heartbeat" in kinds[kinds.index("started") : kinds.index("token")]
    assert [kind for kind in kinds if kind not in ("heartbeat", "token")] == ["started", "finished", "completed"]
    assert [response.sequence for response in responses] == list(range(len(responses)))
