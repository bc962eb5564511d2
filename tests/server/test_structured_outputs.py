"""Structured outputs: they reach a backend that has them, and are refused and not announced elsewhere."""

import pytest

from steer_client import AsyncSteerClient
from steer_service.core.errors import Unsupported
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.server.app import SteerServer
from steer_service.server.config import ServerConfig
from steer_service.testing.fake_backend import FakeBackend
from steer_service.wire import info_pb2
from steer_service.wire.info_pb2_grpc import InfoServiceStub


class WithStructuredOutputs(FakeBackend):
    """A backend that takes structured outputs."""

    has_structured_outputs = True


@pytest.mark.parametrize("backend", [FakeBackend(), WithStructuredOutputs()], ids=["without", "with"])
async def test_a_constraint_reaches_an_engine_that_has_structured_outputs(backend: FakeBackend) -> None:
    server = SteerServer(ServerConfig(address="127.0.0.1:0", grace_s=0.0))
    await server.listen()
    await server.open(backend)
    constraint = {"choice": ["yes", "no"]}
    try:
        async with await AsyncSteerClient.connect(server.address) as client:
            stub = InfoServiceStub(client._channels.for_running_loop())
            features = (await stub.GetServerInfo(info_pb2.GetServerInfoRequest())).features
            assert (info_pb2.FEATURE_STRUCTURED_OUTPUTS in features) == backend.has_structured_outputs
            if backend.has_structured_outputs:
                await client.generate(["a b"], structured_outputs=constraint, max_tokens=1)
                sampling = backend.requests[-1].sampling
                assert sampling.structured_outputs == StructuredOutputs(choice=("yes", "no"))
            else:
                with pytest.raises(Unsupported) as refused:
                    await client.generate(["a b"], structured_outputs=constraint, max_tokens=1)
                assert refused.value.reason == "NO_STRUCTURED_OUTPUTS"
                assert refused.value.field == "sampling.structured_outputs"
    finally:
        await server.drain()
